"""Step 3b by its command: golden test and CRF of toy data, resuming, processes, bad files, user errors."""

import json
import os
import pickle
import re
import shutil
import sys
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from deeplab.config import Config
from deeplab.predict import main as predict
from deeplab.recipe import RECIPE
from deeplab.test import main
from pipeline import evaluate as step_2a
from pipeline import run as runs
from pipeline.processes import drain, part_of
from pipeline.step import run_step
from segmentation.benchmark import Benchmark, voc_palette
from segmentation.masks import read_mask, write_mask
from segmentation.metrics import confusion, scores
from tests import processes
from tests.deeplab.common import fill_a, golden
from tests.weights import fill_module, parity_image
from training import config as configs
from training import test as command_test
from training.segmenter import crf_labels, protocol_of

SIZES = {"im0": (60, 80), "im1": (75, 50), "im2": (64, 64)}
SUMMARY = ("Pixel Accuracy", "Mean Accuracy", "Mean IoU", "Frequency Weighted IoU")
TINY = ["model.width=4", "model.blocks=[1,1,1,1]", "model.rates=[1,2]"]


@pytest.fixture(scope="module")
def arrays():
    return golden("a_end_to_end")


@pytest.fixture
def tree(arrays, tmp_path):
    """The golden images and masks, and a configuration of network A at full width."""
    (tmp_path / "images").mkdir()
    for name, size in SIZES.items():
        Image.fromarray(parity_image(f"dl:e2e_{name}", *size)).save(tmp_path / "images" / f"{name}.png")
        write_mask(tmp_path / "truth" / f"{name}.png", arrays[f"{name}_gt"], voc_palette())
    (tmp_path / "split.txt").write_text("".join(f"{name}\n" for name in SIZES))
    (tmp_path / "toy.yaml").write_text(
        "{name: toy, classes: [one, two, three, four], image_dir: images, mask_dir: truth}\n"
    )
    (tmp_path / "config.yaml").write_text(
        f"data: {{benchmark: {tmp_path}/toy.yaml, val_split: {tmp_path}/split.txt}}\n"
        "model: {blocks: [1, 1, 1, 1]}\n"
    )
    return tmp_path


@pytest.fixture
def tiny(tree):
    """A small network with the run folder `run`; returns a function: flags -> exit code of the command."""
    words = [*TINY, f"data.benchmark={tree}/toy.yaml", f"data.val_split={tree}/split.txt"]
    config = configs.read(Config, None, words)
    save_run(tree / "run", config, 5)
    return lambda *flags: main(["--run", str(tree / "run"), "--device", "cpu", *flags])


def save_run(folder, config: Config, channels: int, seed: int = 0) -> None:
    """Write the configuration and checkpoint that a training writes."""
    benchmark = Benchmark("any", [f"class {index}" for index in range(channels - 1)])
    model = RECIPE.network(config).build(config, benchmark)
    filled = fill_a(model, seed) if config.model.network == "deeplab_v2" else fill_module(model, seed)
    folder.mkdir(exist_ok=True)
    torch.save(filled.state_dict(), folder / "checkpoint_final.pth")
    (folder / "config.yaml").write_text(configs.to_yaml(config))


def content(folder) -> dict:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.[pn][np][gy]")}


def summary(file) -> list:
    best = json.loads(file.read_text())["best"]
    return [best[name] for name in SUMMARY]


