"""Step 2a equals the golden vectors; unusual, missing and damaged files."""

import json
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coco14
import cocostuff
import voc12
from cocostuff.prepare import convert
from pipeline.evaluate import (
    Evaluation,
    background,
    backgrounds,
    benchmark_of,
    benchmark_scores,
    count_cams,
    evaluate,
    files_present,
)
from pipeline.masks import MaskSettings, MaskStep, make_masks
from pipeline.processes import drain
from pipeline.step import run_step
from segmentation import camfile
from segmentation.benchmark import Benchmark
from segmentation.masks import read_mask, write_mask
from segmentation.metrics import confusion, scores
from tests.camfiles import write_cams
from tests.conftest import golden, parity_image

PALETTE = voc12.BENCHMARK.palette
BENCHMARKS = {"voc": voc12.BENCHMARK, "coco": coco14.BENCHMARK}


@pytest.fixture(scope="module")
def arrays():
    return golden("eval_cam")


@pytest.fixture(scope="module")
def folders(arrays, tmp_path_factory):
    """Folder with the CAM files and ground truth of the five golden images."""
    root = tmp_path_factory.mktemp("eval")
    for index in range(5):
        maps = arrays[f"cams{index}"]
        grid = {"attn_highres": maps.astype(np.float32)}
        format = "full" if index % 2 else "compact"
        write_cams(root / "cams", str(index), arrays[f"keys{index}"], grid, maps.shape[1:], format)
        write_mask(root / "truth" / f"{index}.png", arrays[f"gt{index}"], PALETTE)
    return root


def count(evaluation, names="01234"):
    outcomes = []
    hists, pixels = drain(run_step(list(names), 0, evaluation), outcomes.append)
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
        for score, prediction in zip(
            tried, slow_predictions(arrays[f"keys{index}"], arrays[f"cams{index}"], evaluation), strict=True
        ):
            if score in (1, 0.3):
                assert (prediction == arrays[f"{dataset}_thr{score:g}_pred{index}"]).all()


def slow_predictions(keys, maps, evaluation):
    """Return the index predictions for each background score, computed slowly by argmax over all channels."""
    offset = int(evaluation.benchmark.has_background)
    indices = keys + offset
    if "bg" in evaluation.cam_type:
        indices = np.append(0, indices)
    if not len(maps):
        return [np.full(maps.shape[1:], 0 if offset else 255)] * len(evaluation.backgrounds)
    if evaluation.arithmetic == "float32":
        maps = maps.astype(np.float32)
    predictions = []
    for score in evaluation.backgrounds:
        channels, values = maps, indices
        if score is not None:
            top = maps.max(axis=0)
            rest = background(top, score, evaluation.arithmetic)
            rest[np.isnan(rest)] = -np.inf  # NaN never wins
            channels, values = np.concatenate([rest[None], maps]), np.append(0, indices)
        predictions.append(values[channels.argmax(axis=0)])
    return predictions


def slow_counts(truth, keys, maps, evaluation):
    """Return the counts of `count_cams`, computed from `slow_predictions`."""
    channels = evaluation.benchmark.channels
    predictions = slow_predictions(keys, maps, evaluation)
    hists = np.stack([confusion(truth, prediction, channels) for prediction in predictions])
    return hists, int((predictions[0][truth < channels] == 255).sum())


def same(counts, expected):
    assert counts[0].dtype == expected[0].dtype and counts[0].shape == expected[0].shape
    assert (counts[0] == expected[0]).all() and counts[1] == expected[1]


KINDS = {
    "zero": lambda maps: 0 * maps,
    "ties": lambda maps: np.round(maps * 4) / 4,
    "cams": lambda maps: maps,
    "negative": lambda maps: maps - 0.5,
    "large": lambda maps: (maps - 0.3) * 1e5,  # up to infinity
    "nan": lambda maps: np.where(maps > 0.7, np.nan, np.round(maps * 4) / 4 - 0.25),
}
WITHOUT = replace(voc12.BENCHMARK, has_background=False)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 19),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.sampled_from(list(KINDS)),
    st.sampled_from(["float16", "float32"]),
    st.sampled_from(
        [
            (voc12.BENCHMARK, "attn_highres", (1.0, 2.0)),
            (voc12.BENCHMARK, "attn_highres", (0.3, 7.0, 0.05, 2.0, 2.0, 1.5)),
            (voc12.BENCHMARK, "attn_highres", backgrounds(0.3, "attn_highres")),
            (coco14.BENCHMARK, "highres", backgrounds(2, "highres")),
            (voc12.BENCHMARK, "bg_score", (None,)),
            (WITHOUT, "attn_highres", (None,)),
        ]
    ),
)
def test_count_cams_equals_the_slow_counts(labels, height, width, seed, kind, arithmetic, case):
    random = np.random.default_rng(seed)
    benchmark, cam_type, tried = case
    maps = KINDS[kind](random.random((labels + (cam_type == "bg_score"), height, width)))
    maps = maps.astype(np.float16)
    keys = random.permutation(20)[:labels]
    truth = random.integers(0, benchmark.channels + 3, (height, width)).astype(np.uint8)
    evaluation = Evaluation(benchmark, "", "", cam_type, tried, arithmetic)
    same(count_cams(truth, keys, maps, evaluation), slow_counts(truth, keys, maps, evaluation))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("arithmetic", ["float16", "float32"])
