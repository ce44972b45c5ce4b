"""Step 1: its command line and its options."""
import json
import random
import shutil
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clip
import voc12
from pipeline.cams import INITIAL, REFINED, CamSettings, image_cams
from pipeline.cams_cli import main
from segmentation import camfile
from tests.clip.test_checkpoint import SMALL_RESNET, SMALL_VIT, small_state
from tests.conftest import CASES, golden, parity_image
from tests.pipeline.conftest import write_voc
from tests.processes import Command, Process, here, script


def run(monkeypatch, voc: Path, out: Path, model: Path, *flags: str, benchmark: str = "voc12") -> int:
    """Run generate_cams_voc12.py in this process; return the exit code."""
    command = ["generate_cams", "--image_root", voc / "JPEGImages", "--split_file", voc / "split.txt"]
    command += ["--output", out, "--model", model, "--device", "cpu", *flags]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    return main(benchmark)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.np?")}


@pytest.mark.parametrize("case", CASES)
def test_golden_cams_end_to_end(case, tmp_path, monkeypatch, parity_file):
    name, size, preset, seed, data, labels = CASES[case]
    reference = golden(f"case_{case}")
    voc = write_voc(tmp_path / "voc", {name: (size, labels if data == "voc12" else [])})
    if data == "coco14":
        (voc / "split.txt").write_text(" ".join(map(str, [name, *labels])))
    out = tmp_path / "cams"
    assert run(monkeypatch, voc, out, parity_file(preset, seed), "--keep_initial", benchmark=data) == 0
    content = np.load(out / f"{name}.npy", allow_pickle=True).item()  # as readers of the reference format do
    assert content["keys"].dtype == np.int64 and content[REFINED].dtype == np.float16
    np.testing.assert_array_equal(content["keys"], reference["keys"])
    difference = content[REFINED].astype(float) - reference["attn_highres"].astype(float)
    assert np.abs(difference).max() <= 1.5e-3
    if "highres" in reference:
        assert np.abs(content[INITIAL].astype(float) - reference["highres"]).max() <= 1e-3


def test_processes_and_formats_agree(voc, tmp_path, monkeypatch, parity_file):
    model = parity_file("tiny", 1)
    assert run(monkeypatch, voc, tmp_path / "one", model) == 0
    assert run(monkeypatch, voc, tmp_path / "two", model, "--num_workers", "2") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "one")) == 3
    assert run(monkeypatch, voc, tmp_path / "compact", model, "--cam_format", "compact") == 0
    for name in ("es_a", "es_b", "other"):
        for full, compact in zip(
            camfile.read(tmp_path / "one", name), camfile.read(tmp_path / "compact", name), strict=True
        ):
            np.testing.assert_array_equal(full, compact)


def test_images_whose_cams_are_not_finite_fail(voc, tmp_path, monkeypatch, parity_file):
    """This position is finite in the file, but not after its rounding to float16."""
    state = torch.load(parity_file("tiny", 1))
    state["visual.positional_embedding"][1] = 7e4
    torch.save(state, tmp_path / "large.pt")
    for format in ("full", "compact"):
        out = tmp_path / format
        assert run(monkeypatch, voc, out, tmp_path / "large.pt", "--cam_format", format) == 1
        failed = (out / "failed.txt").read_text().splitlines()
        assert len(failed) == 3 and all("the CAM is not finite: give undamaged" in line for line in failed)
        assert not files(out)
    more = ["--position_rounding", "resampled"]  # images of the size of CLIP's training are not rounded
    assert run(monkeypatch, voc, tmp_path / "other", tmp_path / "large.pt", *more) == 1


def test_bad_images_do_not_stop_a_run(voc, tmp_path, monkeypatch, parity_file, capsys):
    (voc / "JPEGImages" / "es_b.png").write_bytes(b"not an image")
    (voc / "Annotations" / "other.xml").write_text("<annotation></annotation>")
    out = tmp_path / "cams"
    assert run(monkeypatch, voc, out, parity_file("tiny", 1)) == 1
    assert set(files(out)) == {"es_a.npy"}
    assert "es_b" in (out / "failed.txt").read_text()
    printed = capsys.readouterr().err
    assert "1 failed" in printed and "images without labels: 1 (other)" in printed
    parity_image("es_b", (75, 100)).save(voc / "JPEGImages" / "es_b.png")  # repair the image and run again
    assert run(monkeypatch, voc, out, parity_file("tiny", 1)) == 0
    assert set(files(out)) == {"es_a.npy", "es_b.npy"} and not (out / "failed.txt").exists()