def test_logits_masks_and_scores_match_golden(arrays, tree, capsys):
    config = configs.read(Config, tree / "config.yaml")
    save_run(tree / "weights", config, 5)
    flags = ["--config", str(tree / "config.yaml"), "--device", "cpu", "--save_logits", "float32"]
    flags += ["--checkpoint", str(tree / "weights" / "checkpoint_final.pth")]
    for preset, kind in [("deeplab_published", "wrapped"), ("deeplab", "raw")]:
        out = tree / preset
        assert main([*flags, "--out", str(out), "--crf", preset]) == 0
        for name in SIZES:
            logits = np.load(out / "logits" / f"{name}.npy")
            assert logits.dtype == np.float32
            largest = np.abs(arrays[f"{name}_logit"]).max()
            np.testing.assert_allclose(logits, arrays[f"{name}_logit"], rtol=0, atol=1e-4 * largest)
            for folder, key in [("masks", "pred"), ("masks_crf", f"pred_crf_{kind}")]:
                mask = read_mask(out / folder / f"{name}.png")
                assert (mask != arrays[f"{name}_{key}"]).mean() <= 2e-3
        np.testing.assert_allclose(summary(out / "scores.json"), arrays["scores"], atol=1e-3)
        expected = arrays["scores_crf" if kind == "wrapped" else "scores_crf_raw"]
        np.testing.assert_allclose(summary(out / "scores_crf.json"), expected, atol=1e-3)
    for name, key in [("scores", "scores_class_iou"), ("scores_crf", "scores_crf_class_iou")]:
        iou = json.loads((tree / "deeplab_published" / f"{name}.json").read_text())["best"]["Class IoU"]
        assert [*iou] == ["background", "one", "two", "three", "four"]
        np.testing.assert_allclose([*iou.values()], arrays[key], atol=1e-3)
    printed = capsys.readouterr().out
    assert "without CRF:" in printed and "with CRF (deeplab_published):" in printed
    assert "Mean IoU" in printed


def test_published_protocol_is_the_default(tiny, tree):
    assert tiny() == 0
    report = json.loads((tree / "run" / "test" / "scores.json").read_text())
    assert report["protocol"]["scales"] == [1.0] and report["protocol"]["flip"] is False
    assert report["crf"] is None and report["images"] == 3 and report["failed"] == []
    assert not (tree / "run" / "test" / "masks_crf").exists()
    one = np.stack([read_mask(tree / "run" / "test" / "masks" / "im2.png")])
    assert tiny("--out", str(tree / "more"), "--scales", "0.5,1.0,1.5", "--flip") == 0
    assert (read_mask(tree / "more" / "masks" / "im2.png") != one).any()


def test_network_b_uses_the_protocol_of_seam(tree):
    words = ["model.network=deeplab_v1_r38", "model.width=2", "model.blocks=[1,1,1,1]", "test.crf=auto"]
    config = configs.read(Config, tree / "config.yaml", words)
    save_run(tree / "b", config, 5)
    assert main(["--run", str(tree / "b"), "--device", "cpu"]) == 0
    report = json.loads((tree / "b" / "test" / "scores_crf.json").read_text())
    assert report["crf"] == "seam"
    assert report["protocol"]["scales"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert report["protocol"]["flip"] and report["protocol"]["average"] == "logits"
    flags = ["--run", str(tree / "b"), "--device", "cpu", "--out", str(tree / "other")]
    assert main([*flags, "--scales", "1.0", "--no_flip", "--crf", "r38_voc"]) == 0
    report = json.loads((tree / "other" / "scores_crf.json").read_text())
    assert report["protocol"]["scales"] == [1.0] and not report["protocol"]["flip"]


@pytest.mark.parametrize(("preset", "size", "tag"), [
    ("seam", (40, 56), ""), ("seam", (49, 33), ""),
    ("r38_voc", (40, 56), "voc12"), ("r38_coco", (40, 56), "coco"),
])  # fmt: skip
def test_crf_of_network_b_matches_golden(preset, size, tag):
    expected, prefix = golden("b_test"), "{}x{}_".format(*size)
    image = parity_image("r38:ms0" if size == (40, 56) else "r38:ms1", *size)
    probabilities = torch.from_numpy(expected[prefix + "mean_logits"]).softmax(0)
    computed = crf_labels(image, probabilities, preset)
    key = f"fork_{tag}_label" if tag else prefix + "label_crf"
    assert (computed != expected[key]).mean() <= 1e-3


def test_processes_and_resuming_do_not_change_the_files(tiny, tree, monkeypatch):
    more = ["--crf", "deeplab", "--save_logits", "float16"]
    assert tiny(*more, "--out", str(tree / "one")) == 0
    undisturbed = content(tree / "one")
    assert len(undisturbed) == 9

    def in_parts(run, step, names, num_workers):
        """Run the parts of several processes one after the other, each with its own copy of the step."""
        assert num_workers == 2
        parts = [part_of(names, i, num_workers) for i in range(num_workers)]
        copies = [pickle.loads(pickle.dumps((part, step))) for part in parts]
        return [drain(run_step(part, i, step), run.take) for i, (part, step) in enumerate(copies)]

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "map", in_parts)
        assert tiny(*more, "--out", str(tree / "two"), "--num_workers", "2") == 0
    assert content(tree / "two") == undisturbed
    for file in ("scores.json", "scores_crf.json"):
        assert summary(tree / "two" / file) == summary(tree / "one" / file)
    for lost in ("masks/im0.png", "masks_crf/im1.png", "logits/im2.npy"):
        (tree / "one" / lost).unlink()
    kept = {file: os.stat(tree / "one" / file).st_mtime_ns for file in content(tree / "one")}
    assert tiny(*more, "--out", str(tree / "one")) == 0
    assert content(tree / "one") == undisturbed
    assert kept == {file: os.stat(tree / "one" / file).st_mtime_ns for file in kept}


