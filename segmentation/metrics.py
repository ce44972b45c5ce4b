"""Segmentation scores from one confusion matrix, summed over images."""

import numpy as np

from segmentation.benchmark import IGNORE

ABSENT = ("drop", "zero", "nan-mean")


def confusion(truth: np.ndarray, prediction: np.ndarray, channels: int) -> np.ndarray:
    """Return the number of pixels by true and predicted class.

    Pixels whose truth is no class (>= channels, usually 255) or whose prediction is 255 are ignored; the
    caller counts and reports the latter.

    Args:
        truth: integers, any shape.
        prediction: integers of the same shape, in [0, channels) or 255.
        channels: values a clean mask can hold, n.

    Returns:
        (n, n) int64, [truth, prediction].

    Raises:
        ValueError: the shapes differ, or a prediction is neither a class nor 255.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"ground truth is {truth.shape} but the prediction {prediction.shape} (H, W)")
    counted = (truth < channels) & (prediction != IGNORE)
    truth, prediction = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    if prediction.size and prediction.max() >= channels:
        raise ValueError(f"the prediction holds {prediction.max()}, but there are {channels} classes")
    return np.bincount(truth * channels + prediction, minlength=channels**2).reshape(channels, channels)


def joint_counts(truth: np.ndarray, code: np.ndarray, channels: int, codes: int) -> np.ndarray:
    """Return the number of pixels by true class and by a code of the caller.

    Neighboring pixels are mostly equal, so runs of them are counted with their lengths.

    Args:
        truth: unsigned integers, any shape but an empty one; those that are no class (>= channels) are
            ignored.
        code: unsigned integers of the same shape, in [0, codes).
        channels: n, at most 255.
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
    return counts.astype(np.int64).reshape(-1, codes)[:channels]  # lengths are summed in float64: exactly


def scores(hist: np.ndarray, absent: str = "drop") -> dict:
    """Return the scores that WSSS projects print, under their names; fractions in [0, 1].

    Args:
        hist: (n, n), see `confusion`.
        absent: how the mean IoU treats classes without ground truth; published systems differ.
            "drop": left out, even if predicted (CLIP-ES). "nan-mean": left out unless predicted, then 0
            (nanmean of all IoU). "zero": 0.

    Returns:
        "Pixel Accuracy", "Mean Accuracy", "Frequency Weighted IoU", "Mean IoU" and "Class IoU" (a dict
        class -> IoU), floats; NaN where nothing is counted.
    """
    if absent not in ABSENT:
        raise ValueError(f"absent must be one of {', '.join(ABSENT)}, got {absent!r}")
    hist = np.asarray(hist, np.float64)
    true, predicted, correct = hist.sum(axis=1), hist.sum(axis=0), np.diag(hist)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is NaN: nothing to count
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