@pytest.mark.parametrize("tried", [*[backgrounds(*list_) for list_ in ((2, "a"), (0.3, "a"))], (1.5, 2.0)])
def test_every_float16_number_is_counted_correctly(arithmetic, tried):
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1, 256, 256)
    evaluation = Evaluation(voc12.BENCHMARK, "", "", "attn_highres", tried, arithmetic)
    keys = np.array([4])
    for row in range(0, 256, 8):  # so that errors do not cancel out
        truth = np.full((256, 256), 255, np.uint8)
        truth[row : row + 8] = np.arange(256) % 21
        same(count_cams(truth, keys, numbers, evaluation), slow_counts(truth, keys, numbers, evaluation))
    cams = np.sort(numbers[(numbers >= 0) & (numbers <= 1)])
    for prediction in slow_predictions(keys, cams[None, None], evaluation):
        assert (np.diff(prediction[0]) >= 0).all()  # in [0, 1] the prediction is a threshold


@pytest.mark.parametrize("arithmetic", ["float16", "float32"])
@pytest.mark.parametrize("tried", [(1.0, 2.0), backgrounds(0.3, "attn"), (None,)])
def test_float32_cams_count_as_if_rounded_to_float16(arithmetic, tried):
    """For numbers close to every float16 number in [0, 1], and to the middle between it and the next."""
    numbers = np.arange(0x3C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (numbers[:-1] + numbers[1:]) / 2
    centers = np.concatenate([numbers, middles])
    around = np.stack([np.nextafter(centers, np.float32(side)) for side in (-1, 2)] + [centers])
    maps = np.stack([np.roll(around, shift, 0) for shift in range(3)]).clip(0, 1)  # (3, 3, N): ties and near
    maps = np.concatenate([maps, np.roll(maps, 1, 2)])  # and neighbors
    truth = (np.arange(maps[0].size).reshape(maps[0].shape) % 21).astype(np.uint8)
    evaluation = Evaluation(voc12.BENCHMARK, "", "", "attn_highres", tried, arithmetic)
    keys = np.array([4, 9, 1, 0, 17, 2])
    for cams in (maps, maps[::-1], maps[3:4], maps - 0.25, np.where(maps < 0.1, np.nan, maps)):
        expected = slow_counts(truth, keys[: len(cams)], cams.astype(np.float16), evaluation)
        same(count_cams(truth, keys[: len(cams)], cams, evaluation), expected)


def test_repeated_class_ids_count_as_one_class_and_unknown_ones_raise():
    maps = np.array([[[0.9, 0.1, 0.8]], [[0.2, 0.7, 0.1]]], np.float16)
    truth = np.array([[6, 6, 255]], np.uint8)
    evaluation = Evaluation(voc12.BENCHMARK, "", "")
    hists, ignored = count_cams(truth, np.array([5, 5]), maps, evaluation)
    assert (hists[:, 6, 6] == 2).all() and hists.sum() == 4 and ignored == 0
    hists, ignored = count_cams(truth, np.array([5, 254]), maps, evaluation)  # 254 + 1 = 255
    assert (hists[:, 6, 6] == 1).all() and hists.sum() == 2 and ignored == 1
    with pytest.raises(ValueError, match=r"contains the mask value 31, but valid values are 0\.\.20"):
        count_cams(truth, np.array([5, 30]), maps, evaluation)
    truth[0, 1] = 255  # not counted where ground truth is ignored
    assert count_cams(truth, np.array([5, 30]), maps, evaluation)[0].sum() == 2


def test_memory_does_not_depend_on_the_number_of_images(tmp_path):
    random = np.random.default_rng(0)
    maps = {"attn_highres": random.random((2, 20, 30), np.float32)}
    write_cams(tmp_path, "image", [3, 9], maps, (200, 300), "compact")
    write_mask(tmp_path / "image.png", random.integers(0, 21, (200, 300)).astype(np.uint8), PALETTE)
    evaluation = Evaluation(voc12.BENCHMARK, str(tmp_path), str(tmp_path))

    def peak(images):
        tracemalloc.start()
        count(evaluation, ["image"] * images)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(200)  # fills caches, and lets uncollected garbage reach its usual amount
    assert peak(400) <= peak(200) + 200 * 500  # names and outcomes take 260 bytes an image; a map is 120,000


def test_float32_arithmetic_does_not_round():
    top = np.array([0.2], np.float16)
    assert background(top, 2, "float32")[0] == np.float32(1 - np.float32(top[0])) ** 2
    assert background(top, 2)[0].dtype == np.float16


def test_backgrounds_are_those_of_the_reference_evaluation():
    assert backgrounds(2, "attn_highres") == (1, 2)
    assert backgrounds(1, "highres") == tuple(range(1, 11))
    constants = backgrounds(0.3, "attn_highres")
    assert len(constants) == 12 and constants[0] == 0.05 and constants[-1] == 0.6
    assert backgrounds(2, "png") == backgrounds(2, "attn_bg") == backgrounds(2, "attn", False) == (None,)


def test_cams_with_background_channel_and_benchmarks_without_background():
    maps = np.array([[[0.5, 0.1]], [[0.5, 0.2]]], np.float16)
    truth = np.array([[0, 7]], np.uint8)
    with_channel = Evaluation(voc12.BENCHMARK, "", "", "bg_score", (None,))
    hists, ignored = count_cams(truth, np.array([6]), maps, with_channel)
    assert hists[0, 0, 0] == hists[0, 7, 7] == 1 and hists.sum() == 2 and ignored == 0
    none = Evaluation(WITHOUT, "", "", "attn_highres", (None,))
    hists, ignored = count_cams(truth, np.array([6, 2]), maps, none)
    assert hists[0, 0, 6] == hists[0, 7, 2] == 1 and hists.sum() == 2 and ignored == 0
    hists, ignored = count_cams(truth, np.array([], int), maps[:0], none)
    assert hists.sum() == 0 and ignored == 2


def test_masks_are_evaluated_without_ignored_pixels(arrays, tmp_path, capsys):
    truth = arrays["gt0"]
    half_ignored = truth.copy()
    half_ignored[: len(truth) // 2] = 255
    for index, mask in enumerate((truth, half_ignored, np.full_like(truth, 255))):
        write_mask(tmp_path / "masks" / f"{index}.png", mask, PALETTE)
        write_mask(tmp_path / "truth" / f"{index}.png", truth, PALETTE)
    evaluation = Evaluation(voc12.BENCHMARK, str(tmp_path / "masks"), str(tmp_path / "truth"), "png", (None,))
    assert evaluate(evaluation, ["0", "1", "2"], tmp_path / "scores.json") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    known = truth < 21
    proportion = (known.sum() + known[: len(truth) // 2].sum()) / (3 * known.sum())
    assert scores["best"]["Mean IoU"] == 1.0 and abs(scores["ignored"] - proportion) < 1e-12
    assert "predicted 255" in capsys.readouterr().out


def test_table_and_json_have_the_golden_scores(arrays, folders, tmp_path, capsys):
    evaluation = Evaluation(voc12.BENCHMARK, str(folders / "cams"), str(folders / "truth"))
    assert evaluate(evaluation, list("01234"), tmp_path / "one.json") == 0
    out = capsys.readouterr().out
    best = max(arrays["voc_thr1_miou"], arrays["voc_thr2_miou"])
    assert f"{best:.4f}" in next(line for line in out.splitlines() if " best " in line)
    scores = json.loads((tmp_path / "one.json").read_text())
    assert scores["best"]["Mean IoU"] == pytest.approx(best, abs=1e-12) and len(scores["all"]) == 2
    assert set(scores["best"]["Class IoU"]) == {"background", *voc12.CLASSES}
    assert None in scores["best"]["Class IoU"].values()  # JSON has no NaN
    assert evaluate(evaluation, list("01234"), tmp_path / "three.json", num_workers=3) == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "three.json").read_bytes()
    first, again = count(evaluation), count(evaluation)  # counts start at 0 when a step runs again
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all() and first[1][1] > 0


def test_damaged_images_are_left_out_and_listed(arrays, folders, tmp_path, capsys):
    for index in range(5):
        write_mask(tmp_path / f"{index}.png", arrays[f"gt{index}"], PALETTE)
    write_mask(tmp_path / "2.png", arrays["gt2"].T, PALETTE)
    (tmp_path / "3.png").write_bytes(b"no mask")
    evaluation = Evaluation(voc12.BENCHMARK, str(folders / "cams"), str(tmp_path))
    hists, _, outcomes = count(evaluation)
    assert (hists == count(evaluation, "014")[0]).all()
    failures = {outcome.name: outcome.failure for outcome in outcomes}
    assert len(failures) == 5 and not any(failures[name] for name in "014")
    assert "has CAMs of an image of size (48, 32) (H, W), expected (32, 48)" in failures["2"]
    assert "3.png cannot be read" in failures["3"]
    assert evaluate(evaluation, list("01234"), tmp_path / "s.json") == 1
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["images"] == 3 and scores["failed"] == ["2", "3"]
    assert "5 images, 2 failed" in capsys.readouterr().err


def test_ground_truth_without_any_class_is_an_error(folders, arrays, tmp_path):
    for index in range(5):
        truth = np.where(arrays[f"gt{index}"] > 0, 255, 0).astype(np.uint8)
        write_mask(tmp_path / f"{index}.png", truth, PALETTE)
    evaluation = Evaluation(voc12.BENCHMARK, str(folders / "cams"), str(tmp_path))
    with pytest.raises(ValueError, match=r"no pixel of a class: their values are 0, 255, .*convert_masks"):
        evaluate(evaluation, list("01234"))
    step = MaskStep(voc12.BENCHMARK, str(folders / "cams"), str(tmp_path), None, str(tmp_path))
    with pytest.raises(ValueError, match="no pixel of a class"):
        make_masks(step, list("01234"), "voc12")


def test_ground_truth_with_a_value_that_is_no_class_fails(arrays, folders, tmp_path):
    for index in range(5):
        write_mask(tmp_path / f"{index}.png", arrays[f"gt{index}"], PALETTE)
    truth = arrays["gt2"].copy()
    truth[0, 0] = 254
    write_mask(tmp_path / "2.png", truth, PALETTE)
    evaluation = Evaluation(voc12.BENCHMARK, str(folders / "cams"), str(tmp_path))
    failures = {outcome.name: outcome.failure for outcome in count(evaluation)[2]}
    assert "2.png has the value 254, expected one of the 21 class indices (0 to 20) or 255" in failures["2"]
    assert [name for name in failures if failures[name]] == ["2"]


def test_missing_files_are_an_error_unless_allowed(folders, tmp_path, capsys):
    evaluation = Evaluation(voc12.BENCHMARK, str(folders / "cams"), str(folders / "truth"))
    names = [*"01234", *"abcdefg"]
    message = r"lacks the CAMs of 7 of 12 images: a, b, c, d, e, \.\.\. \(images without labels have none\);"
    with pytest.raises(FileNotFoundError, match=message):
        evaluate(evaluation, names)
    with pytest.raises(FileNotFoundError, match="lacks the ground-truth masks of 1 of 1 images: a; make"):
        files_present(["a"], folders / "truth", False, "ground-truth masks")
    assert evaluate(evaluation, names, tmp_path / "s.json", allow_missing=True) == 0
    assert json.loads((tmp_path / "s.json").read_text())["missing"] == list("abcdefg")
    with pytest.raises(FileNotFoundError, match="lacks the CAMs of 1 of 1"):
        evaluate(evaluation, ["a"], allow_missing=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        files_present(names, tmp_path / "nowhere", True, "CAMs")


def test_the_benchmark_is_read_from_the_record_unless_given(tmp_path):
    with pytest.raises(ValueError, match="give --benchmark"):
        benchmark_of(tmp_path, None)
    (tmp_path / "settings.json").write_text('{"settings": {"benchmark": 3}}')
    with pytest.raises(ValueError, match="give --benchmark"):
        benchmark_of(tmp_path, None)
    (tmp_path / "settings.json").write_text('{"settings": {"benchmark": "coco14"}}')
    assert benchmark_of(tmp_path, None)[1] is coco14.BENCHMARK
    assert benchmark_of(tmp_path, "voc12") == ("voc12", voc12.BENCHMARK)


GROUP_SCORES = {
    "Mean IoU": "miou",
    "Pixel Accuracy": "pixel_accuracy",
    "Mean Accuracy": "mean_accuracy",
    "Frequency Weighted IoU": "fw_iou",
}


@pytest.fixture(scope="module")
def stuff(tmp_path_factory):
    """Folder with the golden CAMs and the ground truth of COCO-Stuff, and the golden scores."""
    root = tmp_path_factory.mktemp("stuff")
    arrays = golden("cocostuff_eval", "tagclip")
    for name in "012":
        maps = arrays[f"{name}/attn_highres"]
        for format in camfile.FORMATS:
            grid = {"attn_highres": maps.astype(np.float32)}
            write_cams(root / format, name, arrays[f"{name}/keys"], grid, maps.shape[1:], format)
        truth, unknown = convert(arrays[f"{name}/truth"])
        assert not unknown
        write_mask(root / "truth" / f"{name}.png", truth, PALETTE)
    return root, arrays


def check_group_scores(file, arrays):
    best = json.loads(file.read_text())["best"]
    for name, key in GROUP_SCORES.items():
        assert best[name] == pytest.approx(float(arrays[key]), abs=1e-6), name
    assert list(best["Class IoU"]) == list(cocostuff.GROUPS)
    ious = [np.nan if iou is None else iou for iou in best["Class IoU"].values()]
    np.testing.assert_allclose(ious, arrays["class_iou"], rtol=0, atol=1e-6)  # NaN where NaN is expected


@pytest.mark.parametrize("format", camfile.FORMATS)
def test_golden_scores_of_groups_are_reproduced(stuff, format, tmp_path, capsys):
    root, arrays = stuff
    tried = backgrounds(2, "attn_highres", cocostuff.BENCHMARK.has_background)
    evaluation = Evaluation(cocostuff.BENCHMARK, str(root / format), str(root / "truth"), backgrounds=tried)
    assert evaluate(evaluation, list("012"), tmp_path / "scores.json") == 0
    check_group_scores(tmp_path / "scores.json", arrays)
    table = capsys.readouterr().out
    for group, iou in zip(cocostuff.GROUPS, arrays["class_iou"], strict=True):
        assert re.search(rf"^{group} +{iou:.4f}$", table, re.MULTILINE)


def test_masks_are_scored_by_groups(stuff, tmp_path):
    root, arrays = stuff
    for name in "012":
        labels = arrays[f"{name}/keys"][arrays[f"{name}/attn_highres"].argmax(0)].astype(np.uint8)
        write_mask(tmp_path / "masks" / f"{name}.png", labels, PALETTE)
    evaluation = Evaluation(
        cocostuff.BENCHMARK, str(tmp_path / "masks"), str(root / "truth"), "png", backgrounds=(None,)
    )
    assert evaluate(evaluation, list("012"), tmp_path / "scores.json") == 0
    check_group_scores(tmp_path / "scores.json", arrays)


def test_the_crf_is_scored_by_groups(stuff, tmp_path):
    root, arrays = stuff
    (tmp_path / "images").mkdir()
    for name in "012":
        size = arrays[f"{name}/truth"].shape
        parity_image(name, size).save(tmp_path / "images" / f"{name}.png")
    step = MaskStep(
        cocostuff.BENCHMARK,
        str(root / "compact"),
        str(tmp_path / "images"),
        str(tmp_path / "masks"),
        gt_root=str(root / "truth"),
        settings=MaskSettings(confidence=0),
    )
    assert make_masks(step, list("012"), "cocostuff", tmp_path / "crf.json") == 0
    evaluation = Evaluation(cocostuff.BENCHMARK, step.output, step.gt_root, "png", backgrounds=(None,))
    assert evaluate(evaluation, list("012"), tmp_path / "masks.json") == 0
    crf, masks = (json.loads((tmp_path / name).read_text())["best"] for name in ("crf.json", "masks.json"))
    assert crf == masks and list(crf["Class IoU"]) == list(cocostuff.GROUPS)
    for name in "012":
        values = np.unique(read_mask(tmp_path / "masks" / f"{name}.png"))
        assert set(values) <= set(arrays[f"{name}/keys"])  # classes, not groups


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_group_scores_equal_the_scores_of_masks_with_group_indices(seed, groups):
    benchmark = Benchmark(
        "a", list("vwxyz"), has_background=False, groups=groups, group_names=["p", "q", "r", "s"]
    )
    truth, prediction = np.random.default_rng(seed).integers(0, 5, (2, 40))
    renamed = confusion(np.array(groups)[truth], np.array(groups)[prediction], 4)
    group_scores = benchmark_scores(confusion(truth, prediction, 5), benchmark)
    assert json.dumps(group_scores) == json.dumps(scores(renamed))  # as text, NaN equals NaN
