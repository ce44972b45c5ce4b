"""Scores of image-level labels: average precision and F1 of multi-label classification."""

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-9  # added to the denominators of precision and recall, as in TagCLIP's reference implementation
AVERAGES = {"overall": None, "category": 0, "sample": 1}  # average -> axis of (n, K) arrays that is summed


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the average precision of each class: the mean precision at the ranks of its positives.

    Precision is not interpolated. Images with equal scores are ranked in their given order.

    Args:
        scores: (n, K), n images and K classes.
        truth: (n, K) of 0 and 1.

    Returns:
        (K,) float64, NaN for classes without positives.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.take_along_axis(truth, order, 0).astype(bool)  # (n, K)
    precision = hits.cumsum(0) / np.arange(1, len(hits) + 1)[:, None]
    positives = hits.sum(0)
    with np.errstate(invalid="ignore"):
        return (precision * hits).sum(0) / positives


def f1(predicted: np.ndarray, truth: np.ndarray, average: str = "overall") -> tuple[float, float, float]:
    """Return F1, precision and recall as fractions; F1 is NaN if precision and recall are 0.

    Args:
        predicted, truth: (n, K) of 0 and 1.
        average: "overall" counts all pairs of image and class together. "category" and "sample" average
            precision and recall over classes or images. A class or image without predictions has precision 0;
            without positives, it has recall 0.
    """
    axis = AVERAGES[average]
    predicted, truth = predicted.astype(bool), truth.astype(bool)
    hits = (predicted & truth).sum(axis)
    precision = float(np.mean(hits / (predicted.sum(axis) + EPSILON)))
    recall = float(np.mean(hits / (truth.sum(axis) + EPSILON)))
    both = precision + recall
    return (2 * precision * recall / both if both else float("nan")), precision, recall


def label_scores(
    scores: np.ndarray, truth: np.ndarray, classes: Sequence[str], predicted: np.ndarray
) -> dict:
    """Return all scores of predicted labels, as fractions in [0, 1].

    Args:
        scores, truth, predicted: (n, K), see `average_precisions` and `f1`.
        classes: K names.

    Returns:
        "images" and "classes without positives" are counts. "mAP" is TagCLIP's: classes without positives
        count as 0; "mAP of classes with positives" excludes them. "F1", "Precision" and "Recall" are overall,
        by category and by sample. "AP" is a dict class -> AP, with None for classes without positives.
    """
    precisions = average_precisions(scores, truth)
    occurring = precisions[~np.isnan(precisions)]
    result = {
        "images": len(scores),
        "mAP": float(np.nan_to_num(precisions).mean()),
        "mAP of classes with positives": float(occurring.mean()) if len(occurring) else float("nan"),
        "classes without positives": int(np.isnan(precisions).sum()),
    }
    for average in AVERAGES:
        suffix = "" if average == "overall" else f" by {average}"
        names = [f"{name}{suffix}" for name in ("F1", "Precision", "Recall")]
        result |= dict(zip(names, f1(predicted, truth, average), strict=True))
    named = zip(classes, precisions.tolist(), strict=True)
    return result | {"AP": {name: None if np.isnan(value) else value for name, value in named}}
