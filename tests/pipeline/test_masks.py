"""Step 2b equals the golden vectors; resuming, several processes, unusual and damaged images."""

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import voc12
from pipeline.masks import MaskInput, MaskSettings, MaskStep, crf_posterior, make_masks
from pipeline.processes import drain
from pipeline.run import read_settings
from pipeline.step import run_step
from segmentation.masks import read_mask, write_mask
from segmentation.metrics import scores
from tests.camfiles import write_cams
from tests.conftest import golden, parity_image

NAMES = ["es_crf0", "es_crf1", "es_crf2"]


@pytest.fixture(scope="module")
def arrays():
    return golden("crf")


@pytest.fixture
def step(arrays, tmp_path):
    for index, name in enumerate(NAMES):
        maps = arrays[f"cams{index}"]
        grid = {"attn_highres": maps.astype(np.float32)}
        write_cams(tmp_path / "cams", name, arrays[f"keys{index}"], grid, maps.shape[1:])
        write_mask(tmp_path / "truth" / f"{name}.png", arrays[f"gt{index}"], voc12.BENCHMARK.palette)
        (tmp_path / "images").mkdir(exist_ok=True)
        parity_image(name, maps.shape[1:]).save(tmp_path / "images" / f"{name}.png")
    cams, images, masks = (str(tmp_path / folder) for folder in ("cams", "images", "masks"))
    return MaskStep(voc12.BENCHMARK, cams, images, masks)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.png")}


def test_golden_masks_without_ground_truth(arrays, step, tmp_path, capsys):
    assert make_masks(step, NAMES, "voc12") == 0
    for index, name in enumerate(NAMES):
        assert (read_mask(tmp_path / "masks" / f"{name}.png") == arrays[f"pseudo{index}"]).all()
    assert capsys.readouterr().out == ""  # no scores without ground truth


def test_golden_scores(arrays, step, tmp_path):
    step = replace(step, output=None, gt_root=str(tmp_path / "truth"))
    (hist,), pixels = drain(run_step(NAMES, 0, step), lambda outcome: None)
    assert (hist == arrays["eval_hist"]).all() and pixels.tolist() == [0, hist.sum()]
    assert scores(hist)["Mean IoU"] == pytest.approx(arrays["eval_miou"], abs=1e-12)
    assert not (tmp_path / "masks").exists()


def test_processes_and_resuming_give_the_same_bytes(step, tmp_path):
    assert make_masks(step, NAMES, "voc12") == 0
    undisturbed = content(tmp_path / "masks")
    assert len(undisturbed) == 3
    for part, done in (("three", []), ("two", NAMES[:2])):
        other = replace(step, output=str(tmp_path / part))
        if done:
            make_masks(other, done, "voc12")
        before = {name: os.stat(tmp_path / part / f"{name}.png").st_mtime_ns for name in done}
        assert make_masks(other, NAMES, "voc12", num_workers=3) == 0
        assert content(tmp_path / part) == undisturbed and not list((tmp_path / part).glob("*.tmp"))
        assert before == {name: os.stat(tmp_path / part / f"{name}.png").st_mtime_ns for name in done}


def test_written_masks_are_scored_where_ground_truth_exists(arrays, step, tmp_path, capsys):
    (tmp_path / "truth" / f"{NAMES[1]}.png").unlink()
    step = replace(step, gt_root=str(tmp_path / "truth"))
    first, second = ((make_masks(step, NAMES, "voc12"), capsys.readouterr()) for _ in range(2))
    assert first == second  # existing masks are scored as well
    assert "images without ground truth: 1 (es_crf1)" in first[1].err and "predicted 255" in first[1].out
    assert len(content(tmp_path / "masks")) == 3


def test_a_failed_image_is_listed_and_retried(step, tmp_path):
    file = tmp_path / "images" / f"{NAMES[1]}.png"
    whole = file.read_bytes()
    Image.new("RGB", (7, 5)).save(file)
    assert make_masks(step, NAMES, "voc12", num_workers=2) == 1
    failed = tmp_path / "masks" / "failed.txt"
    assert failed.read_text().startswith(f"{NAMES[1]}\t")
    assert "has CAMs of an image of size (75, 53) (H, W), expected (5, 7)" in failed.read_text()
    assert len(content(tmp_path / "masks")) == 2
    file.write_bytes(whole)
    assert make_masks(step, NAMES, "voc12") == 0
    assert len(content(tmp_path / "masks")) == 3 and not failed.exists()


