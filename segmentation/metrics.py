"""Segmentation scores from a confusion matrix that is summed over all images."""

import numpy as np

from segmentation.benchmark import IGNORE

ABSENT = ("drop", "zero", "nan-mean")


def confusion(truth: np.ndarray, prediction: np.ndarray, channels: int) -> np.ndarray:
    """Return the number of pixels for each pair of true and predicted class.

    Pixels are ignored if their true value is not a class (>= channels, usually 255) or their prediction is
    255. The caller counts and reports predictions of 255.

    Args:
        truth: integers, any shape.
        prediction: integers of the same shape, in [0, channels) or 255.
        channels: n, the number of valid mask values.

    Returns:
        (n, n) int64, [truth, prediction].

    Raises:
        ValueError: the shapes differ, or a prediction is neither a class nor 255.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"ground truth is {truth.shape} but the prediction is {prediction.shape} (H, W)")
    counted = (truth < channels) & (prediction != IGNORE)
    truth, prediction = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    if prediction.size and prediction.max() >= channels:
        raise ValueError(
            f"the prediction has the value {prediction.max()}, expected 0 to {channels - 1} or {IGNORE}"
        )
    return np.bincount(truth * channels + prediction, minlength=channels**2).reshape(channels, channels)


def joint_counts(truth: np.ndarray, code: np.ndarray, channels: int, codes: int) -> np.ndarray:
    """Return the number of pixels for each pair of true class and code. A code is any integer.

    Neighboring pixels are mostly equal, so runs of equal pixels are counted with their lengths.

    Args:
        truth: unsigned integers, any non-empty shape; values that are not a class (>= channels) are ignored.
        code: unsigned integers of the same shape, in [0, codes).
        channels: n, the number of classes, at most 255.
        codes: number of codes.

    Returns:
        (n, codes) int64.
    """
    truth, code = truth.ravel(), code.ravel()
    changes = (truth[1:] != truth[:-1]) | (code[1:] != code[:-1])
    ends = np.append(np.flatnonzero(changes), len(truth) - 1)  # the last pixel of each run
    lengths = np.diff(ends, prepend=-1)
    rows = np.minimum(truth[ends].astype(np.int64), channels)  # the last row counts ignored pixels
    counts = np.bincount(rows * codes + code[ends], lengths, (channels + 1) * codes)
    return counts.astype(np.int64).reshape(-1, codes)[:channels]  # sums of lengths are exact in float64


def scores(hist: np.ndarray, absent: str = "drop") -> dict:
    """Return the scores of a confusion matrix, with the names used by WSSS projects; fractions in [0, 1].

    Args:
        hist: (n, n), see `confusion`.
        absent: how the mean IoU treats classes without ground truth; published systems differ.
            "drop": excluded, even if predicted (CLIP-ES). "nan-mean": 0 if predicted, else excluded
            (nanmean of all IoU). "zero": counted as 0.

    Returns:
        "Pixel Accuracy", "Mean Accuracy", "Frequency Weighted IoU", "Mean IoU" and "Class IoU" (a dict
        class -> IoU), floats; a score without any pixels is NaN.
    """
    if absent not in ABSENT:
        raise ValueError(f"absent must be one of {', '.join(ABSENT)}, got {absent!r}")
    hist = np.asarray(hist, np.float64)
    true, predicted, correct = hist.sum(axis=1), hist.sum(axis=0), np.diag(hist)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is NaN: a score without pixels
        accuracy = correct / true
        iou = correct / (true + predicted - correct)
        frequency = true / hist.sum()
        pixel_accuracy = correct.sum() / hist.sum()
    occurs = true > 0
    counted = {"drop": iou[occurs], "nan-mean": iou[~np.isnan(iou)], "zero": np.nan_to_num(iou)}[absent]
    return {
        "Pixel Accuracy": float(pixel_accuracy),
        "Mean Accuracy": _mean(accuracy[occurs]),
        "Frequency Weighted IoU": float((frequency * iou)[occurs].sum()) if occurs.any() else float("nan"),
        "Mean IoU": _mean(counted),
        "Class IoU": {index: float(value) for index, value in enumerate(iou)},
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