def test_all_zero_cams_are_reported(tmp_path, monkeypatch, parity_file, capsys):
    voc = write_voc(tmp_path / "voc", {"es_z": ((70, 120), [0, 13, 17])})
    assert run(monkeypatch, voc, tmp_path / "cams", parity_file("tiny", 3)) == 0
    assert "all-zero CAM: 1 (es_z)" in capsys.readouterr().err
    assert not camfile.read(tmp_path / "cams", "es_z")[1][1].any()


def test_other_settings_or_weights_need_another_folder(voc, tmp_path, monkeypatch, parity_file):
    out = tmp_path / "cams"
    assert run(monkeypatch, voc, out, parity_file("tiny", 1)) == 0
    with pytest.raises(ValueError, match="refine"):
        run(monkeypatch, voc, out, parity_file("tiny", 1), "--refine", "mhsa")
    with pytest.raises(ValueError, match="model"):
        run(monkeypatch, voc, out, parity_file("tiny", 2))
    before = files(out)
    assert run(monkeypatch, voc, out, parity_file("tiny", 1), "--refine", "mhsa", "--overwrite") == 0
    assert files(out).keys() == before.keys() and files(out) != before
    record = json.loads((out / "settings.json").read_text())
    assert record["settings"]["refine"] == "mhsa" and len(record["inputs"]["model"]) == 64


def test_cams_of_changed_labels_and_damaged_files_are_made_again(voc, tmp_path, monkeypatch, parity_file):
    model, labels, out = parity_file("tiny", 1), tmp_path / "labels.txt", tmp_path / "cams"
    labels.write_text("es_a 7\nes_b 3 4\nother 5\n")
    assert run(monkeypatch, voc, out, model, "--labels", str(labels)) == 0
    before = files(out)
    labels.write_text("es_a 7\nes_b 4\nother 5\n")
    (out / "other.npy").write_bytes(before["other.npy"][:100])
    assert run(monkeypatch, voc, out, model, "--labels", str(labels)) == 0
    assert camfile.read(out, "es_b")[0].tolist() == [4]
    assert {name for name, content in files(out).items() if content != before[name]} == {"es_b.npy"}
    labels.write_text("es_a\nes_b 4\nother 5\n")  # no labels any more: the CAM must be removed
    assert run(monkeypatch, voc, out, model, "--labels", str(labels)) == 0
    assert set(files(out)) == {"es_b.npy", "other.npy"}


def test_other_prompts_or_conventions_need_another_folder(voc, tmp_path, monkeypatch, parity_file):
    def make(model, templates="['a photo of a {}.']"):
        (voc / "mine.yaml").write_text(
            f"name: mine\nclasses: [cat]\nbackgrounds: [grass]\ntemplates: {templates}\nlabels: file\n"
        )
        (voc / "split.txt").write_text("es_a 0\n")
        return run(monkeypatch, voc, tmp_path / "cams", model, benchmark=str(voc / "mine.yaml"))

    file = parity_file("tiny", 1)
    assert make(file) == 0
    with pytest.raises(ValueError, match="templates"):
        make(file, "['the {}.']")
    with pytest.raises(ValueError, match=r"conventions.*weights_rounded"):
        make(f"ViT-B-16:{file}")  # the same weights with GELU and without rounding


