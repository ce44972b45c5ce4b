"""pseudo_masks.py gives the same masks as the separate steps, for any processes, threads and batches."""

import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import clip
import voc12
from pipeline.cams import INITIAL, REFINED, CamSettings, batch_cams
from pipeline.decode import Grid, resized_views
from pipeline.fused import upsample
from pytorch_grad_cam import text_cams
from segmentation import camfile
from segmentation.masks import mask_class_ids, read_mask
from shapes.draw import write
from tests.conftest import CASES, golden, parity_image
from tests.pipeline.conftest import write_voc

GOLDEN_CASES = "abcez"

# Image -> size and labels: several have one size but different numbers of labels, which batches pad.
IMAGES = {
    **{f"same_{count}": ((96, 128), list(range(count, 2 * count))) for count in range(1, 6)},
    "es_b": ((75, 100), [3]),
    "near": ((72, 97), [3, 19]),  # same patch grid as es_b
    "other": ((50, 90), [7, 2]),
}


def run(script: str, *arguments) -> int:
    """Run a script in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments), *(["--device", "cpu"])])
        return import_module(script).main()


def images_of(root: Path) -> list:
    return ["--image_root", root / "JPEGImages", "--split_file", root / "split.txt"]


def fused(root: Path, out: Path, *flags, benchmark="voc12", code=0) -> dict[str, bytes]:
    common = ["--benchmark", benchmark, *images_of(root), "--output", out]
    assert run("pseudo_masks", *common, *flags) == code
    return files(out)


def stepwise(root: Path, out: Path, *flags, benchmark="voc12", crf=(), cam_format="compact"):
    """Make CAMs in `out`/cams and masks in `out`/masks with the two scripts; return the masks."""
    common = ["--benchmark", benchmark, *images_of(root), "--cam_format", cam_format]
    assert run("generate_cams", *common, "--output", out / "cams", *flags) == 0
    masks = ["--output", out / "masks", "--num_workers", 1, *crf]
    assert run("eval_cam_with_crf", "--cam_dir", out / "cams", *masks, *images_of(root)) == 0
    return files(out / "masks")


def files(folder: Path, pattern: str = "*.png") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob(pattern)}


def agreement(first: Path, second: Path) -> float:
    """Return the proportion of equal pixels in the masks of two folders."""
    names = sorted(file.name for file in first.glob("*.png"))
    assert names
    equal = [(read_mask(first / name) == read_mask(second / name)).ravel() for name in names]
    return float(np.concatenate(equal).mean())


def record(folder: Path) -> dict:
    return json.loads((folder / "settings.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"), IMAGES)


@pytest.fixture(scope="module")
def model(parity_file) -> list:
    return ["--model", parity_file("tiny", 1)]


@pytest.fixture(scope="module")
def steps(data, model, tmp_path_factory) -> Path:
    """Outputs of the separate steps for `data`: folders cams (compact) and masks."""
    out = tmp_path_factory.mktemp("steps")
    assert len(stepwise(data, out, *model)) == len(IMAGES)
    assert len(set(files(out / "masks").values())) == len(IMAGES)
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Folder with 40 drawn images."""
    root = tmp_path_factory.mktemp("drawn")
    write(root, train=40, val=0)
    (root / "split.txt").write_bytes((root / "ImageSets" / "Segmentation" / "train.txt").read_bytes())
    return root


@pytest.fixture(scope="module")
def few(drawn) -> list:
    """Flags that select ten of the drawn images."""
    (drawn / "few.txt").write_text("".join((drawn / "split.txt").read_text().splitlines(True)[:10]))
    return ["--split_file", drawn / "few.txt"]


@pytest.fixture(scope="module")
def drawn_masks(drawn, tmp_path_factory) -> Path:
    """The fused masks of `drawn`."""
    out = tmp_path_factory.mktemp("drawn_masks") / "masks"
    assert len(fused(drawn, out, benchmark="shapes")) == 40
    return out