def test_finished_masks_are_scored_without_a_network(tiny, tree, monkeypatch):
    assert tiny() == 0
    before = summary(tree / "run" / "test" / "scores.json")
    monkeypatch.setattr(command_test, "Segmenter", None)
    assert tiny() == 0
    assert summary(tree / "run" / "test" / "scores.json") == before


def test_masks_have_the_same_scores_in_step_2a(tiny, tree):
    assert tiny() == 0
    _, benchmark = step_2a.benchmark_of(tree / "run" / "test" / "masks", None)
    assert benchmark.classes == ["one", "two", "three", "four"]
    job = step_2a.Evaluation(
        benchmark, str(tree / "run" / "test" / "masks"), str(tree / "truth"), "png", (None,)
    )
    assert step_2a.evaluate(job, list(SIZES), tree / "again.json") == 0
    assert summary(tree / "again.json") == summary(tree / "run" / "test" / "scores.json")


def test_crf_can_be_added_to_a_finished_test(tiny, tree):
    assert tiny() == 0
    first = content(tree / "run" / "test")
    assert tiny("--crf", "auto") == 0
    both = content(tree / "run" / "test")
    assert first.items() < both.items() and len(both) == 6


def test_other_settings_or_weights_are_an_error(tiny, tree):
    assert tiny("--crf", "deeplab") == 0
    with pytest.raises(ValueError, match="protocol"):
        tiny("--flip")
    with pytest.raises(ValueError, match="crf"):
        tiny("--crf", "deeplab_published")
    assert tiny("--crf", "deeplab_published", "--overwrite") == 0
    save_run(tree / "run", configs.read(Config, tree / "run" / "config.yaml"), 5, seed=1)
    with pytest.raises(ValueError, match="checkpoint"):
        tiny("--crf", "deeplab_published")


def test_another_image_folder_is_an_error(tiny, tree):
    assert tiny() == 0
    shutil.copytree(tree / "images", tree / "others")
    with pytest.raises(ValueError, match=f"images \\(was '{tree}/images', now '{tree}/others'\\)"):
        tiny("--img_root", str(tree / "others"))


def test_overwrite_removes_all_outputs_of_the_last_test(tiny, tree):
    out = tree / "run" / "test"
    assert tiny("--crf", "deeplab", "--save_logits", "float16", "--submission", "comp6") == 0
    (out / "notes.txt").touch()
    assert {file.name for file in out.iterdir()} == {
        "masks", "masks_crf", "logits", "scores.json", "scores_crf.json", "comp6_test_cls.tgz",
        "settings.json", "notes.txt",
    }  # fmt: skip
    before = content(out)
    (out / "masks_crf" / "more").mkdir()
    Image.new("L", (2, 2)).save(out / "masks_crf" / "more" / "own.png")
    with pytest.raises(ValueError, match="move this file"):
        tiny("--flip", "--overwrite")
    assert before.items() < content(out).items() and (out / "scores_crf.json").is_file()
    shutil.rmtree(out / "masks_crf" / "more")
    assert tiny("--flip", "--overwrite") == 0
    assert {file.name for file in out.iterdir()} == {"masks", "scores.json", "settings.json", "notes.txt"}