# Test id -> flags, and the recorded settings that they must give.
FLAGS = {
    "refine": (["--refine", "mhsa"], {"refine": "mhsa"}),
    "method": (["--cam_method", "layercam"], {"cam_method": "layercam"}),
    "layers": (["--affinity_layers", "3"], {"affinity_layers": 3}),
    "layers by their old name": (["--averaged_blocks", "3"], {"affinity_layers": 3}),
    "last": (["--exclude_last_layer"], {"affinity_layers": 8, "exclude_last_layer": True}),
    "last by its old name": (["--leave_out_last"], {"affinity_layers": 8, "exclude_last_layer": True}),
    "preset": (["--preset", "cls_seg"], {"affinity_layers": 8, "exclude_last_layer": True}),
    "threshold": (["--box_threshold", "0.9"], {"box_threshold": 0.9}),
    "edge": (["--include_edge"], {"include_edge": True}),
    "edge by its old name": (["--cover_edge"], {"include_edge": True}),
    "scales": (["--cam_scales", "1,1.5"], {"cam_scales": [1.0, 1.5]}),
    "flip": (["--flip"], {"flip": True}),
    "rounding": (["--position_rounding", "never"], {"position_rounding": "never"}),
    "weights": (["--round_weights", "off"], {"weights_rounded": False}),
    "precision": (["--precision", "bf16"], {"precision": "bf16"}),
    "patches": (["--max_patches", "20"], {"max_patches": 20}),
}


def test_every_setting_is_tested():
    tested = {flags[0].removeprefix("--") for flags, _ in FLAGS.values()}
    untested = {field.name for field in fields(CamSettings)} - tested
    assert untested == {"keep_initial"}  # tested with the golden CAMs


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_changes_the_cams_and_is_recorded(flag, voc, tmp_path, monkeypatch, parity_file):
    flags, recorded = FLAGS[flag]
    model, compact = parity_file("tiny", 1), ("--cam_format", "compact")
    assert run(monkeypatch, voc, tmp_path / "plain", model, *compact) == 0
    assert run(monkeypatch, voc, tmp_path / "other", model, *compact, *flags) == 0
    plain, other = files(tmp_path / "plain"), files(tmp_path / "other")
    assert plain.keys() == other.keys() and any(plain[name] != other[name] for name in plain)
    settings = json.loads((tmp_path / "other" / "settings.json").read_text())["settings"]
    assert {key: settings[key] for key in recorded} == recorded


@pytest.mark.parametrize(
    ("benchmark", "flags", "excluded"),
    [
        ("voc12", [], False),
        ("voc12", ["--preset", "clip_es"], False),
        ("voc12", ["--preset", "cls_seg"], True),
        ("voc12", ["--preset", "cls_seg", "--no_exclude_last_layer"], False),
        ("voc12", ["--preset", "cls_seg", "--no-leave_out_last"], False),
        ("coco14", ["--preset", "cls_seg"], False),
        ("coco14", ["--preset", "cls_seg", "--exclude_last_layer"], True),
        ("shapes", ["--preset", "cls_seg"], False),
    ],
)
def test_presets_exclude_the_last_layer_only_on_voc12(
    benchmark, flags, excluded, voc, tmp_path, monkeypatch, parity_file
):
    (tmp_path / "labels.txt").write_text("es_a 0\nes_b 1\nother 2\n")
    flags = [*flags, "--labels", str(tmp_path / "labels.txt")]
    assert run(monkeypatch, voc, tmp_path / "cams", parity_file("tiny", 1), *flags, benchmark=benchmark) == 0
    settings = json.loads((tmp_path / "cams" / "settings.json").read_text())["settings"]
    assert settings["exclude_last_layer"] is excluded and settings["affinity_layers"] == 8


def test_excluding_the_only_layer_is_refused(voc, tmp_path, monkeypatch, parity_file):
    flags = ["--affinity_layers", "1", "--preset", "cls_seg"]
    with pytest.raises(ValueError, match="give --affinity_layers 2 or more, or --no_exclude_last_layer"):
        run(monkeypatch, voc, tmp_path / "cams", parity_file("tiny", 1), *flags)
    assert not (tmp_path / "cams").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--affinity_layers", "0"],
        ["--averaged_blocks", "0"],
        ["--max_patches", "-1"],
        ["--cam_scales", "0.5,nan"],
        ["--cam_scales", "inf"],
        ["--box_threshold", "nan"],
        ["--num_workers", "none"],
        ["--decode_workers", "-1"],
        ["--batch_size", "0"],
    ],
)
def test_numbers_out_of_range_are_refused(flags, voc, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, voc, tmp_path / "cams", tmp_path / "any.pt", *flags)
    assert caught.value.code == 2 and "expected" in capsys.readouterr().err


