"""Labels from class scores: score files, rules that choose labels, the label file, metrics."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from foundation.files import replacing, write_file
from foundation.logs import log
from foundation.untrusted import read_npz
from pipeline.flags import beside_images
from pipeline.run import first_few, write_json
from segmentation import labels
from segmentation.benchmark import Benchmark
from segmentation.label_metrics import label_scores

SUFFIX = ".npz"
RULES = ("relative", "absolute", "top")


def write_scores(folder: str | Path, scores: Mapping[str, np.ndarray]) -> Path:
    """Write scores, image name -> (K,) float32, to a file and return its path. The file name contains a hash
    of the image names, so that processes write different files."""
    names = sorted(scores)
    digest = hashlib.sha256("\n".join(names).encode(errors="backslashreplace")).hexdigest()[:16]
    file = Path(folder) / f"scores-{digest}{SUFFIX}"
    with replacing(file) as stream:
        np.savez(stream, names=np.array(names), scores=np.stack([scores[name] for name in names]))
    return file


def read_scores(folder: str | Path, num_classes: int) -> dict[str, np.ndarray]:
    """Return all scores in a folder, image name -> (K,) float32. A damaged file is logged and skipped."""
    scores: dict[str, np.ndarray] = {}
    for file in sorted(Path(folder).glob(f"scores-*{SUFFIX}")):
        try:
            names, values = _read_scores(file, num_classes)
        except Exception as error:  # zipfile and NumPy raise many types on damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s is damaged (%s): its images are scored again; remove the file", file, reason)
            continue
        scores.update(zip(names, values, strict=True))
    return scores


def _read_scores(file: Path, num_classes: int) -> tuple[list[str], np.ndarray]:
    """Return the n image names and the scores (n, K) float32 of one file."""
    content = read_npz(file, text=True)
    if not {"names", "scores"} <= content.keys():
        raise ValueError("it has no names or no scores")
    names, values = content["names"], content["scores"]
    if names.dtype.kind != "U" or values.dtype.kind != "f":
        raise ValueError(f"its names and scores have the types {names.dtype} and {values.dtype}")
    if names.ndim != 1 or values.shape != (len(names), num_classes):
        raise ValueError(f"its scores have the shape {values.shape}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ValueError("its scores are not finite")
    return names.tolist(), values


class LabelRule(NamedTuple):
    """Rule that turns scores into labels, see `choose`."""

    threshold: float
    rule: str = "relative"


def label_rule(rule: str, threshold: float | None, ratio: float) -> LabelRule:
    """Return the rule of --label_rule and --label_threshold; `ratio` is the default of "relative"."""
    if rule == "relative":
        threshold = ratio if threshold is None else threshold
        expected, fits = "a number from 0 to 1", 0 <= threshold <= 1
    elif threshold is None:
        raise ValueError(f"--label_rule {rule} requires --label_threshold X")
    elif rule == "top":
        expected, fits = "a whole number, 1 or more", threshold >= 1 and threshold.is_integer()
    else:
        expected, fits = "a finite number", math.isfinite(threshold)
    if not fits:
        raise ValueError(f"--label_threshold of --label_rule {rule} must be {expected}, got {threshold:g}")
    return LabelRule(threshold, rule)


def choose(scores: np.ndarray, threshold: float, rule: str = "relative") -> np.ndarray:
    """Return the predicted classes of scores (n, K), as (n, K) bool.

    Args:
        rule: "relative": scores above min + threshold * (max - min) of the image, so no class if all scores
            are equal; "absolute": scores above the threshold; "top": the `threshold` highest scores; among
            equal scores, the first classes.
    """
    if rule == "relative":
        low, high = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
        return scores > low + threshold * (high - low)
    if rule == "absolute":
        return scores > threshold
    highest = np.argsort(-scores, axis=1, kind="stable")[:, : int(threshold)]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, highest, True, axis=1)
    return chosen


def chosen_labels(scores: np.ndarray, threshold: float, rule: str = "relative") -> list[list[int]]:
    """Return each image's labels, ascending: the chosen classes, or the best class if none is chosen."""
    chosen = choose(scores, threshold, rule)
    return [
        np.flatnonzero(row).tolist() or [int(values.argmax())]
        for row, values in zip(chosen, scores, strict=True)
    ]


def write_labels(file: str | Path, scores: dict[str, np.ndarray], rule: LabelRule) -> None:
    """Write lines `name index index ...`, which every script accepts as --labels and as --split_file."""
    chosen = chosen_labels(np.stack([*scores.values()]), *rule) if scores else []
    lines = [" ".join([name, *map(str, row)]) + "\n" for name, row in zip(scores, chosen, strict=True)]
    write_file(file, "".join(lines))
    mean = sum(map(len, chosen)) / max(1, len(chosen))
    log.info("%s: %d images, %.2f labels per image", file, len(lines), mean)


def report_metrics(
    scores: dict[str, np.ndarray],
    truth: labels.LabelReader | None,
    classes: Sequence[str],
    rule: LabelRule,
    json_file: str | None,
) -> None:
    """Print the metrics of images with true labels in the format of the reference script; write JSON."""
    true_labels, unlabeled = {}, []
    for name in scores if truth else ():
        try:
            true_labels[name] = truth(name)
        except (ValueError, OSError) as error:
            unlabeled.append(f"{name}: {error}")
    if unlabeled:
        log.warning("%d images without true labels are not scored: %s", len(unlabeled), first_few(unlabeled))
    if not true_labels:
        log.warning("no image has true labels: no metrics are computed")
        return
    values = np.stack([scores[name] for name in true_labels])  # (n, K)
    labeled = np.zeros(values.shape, bool)
    for row, class_ids in zip(labeled, true_labels.values(), strict=True):
        row[class_ids] = True
    result = label_scores(values, labeled, classes, choose(values, *rule))
    print(f"mAP: {result['mAP']:.6f}")
    absent, value = result["classes without positives"], result["mAP of classes with positives"]
    if absent:
        print(f"mAP of classes with positives: {value:.6f} ({absent} of {len(classes)} have none)")
    print(f"F1: {result['F1']:.6f}, Precision: {result['Precision']:.6f}, Recall: {result['Recall']:.6f}")
    if json_file:
        write_json(json_file, result)


def truth_reader(
    benchmark: Benchmark, split: labels.Split, labels_file: str | None, image_root: str
) -> labels.LabelReader | None:
    """Return a reader of true labels from a file, the split file or the benchmark; None if there are none."""
    if labels_file or any(split.values()):
        return labels.reader(replace(benchmark, labels="file"), split, labels_file)
    if benchmark.labels == "file":
        return None
    try:
        return labels.reader(beside_images(benchmark, image_root), split)
    except FileNotFoundError:  # the images have no annotation
        return None
