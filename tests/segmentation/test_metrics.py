"""Confusion matrices and scores, against golden vectors and pixel-by-pixel counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmentation.metrics import ABSENT, confusion, scores
from tests.conftest import golden
from tests.deeplab.common import golden as deeplab_golden

SUMMARY = ("Pixel Accuracy", "Mean Accuracy", "Frequency Weighted IoU", "Mean IoU")


def test_scores_match_golden():
    arrays = golden("eval_cam")
    for dataset in ("voc", "coco"):
        for threshold in ("1", "2", "3", "0.05", "0.3", "0.45"):
            name = f"{dataset}_thr{threshold}"
            result = scores(arrays[f"{name}_hist"])
            summary = [result[key] for key in SUMMARY]
            np.testing.assert_allclose(summary, arrays[f"{name}_summary"], atol=1e-12)
            np.testing.assert_allclose(list(result["Class IoU"].values()), arrays[f"{name}_iou"], atol=1e-12)
            assert abs(result["Mean IoU"] - arrays[f"{name}_miou"]) < 1e-12


def counted(arrays, channels, prefix=""):
    """The confusion matrix of all images of a golden case."""
    names = [name for name in arrays if name.startswith(f"{prefix}gt")]
    assert names
    return sum(confusion(arrays[name], arrays[name.replace("gt", "pred")], channels) for name in names)


@pytest.mark.parametrize("case", ["voc", "absent_classes", "one_class", "coco", "perfect"])
def test_scores_match_golden_of_deeplab_v2(case):
    arrays = deeplab_golden("a_metrics")
    result = scores(counted(arrays, int(arrays[f"{case}_n"]), f"{case}_"))
    pixels, accuracy, frequency, iou = (result[key] for key in SUMMARY)
    summary = [pixels, accuracy, iou, frequency]  # order of the golden vectors
    np.testing.assert_allclose(summary, arrays[f"{case}_summary"], rtol=0, atol=1e-12)
    class_iou = list(result["Class IoU"].values())
    np.testing.assert_allclose(class_iou, arrays[f"{case}_class_iou"], rtol=0, atol=1e-12)


def test_scores_match_golden_of_resnet38():
    arrays = deeplab_golden("b_metrics")
    result = scores(counted(arrays, 21), absent="zero")
    percent = 100 * np.nan_to_num(list(result["Class IoU"].values()))
    np.testing.assert_allclose(percent, arrays["iou_percent"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(100 * result["Mean IoU"], arrays["miou_percent"], rtol=0, atol=1e-9)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 21), st.integers(0, 2**31))
def test_confusion_equals_counting_each_pixel(height, width, channels, seed):
    random = np.random.default_rng(seed)
    values = np.append(np.arange(channels), 255).astype(np.uint8)
    truth, prediction = random.choice(values, (2, height, width))
    expected = np.zeros((channels, channels), np.int64)
    for true, predicted in zip(truth.ravel(), prediction.ravel(), strict=True):
        if true != 255 and predicted != 255:
            expected[true, predicted] += 1
    assert (confusion(truth, prediction, channels) == expected).all()


def test_masks_of_255_count_no_pixels():
    ignored, zeros = np.full((3, 4), 255, np.uint8), np.zeros((3, 4), np.uint8)
    assert confusion(ignored, zeros, 5).sum() == confusion(zeros, ignored, 5).sum() == 0
    result = scores(np.zeros((5, 5), np.int64))
    assert all(np.isnan(result[key]) for key in SUMMARY)


def test_policies_for_absent_classes():
    # Class 0 half right, class 1 absent but predicted, class 2 absent and never predicted.
    hist = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    expected = {"drop": 0.5, "nan-mean": 0.25, "zero": 0.5 / 3}
    assert {policy: scores(hist, absent=policy)["Mean IoU"] for policy in ABSENT} == expected
    assert scores(hist)["Mean IoU"] == expected["drop"]
    for policy in ABSENT:  # the policy does not change the other scores
        result = scores(hist, absent=policy)
        iou = result["Class IoU"]
        assert iou[0] == 0.5 and iou[1] == 0 and np.isnan(iou[2])
        assert [result[key] for key in SUMMARY if key != "Mean IoU"] == [0.5, 0.5, 0.5]
    # If every class occurs, all policies agree. If none occurs, only "zero" gives a number.
    assert {scores(np.array([[2, 1], [1, 2]]), absent=policy)["Mean IoU"] for policy in ABSENT} == {0.5}
    nothing = {policy: scores(np.zeros((2, 2)), absent=policy)["Mean IoU"] for policy in ABSENT}
    assert nothing["zero"] == 0 and np.isnan(nothing["drop"]) and np.isnan(nothing["nan-mean"])


def test_invalid_arguments_raise():
    zeros = np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"ground truth is \(2, 3\)"):
        confusion(zeros, zeros.T, 3)
    with pytest.raises(ValueError, match="has the value 7, expected 0 to 2 or 255"):
        confusion(zeros, zeros + 7, 3)
    with pytest.raises(ValueError, match="absent must be one of"):
        scores(np.eye(2), "ignore")
