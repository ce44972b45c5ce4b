"""Step 2a against the golden vectors, and where files are odd, missing or wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coco14
import voc12
from pipeline.evaluate import (
    Evaluation,
    background,
    backgrounds,
    benchmark_of,
    evaluate,
    evaluate_images,
    predictions,
    present,
)
from pipeline.processes import drain
from segmentation import camfile
from segmentation.masks import write_mask
from tests.conftest import golden

PALETTE = voc12.BENCHMARK.palette
BENCHMARKS = {"voc": voc12.BENCHMARK, "coco": coco14.BENCHMARK}


@pytest.fixture(scope="module")
def arrays():
    return golden("eval_cam")


@pytest.fixture(scope="module")
def folders(arrays, tmp_path_factory):
    """CAM files and ground truth of the five golden images."""
    root = tmp_path_factory.mktemp("eval")
    for index in range(5):
        maps = arrays[f"cams{index}"]
        grid = {"attn_highres": maps.astype(np.float32)}
        format = "full" if index % 2 else "compact"
        camfile.write(root / "cams", str(index), arrays[f"keys{index}"], grid, maps.shape[1:], format)
        write_mask(root / "truth" / f"{index}.png", arrays[f"gt{index}"], PALETTE)
    return root


def count(evaluation, names="01234"):
    outcomes = []
    hists, pixels = drain(evaluate_images(list(names), 0, evaluation), outcomes.append)
    return hists, pixels, outcomes


@pytest.mark.parametrize("dataset", ["voc", "coco"])
def test_golden_histograms_of_all_backgrounds_in_one_pass(arrays, folders, dataset):
    tried = (1.0, 2.0, 3.0, 0.05, 0.3, 0.45)
    evaluation = Evaluation(
        BENCHMARKS[dataset], str(folders / "cams"), str(folders / "truth"), backgrounds=tried
    )
    hists, pixels, outcomes = count(evaluation)
    assert not any(outcome.failure for outcome in outcomes)
    for score, hist in zip(tried, hists, strict=True):
        assert (hist == arrays[f"{dataset}_thr{score:g}_hist"]).all(), score
        assert hist.sum() == pixels[1]
    assert pixels[0] == 0
    for index in (0, 4):
        found = predictions(arrays[f"keys{index}"], arrays[f"cams{index}"], evaluation)
        for score, prediction in zip(tried, found, strict=True):
            if score in (1, 0.3):
                assert (prediction == arrays[f"{dataset}_thr{score:g}_pred{index}"]).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 20),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.sampled_from(["zero", "coarse", "any"]),
)
def test_predictions_are_the_argmax_of_the_stacked_channels(labels, height, width, seed, kind):
    random = np.random.default_rng(seed)
    maps = random.random((labels, height, width))
    maps = {"zero": 0 * maps, "coarse": np.round(maps * 4) / 4, "any": maps}[kind].astype(np.float16)
    keys = random.permutation(20)[:labels]
    tried = (1.0, 2.0, 7.0, 0.05, 0.5)
    found = predictions(keys, maps, Evaluation(voc12.BENCHMARK, "", "", backgrounds=tried))
    for score, prediction in zip(tried, found, strict=True):
        top = maps.max(axis=0, initial=0)
        rest = np.power(1 - top, np.float16(score)) if score >= 1 else np.full_like(top, score)
        expected = np.append(0, keys + 1)[np.concatenate([rest[None], maps]).argmax(axis=0)]
        assert (prediction == expected).all()


def test_float32_arithmetic_does_not_round():
    top = np.array([0.2], np.float16)
    assert background(top, 2, "float32")[0] == np.float32(1 - np.float32(top[0])) ** 2
    assert background(top, 2)[0].dtype == np.float16


def test_search_lists():
    assert backgrounds(2, "attn_highres") == (1, 2)
    assert backgrounds(1, "highres") == tuple(range(1, 11))
    constants = backgrounds(0.3, "attn_highres")
    assert len(constants) == 12 and constants[0] == 0.05 and constants[-1] == 0.6
    assert backgrounds(2, "png") == backgrounds(2, "attn_bg") == backgrounds(2, "attn", False) == (None,)


def test_maps_with_their_own_background_and_benchmarks_without_one():
    maps = np.array([[[0.5, 0.1]], [[0.5, 0.2]]], np.float16)
    own = Evaluation(voc12.BENCHMARK, "", "", "bg_score", (None,))
    assert next(predictions(np.array([6]), maps, own)).tolist() == [[0, 7]]
    stuff = replace(voc12.BENCHMARK, has_background=False)
    none = Evaluation(stuff, "", "", "attn_highres", (None,))
    assert next(predictions(np.array([6, 2]), maps, none)).tolist() == [[6, 2]]
    assert next(predictions(np.array([], int), maps[:0], none)).tolist() == [[255, 255]]


def test_masks_are_evaluated_without_their_pixels_of_255(arrays, tmp_path, capsys):
    truth = arrays["gt0"]
    unsure = truth.copy()
    unsure[: len(truth) // 2] = 255
    for index, mask in enumerate((truth, unsure, np.full_like(truth, 255))):
        write_mask(tmp_path / "masks" / f"{index}.png", mask, PALETTE)
        write_mask(tmp_path / "truth" / f"{index}.png", truth, PALETTE)
    evaluation = Evaluation(voc12.BENCHMARK, str(tmp_path / "masks"), str(tmp_path / "truth"), "png", (None,))
    assert evaluate(evaluation, ["0", "1", "2"], tmp_path / "scores.json") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    known = truth < 21
    share = (known.sum() + known[: len(truth) // 2].sum()) / (3 * known.sum())
    assert scores["best"]["Mean IoU"] == 1.0 and abs(scores["ignored"] - share) < 1e-12
    assert "predicted 255" in capsys.readouterr().out


def test_table_and_json(arrays, folders, tmp_path, capsys):
    evaluation = Evaluation(voc12.BENCHMARK, str(folders / "cams"), str(folders / "truth"))
    assert evaluate(evaluation, list("01234"), tmp_path / "one.json") == 0
    out = capsys.readouterr().out
    best = max(arrays["voc_thr1_miou"], arrays["voc_thr2_miou"])
    assert f"{best:.4f}" in next(line for line in out.splitlines() if " best " in line)
    scores = json.loads((tmp_path / "one.json").read_text())
    assert scores["best"]["Mean IoU"] == pytest.approx(best, abs=1e-12) and len(scores["all"]) == 2
    assert set(scores["best"]["Class IoU"]) == {"background", *voc12.CLASSES}
    assert None in scores["best"]["Class IoU"].values()  # NaN is no JSON
    assert evaluate(evaluation, list("01234"), tmp_path / "three.json", num_workers=3) == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "three.json").read_bytes()


def test_one_bad_image_is_left_out_and_reported(arrays, folders, tmp_path, capsys):
    for index in range(5):
        write_mask(tmp_path / f"{index}.png", arrays[f"gt{index}"], PALETTE)
    write_mask(tmp_path / "2.png", arrays["gt2"].T, PALETTE)
    (tmp_path / "3.png").write_bytes(b"no mask")
    evaluation = Evaluation(voc12.BENCHMARK, str(folders / "cams"), str(tmp_path))
    hists, _, outcomes = count(evaluation)
    assert (hists == count(evaluation, "014")[0]).all()
    assert "(32, 48) but the prediction (48, 32)" in outcomes[2].failure
    assert "3.png cannot be read" in outcomes[3].failure
    assert evaluate(evaluation, list("01234"), tmp_path / "s.json") == 1
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["images"] == 3 and scores["failed"] == ["2", "3"]
    assert "5 images, 2 failed" in capsys.readouterr().err


def test_missing_files_are_an_error_unless_allowed(folders, tmp_path, capsys):
    evaluation = Evaluation(voc12.BENCHMARK, str(folders / "cams"), str(folders / "truth"))
    names = [*"01234", *"abcdefg"]
    told = r"lacks the CAMs of 7 of 12 images: a, b, c, d, e, \.\.\. \(images without labels have none\);"
    with pytest.raises(FileNotFoundError, match=told):
        evaluate(evaluation, names)
    with pytest.raises(FileNotFoundError, match="lacks the ground-truth masks of 1 of 1 images: a; make"):
        present(["a"], folders / "truth", False, "ground-truth masks")
    assert evaluate(evaluation, names, tmp_path / "s.json", allow_missing=True) == 0
    assert json.loads((tmp_path / "s.json").read_text())["missing"] == list("abcdefg")
    with pytest.raises(FileNotFoundError, match="lacks the CAMs of 1 of 1"):
        evaluate(evaluation, ["a"], allow_missing=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        present(names, tmp_path / "nowhere", True, "CAMs")


def test_the_benchmark_is_given_or_recorded(tmp_path):
    with pytest.raises(ValueError, match="give --dataset"):
        benchmark_of(tmp_path, None)
    (tmp_path / "settings.json").write_text('{"settings": {"benchmark": 3}}')
    with pytest.raises(ValueError, match="give --dataset"):
        benchmark_of(tmp_path, None)
    (tmp_path / "settings.json").write_text('{"settings": {"benchmark": "coco14"}}')
    assert benchmark_of(tmp_path, None)[1] is coco14.BENCHMARK
    assert benchmark_of(tmp_path, "voc12") == ("voc12", voc12.BENCHMARK)
