"""eval_cam.py and eval_cam_with_crf.py on the command line, with the five golden VOC images."""

import json
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

import voc12
from pipeline.evaluate import Evaluation
from pipeline.masks import MaskStep, crf_posterior
from pipeline.processes import drain
from pipeline.step import run_step
from refinement.densecrf import PRESETS
from segmentation import camfile
from segmentation.masks import read_mask, write_mask
from tests.camfiles import write_cams
from tests.conftest import CASES, golden, parity_image
from tests.processes import Command, here

VOC_CASES = "abcez"


def script(name, *arguments, code=0):
    """Run a script and return its stdout and stderr."""
    ended, output, errors = here(name, *arguments)
    assert ended == code, output + errors
    assert "Traceback" not in errors
    return output, errors


@pytest.fixture(scope="module")
def arrays():
    return golden("e2e")


@pytest.fixture(scope="module")
def data(arrays, tmp_path_factory):
    """Folder with CAM files in both formats as step 1 writes them, images, ground truth and a split file."""
    root = tmp_path_factory.mktemp("voc")
    (root / "images").mkdir()
    for case in VOC_CASES:
        image, size, *_ = CASES[case]
        stored = golden(f"case_{case}")
        maps = {"attn_highres": stored["attn_highres"].astype(np.float32)}
        for format in camfile.FORMATS:
            write_cams(root / format, image, stored["keys"], maps, size, format)
        parity_image(image, size).save(root / "images" / f"{image}.png")
        write_mask(root / "truth" / f"{image}.png", arrays[f"gt_{case}"], voc12.BENCHMARK.palette)
    (root / "full" / "settings.json").write_text('{"settings": {"benchmark": "voc12"}}')
    (root / "split.txt").write_text("".join(f"{CASES[case][0]}\n" for case in VOC_CASES))
    return root


def test_every_pixel_is_where_the_golden_vectors_have_it(arrays, data):
    names = [CASES[case][0] for case in VOC_CASES]
    cams, truth = str(data / "full"), str(data / "truth")
    hists, _ = drain(run_step(names, 0, Evaluation(voc12.BENCHMARK, cams, truth)), lambda outcome: None)
    assert (hists == np.stack([arrays["cam_thr1_hist"], arrays["cam_thr2_hist"]])).all()
    step = MaskStep(voc12.BENCHMARK, cams, str(data / "images"), output=None, gt_root=truth)
    hist, _ = drain(run_step(names, 0, step), lambda outcome: None)
    assert (hist == arrays["crf_hist"]).all()


@pytest.mark.parametrize(
    "format, folder, extra",
    [
        ("full", "--cam_dir", []),
        ("full", "--cam_dir", ["--benchmark", "voc12"]),
        ("compact", "--cam_out_dir", ["--dataset", "voc12", "--num_workers", 2]),  # reference flags
    ],
)
def test_eval_cam_reproduces_golden_scores(arrays, data, tmp_path, format, folder, extra):
    common = ["--split_file", data / "split.txt", "--gt_root", data / "truth", "--json", tmp_path / "s.json"]
    output, errors = script("eval_cam.py", folder, data / format, *common, *extra)
    tried = json.loads((tmp_path / "s.json").read_text())["all"]
    for exponent, scores in zip((1, 2), tried, strict=True):
        expected = float(arrays[f"cam_thr{exponent}_miou"])
        assert scores["background"] == exponent and abs(scores["Mean IoU"] - expected) < 1e-12
        names = ("Pixel Accuracy", "Mean Accuracy", "Frequency Weighted IoU", "Mean IoU")
        np.testing.assert_allclose(
            [scores[name] for name in names], arrays[f"cam_thr{exponent}_summary"], atol=1e-12
        )
    assert output.splitlines()[0].startswith("background")
    assert "5 images, 0 failed" in errors


def test_eval_only_reproduces_the_golden_score(arrays, data, tmp_path):
    script(
        *(
            "eval_cam_with_crf.py",
            "--cam_dir",
            data / "full",
            "--eval_only",
            "--image_root",
            data / "images",
        ),
        *("--split_file", data / "split.txt", "--gt_root", data / "truth", "--json", tmp_path / "s.json"),
    )
    scores = json.loads((tmp_path / "s.json").read_text())["best"]
    assert abs(scores["Mean IoU"] - float(arrays["crf_miou"])) < 1e-12


def test_eval_cam_with_crf_reproduces_golden_masks(arrays, data, tmp_path):
    """With the flags of the reference scripts only."""
    masks = tmp_path / "masks"
    common = ["--split_file", data / "split.txt", "--image_root", data / "images"]
    for format, workers in (("full", 1), ("compact", 3)):
        out = masks / format
        script(
            *("eval_cam_with_crf.py", "--cam_out_dir", data / format, "--dataset", "voc12", *common),
            *("--pseudo_mask_save_path", out, "--num_workers", workers, "--cam_eval_thres", 2),
        )
        for case in VOC_CASES:
            assert (read_mask(out / f"{CASES[case][0]}.png") == arrays[f"pseudo_{case}"]).all()
    full, compact = (
        {file.name: file.read_bytes() for file in (masks / f).glob("*.png")} for f in camfile.FORMATS
    )
    assert full == compact and len(full) == 5

    # The mask folder records its benchmark. Pixels of 255 are left out of the evaluation.
    split = ["--split_file", data / "split.txt", "--gt_root", data / "truth"]
    output, _ = script("eval_cam.py", "--cam_out_dir", masks / "full", "--cam_type", "png", *split)
    assert "predicted 255" in output


