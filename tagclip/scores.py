"""The scores of images in files, and what follows from them: labels, mAP, F1."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.files import replacing

SUFFIX = ".npz"
EPSILON = 1e-9  # the public code's, under precision and recall
AVERAGES = ("overall", "category", "sample")
RULES = ("relative", "absolute", "top")


def write_scores(folder: str | Path, scores: Mapping[str, np.ndarray]) -> Path:
    """Write a shard of scores; its name follows from its images, so that processes do not meet.

    Args:
        scores: image name -> (K,) float32.
    """
    names = sorted(scores)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    file = Path(folder) / f"scores-{digest}{SUFFIX}"
    with replacing(file) as stream:
        np.savez(stream, names=np.array(names), scores=np.stack([scores[name] for name in names]))
    return file


def read_scores(folder: str | Path, classes: int) -> dict[str, np.ndarray]:
    """All that a folder's shards hold: image name -> (K,) float32.

    Raises:
        ValueError: a shard is damaged.
    """
    found: dict[str, np.ndarray] = {}
    for file in sorted(Path(folder).glob(f"scores-*{SUFFIX}")):
        try:
            with np.load(file) as shard:  # refuses pickles
                names, scores = shard["names"], shard["scores"]
            if scores.shape != (len(names), classes):
                raise ValueError(f"its scores have the shape {scores.shape}")
        except Exception as error:  # whatever zipfile and NumPy raise on what is damaged
            raise ValueError(f"{file} is damaged ({error}): remove it, and start again to go on") from None
        found.update(zip(names.tolist(), scores, strict=True))
    return found


def choose(scores: np.ndarray, threshold: float, rule: str = "relative") -> np.ndarray:
    """Which classes are said to be there.

    Args:
        scores: (n, K).
        threshold: what the rule takes.
        rule: "relative": above min + threshold * (max - min) of an image's scores, so none of equal ones;
            "absolute": above the threshold; "top": the so many highest, of equal ones those of low index.

    Returns:
        (n, K) bool.
    """
    if rule == "relative":
        low, high = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
        return scores > low + threshold * (high - low)
    if rule == "absolute":
        return scores > threshold
    places = np.argsort(-scores, axis=1, kind="stable")[:, : int(threshold)]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, places, True, axis=1)
    return chosen


def labels(scores: np.ndarray, threshold: float, rule: str = "relative") -> list[list[int]]:
    """The labels of images, ascending: what is chosen, or else the class of the highest score."""
    chosen = choose(scores, threshold, rule)
    return [
        np.flatnonzero(row).tolist() or [int(values.argmax())]
        for row, values in zip(chosen, scores, strict=True)
    ]


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean precision at the ranks of a class's positives, without interpolation; images of equal scores keep
    their order.

    Args:
        scores: (n, K).
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


def f1(chosen: np.ndarray, truth: np.ndarray, average: str = "overall") -> tuple[float, float, float]:
    """F1, precision and recall.

    Args:
        chosen, truth: (n, K) of 0 and 1.
        average: "overall" counts all pairs of image and class as one; "category" and "sample" take the means
            of precision and recall over classes or images, where those without positives count 0.

    Returns:
        Fractions; F1 is NaN when the others are 0.
    """
    axis = {"overall": None, "category": 0, "sample": 1}[average]
    chosen, truth = chosen.astype(bool), truth.astype(bool)
    hits = (chosen & truth).sum(axis)
    precision = float(np.mean(hits / (chosen.sum(axis) + EPSILON)))
    recall = float(np.mean(hits / (truth.sum(axis) + EPSILON)))
    both = precision + recall
    return (2 * precision * recall / both if both else float("nan")), precision, recall


def evaluate(scores: np.ndarray, truth: np.ndarray, classes: Sequence[str], chosen: np.ndarray) -> dict:
    """All figures of scored images, fractions in [0, 1].

    Args:
        scores, truth, chosen: (n, K), see above.
        classes: their names.

    Returns:
        "mAP" as published, where classes without positives count 0, and "mAP of classes with positives";
        "F1", "Precision" and "Recall" overall, by category and by sample; "AP" by class, None where it
        has none.
    """
    each = average_precisions(scores, truth)
    occurring = each[~np.isnan(each)]
    result = {
        "images": len(scores),
        "mAP": float(np.nan_to_num(each).mean()),
        "mAP of classes with positives": float(occurring.mean()) if len(occurring) else float("nan"),
        "classes without positives": int(np.isnan(each).sum()),
    }
    for average in AVERAGES:
        names = ("F1", "Precision", "Recall") if average == "overall" else (
            f"F1 by {average}", f"Precision by {average}", f"Recall by {average}"
        )  # fmt: skip
        result |= dict(zip(names, f1(chosen, truth, average), strict=True))
    named = zip(classes, each.tolist(), strict=True)
    return result | {"AP": {name: None if np.isnan(value) else value for name, value in named}}