def test_annotations_are_read_next_to_the_images_or_from_the_benchmark(
    voc, tmp_path, monkeypatch, parity_file
):
    model, file = parity_file("tiny", 1), tmp_path / "mine.yaml"

    def make(images: Path, root: Path, image_dir: str) -> list[int]:
        file.write_text(
            f"name: mine\nclasses: [{', '.join(voc12.CLASSES)}]\nbackgrounds: [grass]\n"
            f"root: {root}\nimage_dir: {image_dir}\nlabels: voc_xml\n"
        )
        out = tmp_path / f"cams_{images.name}_{root.name}"
        command = ["--image_root", str(images), "--labels", ""]
        assert run(monkeypatch, voc, out, model, *command, benchmark=str(file)) == 0
        return camfile.class_ids_of(out, "es_a")

    assert make(voc / "JPEGImages", tmp_path, "JPEGImages") == [8, 1, 5]  # next to the images
    shutil.copytree(voc / "JPEGImages", tmp_path / "far" / "resized")
    assert make(tmp_path / "far" / "resized", voc, "JPEGImages") == [8, 1, 5]  # from the benchmark's root
    shutil.copytree(voc / "JPEGImages", tmp_path / "flat")
    shutil.copytree(voc / "Annotations", tmp_path / "flat" / "Annotations")
    assert make(tmp_path / "flat", tmp_path, ".") == [8, 1, 5]  # in the image folder itself


def test_labels_file_replaces_the_annotations(voc, tmp_path, monkeypatch, parity_file):
    (tmp_path / "labels.txt").write_text("es_a 7\nes_b 3 4\nother\n")
    out = tmp_path / "cams"
    assert run(monkeypatch, voc, out, parity_file("tiny", 1), "--labels", str(tmp_path / "labels.txt")) == 0
    assert camfile.read(out, "es_a")[0].tolist() == [7] and camfile.read(out, "es_b")[0].tolist() == [3, 4]
    assert not camfile.find(out, "other")


def test_a_custom_benchmark_is_read_from_yaml(voc, tmp_path, monkeypatch, parity_file):
    (voc / "mine.yaml").write_text(
        "name: mine\nclasses: [cat, dog]\nbackgrounds: [grass, sky]\ntemplates: ['a photo of a {}.']\n"
        f"split_file: {voc / 'lines.txt'}\nmodel: {parity_file('tiny', 1)}\n"
    )
    (voc / "lines.txt").write_text("es_a 0 1\nes_b 1\n")
    out = tmp_path / "cams"
    argv = ["generate_cams.py", "--benchmark", str(voc / "mine.yaml"), "--output", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu"])
    assert main() == 0
    assert camfile.read(out, "es_a")[0].tolist() == [0, 1] and camfile.read(out, "es_b")[0].tolist() == [1]


def test_killed_runs_continue_to_the_same_files(tmp_path, parity_file):
    """After SIGKILL at ten random moments the files equal those of an uninterrupted run, byte for byte."""
    names = {f"image_{i:02}": ((60 + 3 * i, 90 + 2 * i), [i % 20, (7 * i + 3) % 20]) for i in range(24)}
    voc = write_voc(tmp_path / "voc", names)
    command = ["generate_cams_voc12.py", "--device", "cpu", "--img_root", voc / "JPEGImages"]
    command += ["--split_file", voc / "split.txt", "--model", parity_file("tiny", 1), "--cam_out_dir"]

    def start(out: Path) -> Process:
        return Process(script, *command, out)

    assert Process(time.monotonic).end()[0] == 0  # starts the fork server
    begin = time.monotonic()
    assert start(tmp_path / "uninterrupted").end()[0] == 0
    duration = time.monotonic() - begin
    expected = files(tmp_path / "uninterrupted")
    assert len(expected) == len(names)
    random_delays, out, killed = random.Random(0), tmp_path / "killed", 0
    while killed < 10:
        process = start(out)
        time.sleep(random_delays.uniform(0.05, 0.95) * duration)
        process.signal(signal.SIGKILL)
        code = process.end()[0]
        if code == -signal.SIGKILL:
            killed += 1
            continue
        assert code == 0 and files(out) == expected  # finished before the signal: start again
        shutil.rmtree(out)
        duration *= 0.8
    assert start(out).end()[0] == 0
    assert files(out) == expected
    assert not list(out.glob("*.tmp"))


def test_usage_errors_exit_with_code_2_without_traceback(tmp_path, voc, parity_file):
    words = ["generate_cams_voc12.py", "--output", tmp_path / "o"]
    good = ["--image_root", voc / "JPEGImages", "--split_file", voc / "split.txt"]
    (tmp_path / "broken.pt").write_bytes(b"x" * 1000)
    for flags, sentence in (
        ([*good, "--model", tmp_path / "broken.pt"], "not a readable checkpoint"),
        ([*good, "--model", "ViT-Z/99"], "no model 'ViT-Z/99'"),
        ([*good[2:], "--model", tmp_path / "any.pt", "--image_root", "nowhere"], "image folder nowhere"),
    ):
        code, _, errors = here(*words, *flags)
        assert code == 2, errors
        assert sentence in errors and "Traceback" not in errors
    code, same = Command(*words, *flags).end()  # in a new process
    assert (code, same) == (2, errors)


def test_resnet_towers_require_refine_none(voc, tmp_path, monkeypatch):
    torch.save(small_state(SMALL_RESNET), tmp_path / "rn.pt")
    with pytest.raises(ValueError, match="--refine none"):
        run(monkeypatch, voc, tmp_path / "o", tmp_path / "rn.pt")
    assert run(monkeypatch, voc, tmp_path / "out", tmp_path / "rn.pt", "--refine", "none") == 0
    keys, maps = camfile.read(tmp_path / "out", "es_a", INITIAL)
    assert keys.tolist() == [8, 1, 5] and maps.shape == (3, 96, 128) and maps.max() > 0.9


@pytest.fixture(scope="module")
def small():
    """A small model, class features and background features."""
    torch.manual_seed(0)
    model = clip.checkpoint.from_state_dict(small_state(SMALL_VIT)).eval()
    features = torch.nn.functional.normalize(torch.randn(23, 32), dim=-1)
    return model.requires_grad_(False), features[:20], features[20:]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.sampled_from(["caa", "mhsa", "none"]))