def test_masks_of_other_settings_or_cams_are_refused(arrays, step, tmp_path):
    make_masks(step, NAMES, "voc12")
    assert read_settings(tmp_path / "masks")["step"] == "masks"
    with pytest.raises(ValueError, match=r"confidence \(was 0.95, now 0.9\)"):
        make_masks(replace(step, settings=MaskSettings(confidence=0.9)), NAMES, "voc12")
    (tmp_path / "cams" / "settings.json").write_text('{"settings": {"refine": "mhsa"}}')
    with pytest.raises(ValueError, match="cams"):
        make_masks(step, NAMES, "voc12")
    every_pixel = replace(step, settings=MaskSettings(confidence=0.0))
    assert make_masks(every_pixel, NAMES, "voc12", overwrite=True) == 0
    assert not any((read_mask(tmp_path / "masks" / f"{name}.png") == 255).any() for name in NAMES)


def test_the_folder_of_the_cams_is_refused_as_output(step, tmp_path):
    (tmp_path / "cams" / "mine.png").touch()
    before = {file: file.read_bytes() for file in (tmp_path / "cams").iterdir()}
    for output in (tmp_path / "cams", tmp_path / "images" / ".." / "cams"):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="cams is the folder of the CAMs: give another --output"):
                make_masks(replace(step, output=str(output)), NAMES, "voc12", overwrite=overwrite)
    assert before == {file: file.read_bytes() for file in (tmp_path / "cams").iterdir()}


def test_missing_files_raise_an_error_with_a_cure(step, tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks the CAMs of 1 of 4 images: nowhere"):
        make_masks(step, [*NAMES, "nowhere"], "voc12")
    with pytest.raises(FileNotFoundError, match="give --image_root"):
        make_masks(replace(step, image_root=str(tmp_path / "none")), NAMES, "voc12")
    with pytest.raises(FileNotFoundError, match="--gt_root"):
        make_masks(replace(step, gt_root=str(tmp_path / "none")), NAMES, "voc12")
    assert make_masks(step, [*NAMES, "nowhere"], "voc12", allow_missing=True) == 0


def labels_of(image, class_ids, cams, step) -> np.ndarray:
    """Return the mask of one image, as step 2b computes it without an output folder."""
    step.start(0)
    return step.compute([MaskInput("any", image.shape[:2], class_ids, image, cams)])[0]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 20), st.integers(1, 7), st.integers(1, 7), st.booleans(), st.integers(0, 2**31))
def test_masks_of_any_shape_contain_only_given_labels(labels, height, width, zero, seed):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    cams = (random.random((labels, height, width)) * (not zero)).astype(np.float16)
    class_ids = random.permutation(20)[:labels]
    mask = labels_of(image, class_ids, cams, MaskStep(voc12.BENCHMARK, "", "", None))
    posterior = crf_posterior(image, cams, MaskSettings().on("cpu"), add_background=True)
    assert posterior.shape == (1 + labels, height, width)
    assert mask.shape == (height, width) and mask.dtype == np.uint8
    assert set(mask.ravel()) <= {0, *(class_ids + 1)}
    if zero:
        assert not mask.any()


def test_benchmarks_without_background_and_cams_with_background():
    image = np.zeros((2, 3, 3), np.uint8)
    maps = np.stack([np.full((2, 3), 0.2), np.full((2, 3), 0.9)]).astype(np.float16)
    stuff = MaskStep(replace(voc12.BENCHMARK, has_background=False), "", "", None)
    assert (labels_of(image, np.array([3, 0]), maps, stuff) == 0).all()
    own = MaskStep(voc12.BENCHMARK, "", "", None, cam_type="bg_score")
    assert (labels_of(image, np.array([3]), maps, own) == 4).all()
    with pytest.raises(ValueError, match=r"contains class 20, but voc12 has the classes 0\.\.19"):
        labels_of(image, np.array([20, 0]), maps, MaskStep(voc12.BENCHMARK, "", "", None))


def test_the_record_names_the_resolved_backend(step, tmp_path):
    assert step.settings.crf_backend == "auto"
    make_masks(step, NAMES, "voc12")
    assert read_settings(tmp_path / "masks")["info"] == {"crf_backend": "numba"}