def in_process(name, monkeypatch, *arguments):
    """Run a script's main in this process, which is faster than a new one."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    assert import_module(name).main() == 0


@pytest.mark.parametrize(
    "flag, value, change",
    [
        ("--crf_image", "raw", {"crf_image": "raw"}),
        ("--crf_unary", "float32", {"crf_unary": "float32"}),
        ("--confidence", "0.7", {"confidence": 0.7}),
        ("--preset", "cls_seg", {"confidence": 0.0}),
    ],
)
def test_flags_of_the_crf_change_its_settings_and_output(data, monkeypatch, flag, value, change):
    steps = []

    def take(step, *rest, **options):
        steps.append(step)
        return 0

    monkeypatch.setattr("eval_cam_with_crf.make_masks", take)
    common = ["--cam_dir", data / "full", "--split_file", data / "split.txt"]
    common += ["--output", data / "masks"]
    in_process("eval_cam_with_crf", monkeypatch, *common)
    in_process("eval_cam_with_crf", monkeypatch, *common, flag, value)
    default, changed = steps
    assert default.settings.crf == PRESETS["clip_es"] and default.settings.crf_backend == "numba"
    assert changed == replace(default, settings=replace(default.settings, **change)) != default
    in_process("eval_cam_with_crf", monkeypatch, *common, "--preset", "cls_seg", "--confidence", "0.95")
    assert steps.pop() == default  # flags take precedence over the preset

    ramp = np.linspace(0, 0.9, 40, dtype=np.float32) + np.zeros((30, 1), np.float32)  # (30, 40)
    noise = np.random.default_rng(0).normal(0, 15, (30, 40, 3))
    image = np.clip(255 * ramp[..., None] + noise, 0, 255).astype(np.uint8)
    maps = np.stack([ramp, ramp[:, ::-1]]).astype(np.float16)
    confident = []
    for step in steps:
        posterior = crf_posterior(image, maps, step.settings, add_background=True).max(0)
        confident.append(np.where(posterior < step.settings.confidence, 0, posterior))
    assert np.abs(confident[0] - confident[1]).max() > 1e-4


def test_arithmetic_changes_the_scores(tmp_path, monkeypatch):
    tie = np.array([[[0.38208008, 0.5]]], np.float16)  # the first equals (1 - x)^2 after rounding to float16
    np.save(tmp_path / "a.npy", {"keys": np.array([0]), "attn_highres": tie}, allow_pickle=True)
    write_mask(tmp_path / "truth" / "a.png", np.ones((1, 2), np.uint8), voc12.BENCHMARK.palette)
    (tmp_path / "split.txt").write_text("a\n")
    common = ["--cam_dir", tmp_path, "--benchmark", "voc12", "--split_file", tmp_path / "split.txt"]
    common += ["--gt_root", tmp_path / "truth", "--json", tmp_path / "s.json"]
    accuracy = {}
    for flags in ((), ("--arithmetic", "float16"), ("--arithmetic", "float32")):
        in_process("eval_cam", monkeypatch, *common, *flags)
        report = json.loads((tmp_path / "s.json").read_text())
        assert report["arithmetic"] == (flags[-1] if flags else "float16")
        accuracy[flags[1:]] = report["all"][1]["Pixel Accuracy"]
    assert accuracy == {(): 0.5, ("float16",): 0.5, ("float32",): 1.0}


def test_usage_errors_print_one_line_and_exit_with_code_2(data, tmp_path):
    split = ["--split_file", data / "split.txt", "--gt_root", data / "truth"]
    errors = script("eval_cam.py", "--cam_dir", data / "compact", *split, code=2)[1]
    assert errors.startswith("error: ") and "--benchmark" in errors and errors.count("\n") == 1
    errors = script(
        "eval_cam.py", "--cam_dir", data / "nowhere", "--benchmark", "voc12", *split, code=2
    )[1]
    assert errors.startswith("error: ") and "nowhere" in errors and errors.count("\n") == 1
    common = ["--image_root", data / "images", "--split_file", data / "split.txt", "--overwrite"]
    errors = script(
        *("eval_cam_with_crf.py", "--cam_dir", data / "full", *common),
        *("--output", data / "full"),
        code=2,
    )[1]
    assert "full is the folder of the CAMs" in errors and errors.count("\n") == 1
    errors = script("eval_cam_with_crf.py", "--cam_dir", data / "full", code=2)[1]
    assert "--output" in errors
    errors = script(
        *("eval_cam_with_crf.py", "--cam_dir", data / "full", "--image_root", data / "images"),
        *("--split_file", data / "split.txt", "--output", data / "truth"),
        code=2,
    )[1]
    assert "settings.json" in errors and len(list((data / "truth").iterdir())) == 5  # nothing was removed


def test_help_lists_the_flags():
    code, output = Command("eval_cam.py", "--help").end()  # in a new process
    assert code == 0 and "--cam_eval_thres" in output
    assert "--confidence" in script("eval_cam_with_crf.py", "--help")[0]