@settings(deadline=None, max_examples=40)
def test_cams_have_the_expected_shape_for_any_size_and_number_of_labels(small, height, width, labels, refine):
    model, text, backgrounds = small
    image = parity_image("any", (height, width))
    maps = image_cams(model, image, text[:labels], backgrounds, CamSettings(refine=refine))
    (cams,) = maps.values()
    assert cams.shape == (labels, -(-height // 8), -(-width // 8)) and cams.dtype == np.float32
    assert np.isfinite(cams).all() and cams.min() >= 0 and cams.max() <= 1


@given(st.permutations(range(6)))
@settings(deadline=None, max_examples=15)
def test_label_order_only_permutes_the_cams(small, order):
    model, text, backgrounds = small
    image = parity_image("order", (50, 70))
    (straight,) = image_cams(model, image, text[:6], backgrounds, CamSettings()).values()
    (permuted,) = image_cams(model, image, text[order], backgrounds, CamSettings()).values()
    np.testing.assert_allclose(permuted, straight[order], atol=1e-3)


def test_scales_and_flip_are_averaged(small):
    model, text, backgrounds = small
    image = parity_image("es_a", (96, 128))

    def cams(image, **options):
        (maps,) = image_cams(model, image, text[:2], backgrounds, CamSettings(**options)).values()
        return maps

    fused = cams(image, cam_scales=(0.5, 1.0, 1.5), flip=True)
    assert fused.shape == (2, 18, 24)  # the grid of the largest scale
    assert fused.min() == 0 and fused.max() > 0.999
    # With --flip a mirrored image has mirrored CAMs.
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    np.testing.assert_allclose(cams(mirrored, flip=True)[..., ::-1], cams(image, flip=True), atol=1e-3)


def test_too_large_images_are_shrunk(small):
    model, text, backgrounds = small
    image = parity_image("large", (160, 240))
    (maps,) = image_cams(model, image, text[:1], backgrounds, CamSettings(max_patches=150)).values()
    rows, columns = maps.shape[1:]
    assert 100 < rows * columns <= 150 and abs(columns / rows - 1.5) < 0.2