def test_masks_and_records_equal_those_of_the_steps(data, model, steps, tmp_path):
    assert fused(data, tmp_path / "masks", *model) == files(steps / "masks")
    assert not (tmp_path / "masks" / "cams").exists()
    assert record(tmp_path / "masks") == record(steps / "masks")


@pytest.mark.parametrize("cam_format", camfile.FORMATS)
def test_kept_cams_equal_those_of_step_1_and_can_be_continued(data, model, steps, tmp_path, cam_format):
    kept = tmp_path / "kept"
    masks = fused(data, tmp_path / "masks", *model, "--keep_cams", cam_format, "--cam_dir", kept)
    assert masks == files(steps / "masks")
    step = tmp_path / "step"
    common = ["--benchmark", "voc12", *images_of(data), *model, "--cam_format", cam_format]
    assert run("generate_cams", *common, "--output", step) == 0
    assert {file.name for file in kept.iterdir()} == {file.name for file in step.iterdir()}
    assert files(kept, "*.np?") == files(step, "*.np?") and record(kept) == record(step)
    # Step 1 and step 2b continue these folders.
    before = {file: file.stat().st_mtime_ns for file in kept.glob("*.np?")}
    (kept / f"other{camfile.FORMATS[cam_format]}").unlink()
    assert run("generate_cams", *common, "--output", kept) == 0
    assert files(kept, "*.np?") == files(step, "*.np?")
    assert [file.stem for file, time in before.items() if file.stat().st_mtime_ns != time] == ["other"]
    (tmp_path / "masks" / "near.png").unlink()
    common = ["--cam_dir", kept, "--image_root", data / "JPEGImages", "--num_workers", 1]
    common += ["--split_file", data / "split.txt", "--output", tmp_path / "masks"]
    if cam_format == "compact":
        assert run("eval_cam_with_crf", *common) == 0
        assert files(tmp_path / "masks") == masks


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_pseudo_masks(case, tmp_path, parity_file):
    """Masks as in the reference implementation. CAMs differ by 1e-3, which changes a few labels."""
    name, size, preset, seed, _, labels = CASES[case]
    root = write_voc(tmp_path / "voc", {name: (size, labels)})
    fused(root, tmp_path / "masks", "--model", parity_file(preset, seed))
    expected = golden("e2e")[f"pseudo_{case}"]
    equal = (read_mask(tmp_path / "masks" / f"{name}.png") == expected).mean()
    print(case, equal)
    assert equal >= 0.999


@pytest.mark.parametrize(
    "flags",
    [
        ["--flip", "--cam_scales", "0.5,1.0,1.5"],
        ["--refine", "none"],
        ["--max_patches", "20", "--confidence", "0.5", "--crf_image", "raw"],
    ],
    ids=lambda flags: flags[0],
)
def test_options_give_the_same_masks_as_in_the_steps(flags, data, model, steps, tmp_path):
    crf = flags[2:] if "--confidence" in flags else []
    cams = flags[:2] if crf else flags
    if "--refine" in flags:
        crf = ["--cam_type", "highres"]
    found = fused(data, tmp_path / "fused", *model, *flags)
    assert found == stepwise(data, tmp_path, *model, *cams, crf=crf)
    assert found != files(steps / "masks")
    assert record(tmp_path / "fused") == record(tmp_path / "masks")


def test_large_images_are_shrunk_for_the_crf_as_in_the_steps(data, model, steps, tmp_path, capsys):
    most = ["--crf_max_pixels", 6000]
    found = fused(data, tmp_path / "fused", *model, *most)
    assert "images shrunk to 6000 pixels for the CRF (--crf_max_pixels): 7" in capsys.readouterr().err
    assert found == stepwise(data, tmp_path, *model, crf=most) != files(steps / "masks")
    assert read_mask(tmp_path / "fused" / "same_1.png").shape == (96, 128)