def test_overwrite_keeps_foreign_files(tiny, tree):
    out = tree / "out"
    foreign = [out / "masks_crf" / "a.png", out / "logits" / "a.npy", out / "comp6_test_cls.tgz"]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("foreign")
    (out / "logits" / "settings.json").write_text('{"step": "another"}')
    assert tiny("--out", str(out), "--overwrite") == 0
    assert all(file.read_text() == "foreign" for file in foreign)


def test_damaged_outputs_are_made_again(tiny, tree):
    flags = ["--crf", "deeplab", "--save_logits", "float32"]
    assert tiny(*flags) == 0
    out = tree / "run" / "test"
    whole, score = content(out), summary(out / "scores.json")
    for lost in ("masks/im0.png", "masks_crf/im1.png", "logits/im2.npy"):
        whole_file = (out / lost).read_bytes()
        (out / lost).write_bytes(whole_file[: len(whole_file) // 2])
    (out / "logits" / "im1.npy").write_bytes(b"")
    assert tiny(*flags) == 0
    assert content(out) == whole and summary(out / "scores.json") == score


def test_absent_classes_follow_the_policy(tiny, tree):
    truth = np.zeros((64, 64), np.uint8)
    truth[:32] = 3
    write_mask(tree / "truth" / "im2.png", truth, voc_palette())
    (tree / "one.txt").write_text("im2\n")
    for absent in ("drop", "zero", "nan-mean"):
        flags = ["--split_file", str(tree / "one.txt"), "--out", str(tree / absent), "--absent", absent]
        assert tiny(*flags) == 0
        hist = confusion(truth, read_mask(tree / absent / "masks" / "im2.png"), 5)
        expected = scores(hist, absent)["Mean IoU"]
        assert summary(tree / absent / "scores.json")[2] == pytest.approx(expected, abs=1e-12)
        assert json.loads((tree / absent / "scores.json").read_text())["absent"] == absent


def test_bad_files_are_skipped_and_listed(tiny, tree, capsys):
    """Each fault is listed with its file; the score is that of the one good image."""
    images, truth = tree / "images", tree / "truth"
    good = np.asarray(Image.open(images / "im2.png"))
    labels = read_mask(truth / "im2.png")
    wide = labels.copy()
    wide[5, 7] = 9
    bad = {
        "unreadable": "cannot be read",
        "no_image": "no image no_image",
        "no_mask": "no_mask.png does not exist",
        "other_size": "other_size.png is (63, 64) but its image is (64, 64)",
        "other_class": "has the value 9, expected one of the 5 class indices",
        "deep": "mode I;16",
        "rgb": "mode RGB",
    }
    for name in bad:
        Image.fromarray(good).save(images / f"{name}.png")
        write_mask(truth / f"{name}.png", labels, voc_palette())
    (images / "unreadable.png").write_bytes((images / "im2.png").read_bytes()[:1000])
    (images / "no_image.png").unlink()
    (truth / "no_mask.png").unlink()
    write_mask(truth / "other_size.png", labels[1:], voc_palette())
    write_mask(truth / "other_class.png", wide, voc_palette())
    Image.fromarray(labels.astype(np.uint16)).save(truth / "deep.png")
    Image.fromarray(good).save(truth / "rgb.png")
    (tree / "bad.txt").write_text("".join(f"{name}\n" for name in [*bad, "im2"]))
    assert tiny("--split_file", str(tree / "bad.txt"), "--submission", "comp6") == 1
    out = tree / "run" / "test"
    failed = dict(line.split("\t") for line in (out / "failed.txt").read_text().splitlines())
    assert failed.keys() == bad.keys()
    for name, message in bad.items():
        assert message in failed[name], failed[name]
    report = json.loads((out / "scores.json").read_text())
    assert report["images"] == 1 and sorted(report["failed"]) == sorted(bad)
    expected = scores(confusion(labels, read_mask(out / "masks" / "im2.png"), 5))
    assert report["best"]["Mean IoU"] == pytest.approx(expected["Mean IoU"], abs=1e-12)
    assert not [*out.glob("*.tgz")] and "no submission was packed" in capsys.readouterr().err


def test_ground_truth_of_0_and_255_is_an_error(tiny, tree):
    for name, (height, width) in SIZES.items():
        two_values = np.tile(np.uint8([0, 255]), (height, width // 2))
        write_mask(tree / "truth" / f"{name}.png", two_values, voc_palette())
    with pytest.raises(ValueError, match=r"truth have no pixel of a class: .* are 0, 255, but .*1\.\.4"):
        tiny()
    assert tiny("--no_scores") == 0


def test_images_whose_logits_are_not_finite_get_no_mask(tiny, tree):
    """The weights are finite, but the sum over the branches of the head is not."""
    state = torch.load(tree / "run" / "checkpoint_final.pth")
    for key in [key for key in state if "aspp" in key and key.endswith("bias")]:
        state[key].fill_(3e38)
    torch.save(state, tree / "run" / "checkpoint_final.pth")
    assert tiny() == 1
    out = tree / "run" / "test"
    failed = (out / "failed.txt").read_text().splitlines()
    assert failed and all("the network's output is not finite" in line for line in failed)
    assert not [*(out / "masks").glob("*.png")]


def test_mask_of_another_size_is_reported_for_a_finished_prediction(tiny, tree):
    assert tiny() == 0
    write_mask(tree / "truth" / "im1.png", np.zeros((50, 75), np.uint8), voc_palette())
    assert tiny() == 1
    assert "im1.png is (50, 75) but its image is (75, 50)" in (tree / "run/test/failed.txt").read_text()


@pytest.mark.parametrize(("flags", "competition", "folder"), [
    (["--submission", "comp6"], "comp6_test_cls", "masks"),
    (["--submission", "comp5", "--crf", "auto"], "comp5_test_cls", "masks_crf"),
])  # fmt: skip
def test_submission_requires_no_ground_truth(tiny, tree, flags, competition, folder):
    for file in (tree / "truth").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"mask of none of the 3 images: .* --no_scores"):
        tiny(*flags)
    (tree / "truth").rmdir()
    with pytest.raises(FileNotFoundError, match="truth does not exist"):
        tiny(*flags)
    assert tiny(*flags, "--no_scores") == 0
    out = tree / "run" / "test"
    assert not [*out.glob("scores*.json")]
    with tarfile.open(out / f"{competition}.tgz") as archive:
        assert archive.getnames() == [
            f"results/VOC2012/Segmentation/{competition}/{name}.png" for name in sorted(SIZES)
        ]
        for member, name in zip(archive.getmembers(), sorted(SIZES), strict=True):
            packed = archive.extractfile(member).read()
            assert packed == (out / folder / f"{name}.png").read_bytes()
            assert (member.uid, member.uname) == (0, "")


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_old_submission_is_removed_if_none_is_packed(tiny, tree, more):
    assert tiny("--submission", "comp6") == 0
    (tree / "truth" / "im1.png").unlink()
    assert tiny("--submission", "comp6", *more) == 1
    assert not [*tree.glob("run/test/*.tgz")]


def test_masks_have_the_voc_palette(tiny, tree):
    tiny()
    with Image.open(tree / "run" / "test" / "masks" / "im0.png") as mask:
        assert mask.mode == "P" and mask.size == (80, 60)
        assert mask.getpalette()[:9] == voc_palette()[:3].ravel().tolist()


def test_float16_logits_are_rounded_float32_logits(tiny, tree):
    for dtype in ("float32", "float16"):
        tiny("--save_logits", dtype, "--out", str(tree / dtype))
    full, half = (np.load(tree / dtype / "logits" / "im0.npy") for dtype in ("float32", "float16"))
    assert full.shape == (5, 8, 11)
    np.testing.assert_array_equal(full.astype(np.float16), half)


@pytest.mark.parametrize(("flags", "message"), [
    (["--save_logits", "float32", "--scales", "0.5"], "add 1.0"),
    (["model.width=8"], "does not fit the model"),
    (["test.crf=fancy"], "test.crf must be one of none, auto, "),
    (["test.scales=[]"], r"scales must be numbers above 0, got \[\]"),
    (["model.network=v9"], "deeplab_v2, deeplab_v1_r38"),
    (["--checkpoint", "nowhere.pth"], "nowhere.pth does not exist"),
    (["--img_root", "nowhere"], "image folder nowhere does not exist"),
    (["--device", "tpu"], "tpu"),
])  # fmt: skip
def test_user_errors_are_reported(tiny, tree, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        tiny(*flags)
    assert not [*tree.glob("run/test/**/*.png")]


def test_configuration_selects_protocol_and_crf():
    def configured(*words):
        return protocol_of(RECIPE, configs.read(Config, None, words))

    protocol, crf = configured("model.network=deeplab_v1_r38")
    assert protocol == RECIPE.network(configs.read(Config, None, ["model.network=deeplab_v1_r38"])).protocol
    assert crf is None
    protocol, crf = configured("test.scales=[0.5,1]", "test.flip=true", "test.crf=auto")
    assert (protocol.scales, protocol.flip, crf) == ((0.5, 1.0), True, "deeplab")
    protocol, crf = configured("model.network=deeplab_v1_r38", "test.flip=false", "test.crf=none")
    assert (protocol.flip, protocol.average, crf) == (False, "logits", None)
    for word, key in [("test.scales=[]", "scales"), ("test.scales=[0]", "scales"), ("test.crf=x", "crf")]:
        with pytest.raises(ValueError, match=key):
            configured(word)


def test_other_classes_and_missing_split_are_errors(tiny, tree):
    (tree / "three.yaml").write_text("{name: three, classes: [a, b], image_dir: images, mask_dir: truth}\n")
    with pytest.raises(ValueError, match="trained for 5 classes, background included, the model has 3"):
        tiny(f"data.benchmark={tree}/three.yaml")
    with pytest.raises(ValueError, match="--split_file"):
        tiny("data.val_split=''")


def test_run_folder_is_required(tmp_path):
    with pytest.raises(ValueError, match="--run DIR"):
        main(["--out", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main(["--run", str(tmp_path / "nowhere")])


def test_user_error_exits_with_code_2_and_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["test", "--run", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stopped:
        runs.command(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("command", "before"), [(main, []), (predict, ["{tree}/images"])])
def test_only_rank_0_prints_a_user_error(command, before, tiny, tree):
    flags = [*(word.format(tree=tree) for word in before), "--run", str(tree / "run"), "--device", "cpu"]
    flags += ["--out", str(tree / "run")]
    (tree / "run" / "settings.json").write_text('{"step": "deeplab.train"}')
    other_step = "contains the outputs of step deeplab.train"
    for more, message in [(["test.crf=fancy"], "error: test.crf=fancy: test.crf must be"), ([], other_step)]:
        started = processes.ranks(runs.command, partial(command, [*flags, *more]))
        (code, printed, _), (other, silent, _) = [process.end() for process in started]
        assert (code, other, silent) == (2, 1, "")
        assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("command", [main, predict])
def test_torchrun_passes_all_flags_to_the_command(command, capsys):
    """torchrun rejects prefixes of its own flags, even after the script: --run has the alias --run_dir."""
    with pytest.raises(SystemExit):
        command(["--help"])
    flags = set(re.findall(r"--[a-z_-]+", capsys.readouterr().out))
    torchrun_flags = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    rejected = {flag for flag in flags if any(other.startswith(flag) for other in torchrun_flags)}
    assert "--run_dir" in flags and rejected == {"--run", "--help"}