def test_a_benchmark_without_background(data, model, tmp_path):
    file = tmp_path / "stuff.yaml"
    file.write_text(
        f"name: stuff\nclasses: [{', '.join(voc12.CLASSES)}]\nbackgrounds: [grass, sky]\n"
        f"has_background: false\nroot: {data}\nlabels: voc_xml\n"
    )
    found = fused(data, tmp_path / "fused", *model, benchmark=str(file))
    assert found == stepwise(data, tmp_path, *model, benchmark=str(file))
    values = {name: set(np.unique(read_mask(tmp_path / "fused" / f"{name}.png"))) for name in IMAGES}
    assert all(values[name] <= {*labels, 255} for name, (_, labels) in IMAGES.items())
    assert values["es_b"] == {3}
    torch_masks = tmp_path / "torch"
    fused(data, torch_masks, *model, "--crf_backend", "torch", benchmark=str(file))
    assert agreement(tmp_path / "fused", torch_masks) >= 0.999


# Batches


COUNTS = (1, 4, 2, 5, 1, 3, 2, 5)  # labels of each image


@pytest.fixture(scope="module")
def batch_inputs(parity_clip) -> tuple:
    """The model; images of one size at two scales; text features of their labels, and of the backgrounds.

    The features are close to each other, so that all probabilities are above 1e-3.
    """
    loaded = parity_clip("tiny", 1)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 64, generator=generator)
    features = common + 0.1 * torch.randn(24, 64, generator=generator)
    features = torch.nn.functional.normalize(features, dim=-1)
    views = [
        resized_views(parity_image(f"company{index}", (89 + index, 128)), Grid.of(loaded), (1.0, 1.5), 10_000)
        for index in range(len(COUNTS))
    ]
    texts = [features[index : index + count] for index, count in enumerate(COUNTS)]
    return loaded, views, texts, features[20:]


def relative_to_maximum(cams: torch.Tensor) -> torch.Tensor:
    return cams / cams.amax((-2, -1), keepdim=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("normalized", [True, False])
def test_batches_and_padding_do_not_change_cams(normalized, threads, batch_inputs, monkeypatch):
    """Compare the CAMs of a batch of images with those of each image alone.

    Refined CAMs of this model are nearly uniform, so normalizing them to [0, 1] enlarges rounding errors to
    4e-5. They are compared relative to their maximum instead.
    """
    loaded, views, texts, backgrounds = batch_inputs
    options = CamSettings(flip=True, cam_scales=(1.0, 1.5), keep_initial=True)
    if not normalized:
        monkeypatch.setattr("pipeline.cams.min_max_normalize", relative_to_maximum)

    def cams(batch: int) -> list[dict]:
        results = []
        for start in range(0, len(COUNTS), batch):
            part = slice(start, start + batch)
            results += batch_cams(loaded, views[part], texts[part], backgrounds, options)
        return results

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone, together = cams(1), {batch: cams(batch) for batch in (3, 8)}
    finally:
        torch.set_num_threads(before)
    for batch in (3, 8):
        for one, other, count in zip(alone, together[batch], COUNTS, strict=True):
            assert one.keys() == other.keys() == {INITIAL, REFINED}
            for kind in (INITIAL,) if normalized else (INITIAL, REFINED):
                assert len(other[kind]) == count
                np.testing.assert_allclose(one[kind], other[kind], atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_and_padding_do_not_change_raw_cams(threads, batch_inputs):
    """Differences are relative to the maximum of the label's CAM; the largest measured one was 8.5e-6."""
    loaded, views, texts, backgrounds = batch_inputs
    mean, std = loaded.config.mean, loaded.config.std
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for scale in (0, 1):
            images = clip.normalize(torch.from_numpy(np.stack([view[scale] for view in views])), mean, std)
            padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            valid = torch.arange(max(COUNTS)) < torch.tensor(COUNTS)[:, None]
            together = text_cams(loaded, images, padded, backgrounds, valid)
            for index, count in enumerate(COUNTS):
                alone = text_cams(loaded, images[index, None], texts[index][None], backgrounds)
                assert alone.probabilities[0, :count].min() > 1e-3
                raw, batched = alone.raw[0], together.raw[index, :count]
                difference = (raw - batched).abs().amax((1, 2)) / raw.abs().amax((1, 2))
                assert difference.max() < 2e-5
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [3, 8])
def test_labels_do_not_depend_on_the_batch_size(
    batch, data, model, steps, few, drawn, drawn_masks, tmp_path
):
    size = ["--batch_size", batch, "--prefetch", 8]
    fused(data, tmp_path / "masks", *model, *size)
    assert agreement(tmp_path / "masks", steps / "masks") >= 0.9999
    fused(drawn, tmp_path / "drawn", *few, *size, benchmark="shapes")
    assert agreement(tmp_path / "drawn", drawn_masks) >= 0.9999


@pytest.mark.parametrize("batch", [1, 4])
def test_the_torch_backend_agrees_with_numba(batch, few, drawn, drawn_masks, tmp_path):
    flags = [*few, "--crf_backend", "torch", "--batch_size", batch, "--prefetch", 10]
    assert len(fused(drawn, tmp_path / "masks", *flags, benchmark="shapes")) == 10
    assert agreement(tmp_path / "masks", drawn_masks) >= 0.999


@pytest.mark.parametrize("size", [(375, 500), (96, 128), (7, 300), (1, 1), (24, 32)])
def test_upsampling_on_a_device_equals_that_of_camfile(size):
    grid = np.random.default_rng(0).random((3, 24, 32), np.float32)
    expected = camfile.resize(grid, size).astype(np.float16)
    upsampled = upsample(torch.from_numpy(grid), size).numpy()
    assert upsampled.shape == expected.shape and upsampled.dtype == np.float16
    difference = np.abs(upsampled.astype(np.float32) - expected.astype(np.float32))
    assert (difference <= np.spacing(np.maximum(upsampled, expected)).astype(np.float32)).all()


# Processes, threads, stopped runs


def test_processes_and_threads_do_not_change_masks(data, model, steps, tmp_path, monkeypatch):
    expected = files(steps / "masks")
    flags = [*model, "--batch_size", 1]
    assert fused(data, tmp_path / "threads", *flags, "--threads", 3) == expected
    monkeypatch.setenv("CLIP_WSSS_CACHE", str(tmp_path / "cache"))  # each process computes its text features
    assert fused(data, tmp_path / "four", *flags, "--num_workers", 4, "--prefetch", 2) == expected


def test_batches_are_the_same_in_any_number_of_processes(data, model, tmp_path):
    flags = [*model, "--batch_size", 3, "--prefetch", 3, "--keep_cams", "compact"]
    one = fused(data, tmp_path / "one", *flags)
    assert fused(data, tmp_path / "two", *flags, "--num_workers", 2) == one
    cams = files(tmp_path / "one" / "cams", "*.npz")
    assert files(tmp_path / "two" / "cams", "*.npz") == cams and len(cams) == len(IMAGES)
    assert record(tmp_path / "two" / "cams") == record(tmp_path / "one" / "cams")


def test_a_stopped_run_makes_only_the_missing_masks(data, model, steps, tmp_path):
    out = tmp_path / "masks"
    fused(data, out, *model)
    before = {file.stem: file.stat().st_mtime_ns for file in out.glob("*.png")}
    for name in ("es_b", "same_3"):
        (out / f"{name}.png").unlink()
    assert fused(data, out, *model) == files(steps / "masks")
    after = {file.stem: file.stat().st_mtime_ns for file in out.glob("*.png")}
    assert {name for name in before if before[name] != after[name]} == {"es_b", "same_3"}
    # With --keep_cams an image without a CAM file is not done.
    assert fused(data, out, *model, "--keep_cams", "compact") == files(steps / "masks")
    assert files(out / "cams", "*.npz") == files(steps / "cams", "*.npz")


def test_kept_cams_and_masks_of_changed_labels_are_made_again(data, model, tmp_path):
    labels, out = tmp_path / "labels.txt", tmp_path / "masks"

    def make(**changed) -> dict[str, bytes]:
        lines = {name: labels for name, (_, labels) in IMAGES.items()} | changed
        labels.write_text("".join(" ".join(map(str, [name, *lines[name]])) + "\n" for name in lines))
        return fused(data, out, *model, "--keep_cams", "compact", "--labels", labels)

    before = make()
    after = make(near=[5])
    assert {name for name in before if before[name] != after[name]} == {"near.png"}
    assert set(np.unique(read_mask(out / "near.png"))) <= {0, 6, 255}
    assert camfile.class_ids_of(out / "cams", "near") == [5]
    assert make(near=[]).keys() == before.keys() - {"near.png"}  # an image without labels has no mask
    assert not camfile.find(out / "cams", "near")
    assert make() == before
    (out / "near.png").write_bytes(after["near.png"])  # as after a kill between CAM and mask
    assert make() == before


def test_a_benchmark_without_backgrounds(data, model, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_WSSS_CACHE", str(tmp_path / "features"))  # no cached features
    (tmp_path / "own.yaml").write_text(f"{{name: own, classes: {voc12.CLASSES}, root: {data}}}")
    (tmp_path / "labels.txt").write_text("near 3 19\n")
    common = ["--split_file", tmp_path / "labels.txt", *model, "--output", tmp_path / "masks"]
    assert run("pseudo_masks", "--benchmark", tmp_path / "own.yaml", *common) == 0
    assert mask_class_ids(tmp_path / "masks" / "near.png") == [3, 19]


def test_other_settings_need_another_folder(data, model, tmp_path):
    out = tmp_path / "masks"
    before = fused(data, out, *model)
    for flags, message in (
        (["--flip"], "cams"),
        (["--confidence", "0.5"], r"confidence \(was 0.95, now 0.5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fused(data, out, *model, *flags)
    assert files(out) == before
    assert fused(data, out, *model, "--confidence", "0.5", "--overwrite") != before
    assert record(out)["settings"]["confidence"] == 0.5


def test_damaged_images_are_left_out_and_listed(model, tmp_path, capsys):
    root = write_voc(tmp_path / "voc", {name: IMAGES[name] for name in ("es_b", "other", "near")})
    (root / "JPEGImages" / "es_b.png").write_bytes(b"no image")
    (root / "Annotations" / "near.xml").write_text("<annotation></annotation>")
    assert fused(root, tmp_path / "masks", *model, code=1).keys() == {"other.png"}
    assert "es_b" in (tmp_path / "masks" / "failed.txt").read_text()
    assert "images without labels: 1 (near)" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_images_whose_cams_are_not_finite_get_no_mask(backend, data, tmp_path, parity_file):
    state = torch.load(parity_file("tiny", 1))
    state["visual.positional_embedding"][1] = 7e4  # becomes infinite by its rounding to float16
    torch.save(state, tmp_path / "large.pt")
    flags = ["--model", tmp_path / "large.pt", "--crf_backend", backend]
    assert fused(data, tmp_path / "o", *flags, code=1) == {}
    failed = (tmp_path / "o" / "failed.txt").read_text().splitlines()
    assert len(failed) == len(IMAGES) and all("the CAM is not finite" in line for line in failed)


def test_bfloat16_masks_agree_with_float32(drawn, drawn_masks, tmp_path):
    masks = fused(drawn, tmp_path / "masks", "--precision", "bf16", benchmark="shapes")
    assert masks != files(drawn_masks)  # the precision had an effect
    equal = agreement(tmp_path / "masks", drawn_masks)
    print("bf16", equal)
    assert equal >= 0.99


def test_cam_folder_without_kept_cams_is_refused(data, model, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        fused(data, tmp_path / "masks", *model, "--cam_dir", tmp_path / "cams")
    assert caught.value.code == 2 and "--keep_cams" in capsys.readouterr().err


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit):
        run("pseudo_masks", "--help")
    text = capsys.readouterr().out
    for flag in (
        *("--benchmark", "--image_root", "--split_file", "--shards", "--labels", "--model"),
        *("--output", "--keep_cams", "--cam_dir", "--overwrite", "--device"),
        *("--precision", "--num_workers", "--threads", "--batch_size", "--prefetch", "--decode_workers"),
        *("--refine", "--keep_initial", "--cam_method", "--cam_scales", "--flip", "--affinity_layers"),
        *("--box_threshold", "--include_edge", "--position_rounding", "--round_weights", "--max_patches"),
        *("--preset", "--exclude_last_layer", "--confidence", "--crf_backend", "--crf_image", "--crf_unary"),
        "--crf_max_pixels",
    ):
        assert re.search(rf"\n  {flag}[,\s]", text), flag


def test_masks_of_changed_labels_are_made_again(data, model, tmp_path):
    labels, out = tmp_path / "labels.txt", tmp_path / "masks"
    lines = {"es_b": "es_b 3", "near": "near 3", "other": "other 7"}
    split = tmp_path / "split.txt"
    split.write_text("\n".join(lines))
    flags = [*model, "--labels", labels, "--split_file", split]
    labels.write_text("\n".join(lines.values()))
    before = fused(data, out, *flags)
    assert len(before) == 3 and mask_class_ids(out / "near.png") == [3]
    labels.write_text("\n".join({**lines, "near": "near 3 19", "other": "other"}.values()))
    after = fused(data, out, *flags)
    assert after.keys() == {"es_b.png", "near.png"} and mask_class_ids(out / "near.png") == [3, 19]
    assert after["es_b.png"] == before["es_b.png"] and after["near.png"] != before["near.png"]


def test_nothing_is_removed_if_either_folder_is_refused(data, model, steps, tmp_path):
    shutil.copytree(steps / "cams", tmp_path / "cams")
    (tmp_path / "foreign").mkdir()
    shutil.copy(steps / "masks" / "es_b.png", tmp_path / "foreign")
    before = files(tmp_path / "cams", "*")
    keep = ["--keep_cams", "compact", "--cam_dir", tmp_path / "cams", "--overwrite"]
    with pytest.raises(ValueError, match="so this command did not fill it"):
        fused(data, tmp_path / "foreign", *model, *keep)
    assert files(tmp_path / "cams", "*") == before
    with pytest.raises(SystemExit):
        fused(data, tmp_path / "cams", *model, *keep)


def test_presets_set_defaults_and_flags_take_precedence(data, model, tmp_path):
    def made(out, *flags):
        return fused(data, out, *model, "--keep_cams", "compact", *flags)

    default = made(tmp_path / "default")
    preset = made(tmp_path / "preset", "--preset", "cls_seg")
    explicit = made(tmp_path / "explicit", "--exclude_last_layer", "--confidence", "0")
    assert preset == explicit and preset.keys() == default.keys() and preset != default
    ignored = {folder: any((read_mask(file) == 255).any() for file in (tmp_path / folder).glob("*.png"))
               for folder in ("default", "preset")}  # fmt: skip
    assert ignored == {"default": True, "preset": False}
    assert record(tmp_path / "preset")["settings"]["confidence"] == 0
    assert record(tmp_path / "preset" / "cams")["settings"]["exclude_last_layer"] is True
    flags = ["--preset", "cls_seg", "--no_exclude_last_layer", "--confidence", "0.95"]
    assert made(tmp_path / "flags", *flags) == default


def test_another_backend_continues_a_folder(data, model, steps, tmp_path):
    shutil.copytree(steps / "masks", tmp_path / "masks")
    (tmp_path / "masks" / "es_b.png").unlink()
    assert len(fused(data, tmp_path / "masks", *model, "--crf_backend", "torch")) == len(IMAGES)
    assert record(tmp_path / "masks")["info"] == {"crf_backend": "torch"}
    assert agreement(tmp_path / "masks", steps / "masks") >= 0.999
