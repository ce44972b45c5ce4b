"""Step 2a: scores of CAM files, or of index masks, against ground truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.processes import Outcome
from pipeline.run import Run, first_few, read_settings, write_json
from pipeline.step import Step
from segmentation import benchmark as benchmarks
from segmentation import camfile
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.masks import check_class_pixels, check_values, read_mask
from segmentation.metrics import joint_counts, scores

ARITHMETIC = ("float16", "float32")
INFINITY = 0x7C00  # bits of float16 infinity
# Twice the largest spacing of float16 in [0, 1]. Numbers that differ by more remain different after rounding.
CLOSE = 2.0**-10
MASKS = "png"  # the --cam_type for index masks instead of CAM files
SUMMARY = ("Mean IoU", "Pixel Accuracy", "Mean Accuracy", "Frequency Weighted IoU")


def backgrounds(threshold: float, cam_type: str, has_background: bool = True) -> tuple[float | None, ...]:
    """Return the background scores that the reference evaluation tries for a value of --cam_eval_thres.

    Args:
        threshold: >= 1 returns the exponents 1 and 2 (1 to 10 for CAM types without "attn" in their name);
            < 1 returns the constants 0.05, 0.10, ..., 0.60.
        cam_type: index masks and CAM types with "bg" in their name return (None,).
        has_background: False returns (None,).
    """
    if cam_type == MASKS or "bg" in cam_type or not has_background:
        return (None,)
    if threshold >= 1:
        return tuple(float(exponent) for exponent in range(1, 3 if "attn" in cam_type else 11))
    return tuple(round(0.05 * step, 2) for step in range(1, 13))


def background(top: np.ndarray, score: float, arithmetic: str = "float16") -> np.ndarray:
    """Return the score of the background at each pixel, in dtype `arithmetic`.

    Args:
        top: (...) the highest score of any class.
        score: >= 1: an exponent e, the background is (1 - top)^e; < 1: the constant background.
        arithmetic: "float16" rounds the difference to float16, and then the power.
    """
    dtype = np.dtype(arithmetic)
    if score < 1:
        return np.full(top.shape, score, dtype)
    difference = (1 - top.astype(np.float32)).astype(dtype)
    return (difference.astype(np.float32) ** score).astype(dtype)


@cache
def _background_wins(
    backgrounds: tuple[float | None, ...], arithmetic: str
) -> tuple[list[int], list[float], np.ndarray]:
    """Return which of the B background scores win against the best class, for each interval of its score.

    The score of a class is one of 2^16 float16 numbers. This function compares each of these numbers with the
    background once. Pixels then need only their interval.

    Returns:
        Edges (I - 1,) between the I intervals, ascending, as the integers of `ordered`; for each edge, the
        smallest float32 number that is rounded to it, valid for scores in [0, 1]; and wins (I, B) bool. The
        background wins ties. The background score None never wins.
    """
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    wins = np.zeros((2**16, len(backgrounds)), bool)
    with np.errstate(all="ignore"):  # overflow and NaN for numbers that no CAM contains
        for index, score in enumerate(backgrounds):
            if score is not None:
                wins[:, index] = background(numbers, score, arithmetic) >= numbers
        scores, first = np.unique(ordered(numbers), return_index=True)
        numbers, wins = numbers[first].astype(np.float32), wins[first]
        changes = 1 + np.flatnonzero((wins[1:] != wins[:-1]).any(1))
        below, edges = numbers[changes - 1], numbers[changes]
        middles = (below + edges) / 2  # exactly between two float16 numbers: rounded to the even one
        rounded_up = middles.astype(np.float16) == edges
        float32_edges = np.where(rounded_up, middles, np.nextafter(middles, edges))
    return scores[changes].tolist(), float32_edges.tolist(), wins[np.append(0, changes)]


def ordered(numbers: np.ndarray) -> np.ndarray:
    """Return int16 numbers that have the same order as float16 `numbers`, with NaN highest.

    Comparing integers is much faster. For numbers in [0, inf] the bits themselves are such integers; they are
    returned without a copy.
    """
    bits = numbers.view(np.int16)
    if bits.min(initial=0) >= 0 and bits.max(initial=0) <= INFINITY:
        return bits
    size = np.minimum(bits & 0x7FFF, INFINITY + 1)  # larger bits than infinity's mean NaN
    return np.where((bits < 0) & (size <= INFINITY), -size, size)


def count_cams(
    truth: np.ndarray, class_ids: np.ndarray, cams: np.ndarray, evaluation: "Evaluation"
) -> tuple[np.ndarray, int]:
    """Count the pixels of one image for all background scores of the evaluation in one pass.

    The prediction of a pixel is its best class, or the background if that has at least the same score. If
    classes tie, the first of them in `class_ids` wins. NaN is the highest score.

    Args:
        truth: (H, W) uint8 mask values.
        class_ids: (K,) class indices.
        cams: (K, H, W) float16; (K + 1, H, W) if they have a background channel. float32 CAMs give the same
            counts as CAMs rounded to float16; only nearly equal scores are actually rounded.

    Returns:
        hists (B, n, n) int64 [truth, prediction] for the B background scores; and the number of pixels that
        are predicted 255 with the first background score. hists does not count them. Pixels whose ground
        truth is ignored are not counted at all.

    Raises:
        ValueError: a pixel with valid ground truth is predicted as a class that the benchmark does not have.
    """
    offset = int(evaluation.benchmark.has_background)
    indices = class_ids + offset
    if "bg" in evaluation.cam_type:
        indices = np.append(0, indices)
    edges, float32_edges, wins = _background_wins(evaluation.backgrounds, evaluation.arithmetic)
    if len(cams):
        if cams.dtype == np.float32 and cams.min() >= 0 and cams.max() <= 1:
            edges = float32_edges
        else:  # float16, or float32 with NaN or values outside [0, 1]
            cams = ordered(cams.astype(np.float16, copy=False))
        best, top = _argmax(cams.reshape(len(cams), -1))  # (H * W,), (H * W,)
        code = best.astype(np.min_scalar_type(len(cams) * len(wins))) * len(wins)  # (class, interval of top)
        maximum = top.max()
        for edge in edges:
            if edge <= maximum:
                code += top >= edge
    else:  # no class: only background or 255 is predicted
        indices, wins = np.array([0 if offset else IGNORE]), np.zeros((1, len(evaluation.backgrounds)), bool)
        code = np.zeros(truth.size, np.uint8)
    joint = joint_counts(truth.ravel(), code, evaluation.benchmark.channels, len(indices) * len(wins))
    joint = joint.reshape(-1, len(indices), len(wins))  # (n, K, I)
    classes = joint @ ~wins  # (n, K, B)
    of_background = joint.sum(1, keepdims=True) @ wins  # (n, 1, B)
    return _matrices(np.append(indices, 0), np.concatenate([classes, of_background], 1))


def count_mask(truth: np.ndarray, mask: np.ndarray, channels: int) -> tuple[np.ndarray, int]:
    """Return the counts of `count_cams`, with B = 1, for an index mask (H, W) uint8."""
    return _matrices(np.arange(256), joint_counts(truth, mask, channels, 256)[..., None])


def _argmax(cams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the first highest CAM at each pixel, and its value, (N,) each, for CAMs (K, N).

    float32 CAMs in [0, 1] are compared as if rounded to float16; the returned value is not rounded.
    """
    top = cams[0] if len(cams) == 1 else cams[0].copy()
    best = np.zeros(top.shape, np.min_scalar_type(len(cams)))
    for index, channel in enumerate(cams[1:], 1):
        if cams.dtype == np.float32:
            lead = channel - top
            higher = lead > 0
            close = np.flatnonzero(higher & (lead <= CLOSE))
            higher[close] = channel[close].astype(np.float16) > top[close].astype(np.float16)
        else:
            higher = channel > top
        np.maximum(best, higher * best.dtype.type(index), out=best)  # `index` exceeds all earlier indices
        np.maximum(top, channel, out=top)
    return best, top


def _matrices(indices: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the result of `count_cams`, from the mask values (C,) and counts (n, C, B) of C candidates."""
    channels, _, backgrounds = counts.shape
    used = counts.any((0, 2))
    unknown = indices[used & (indices >= channels) & (indices != IGNORE)]
    if len(unknown):
        raise ValueError(
            f"the prediction contains the mask value {unknown.max()}, but valid values are "
            f"0..{channels - 1}: give the --benchmark that it was made for"
        )
    hists = np.zeros((backgrounds, channels, channels), np.int64)
    for candidate in np.flatnonzero(used & (indices < channels)):  # two candidates may have the same index
        hists[:, :, indices[candidate]] += counts[:, candidate].T
    return hists, int(counts[:, indices == IGNORE, 0].sum())


class ScoringStep(Step):
    """A step that compares predictions with ground truth; subclasses have a `benchmark` and a `cam_type`."""

    backgrounds: Sequence[float | None] = (None,)

    def __post_init__(self):
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        channels = self.benchmark.channels
        self.hists = np.zeros((len(self.backgrounds), channels, channels), np.int64)
        self.pixels = np.zeros(2, np.int64)

    def count(self, hists: np.ndarray, ignored: int) -> None:
        """Add the counts of one image, as returned by `count_cams` or `count_mask`."""
        self.hists += hists
        self.pixels += (ignored, int(hists[0].sum()) + ignored)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return hists (B, n, n) int64 [truth, prediction] for the B background scores, and pixels (2,): the
        number of pixels that are predicted 255 (not in hists), and of all pixels with valid ground truth."""
        counts = self.hists, self.pixels
        self.reset()  # for another run of the same step
        return counts

    def report(
        self, run: Run, parts: list, names: Sequence[str], missing: list[str], details: dict, json_file: Any
    ) -> None:
        """Print the scores of a finished run, and write them as JSON.

        Args:
            parts: the results of `finish` from all processes.
            names: image ids of the run, without `missing`.
            missing: image ids that were left out, for the JSON file.
            details: further entries of the JSON file.
            json_file: None writes no file.
        """
        hists, pixels = (sum(counts) for counts in zip(*parts, strict=True))
        results = [benchmark_scores(hist, self.benchmark) for hist in hists]
        content = {
            "benchmark": self.benchmark.name,
            "cam_type": self.cam_type,
            **details,
            "images": len(names) - len(run.failures),
            "failed": [name for name, _ in run.failures],
            "missing": missing,
        }
        report_scores(content, self.backgrounds, results, pixels, self.benchmark, json_file)


@dataclass
class Evaluation(ScoringStep):
    """Step 2a: counts pixels and writes nothing.

    Attributes:
        cam_dir: folder of the CAM files, or of the masks.
        cam_type: CAM type to read from the files; types with "bg" in their name contain a background channel;
            "png" evaluates index masks.
        backgrounds: background scores to try, see `background`; (None,) adds no background.
        arithmetic: "float16" compares the scores of background and classes in the number type of the CAM
            files, as for the published numbers; "float32" changes the prediction of a few pixels, at ties.
    """

    benchmark: Benchmark
    cam_dir: str
    gt_root: str
    cam_type: str = "attn_highres"
    backgrounds: tuple[float | None, ...] = (1.0, 2.0)
    arithmetic: str = "float16"

    def decode(self, name: str) -> Outcome:
        """Read and count an image. The outcome is complete: `compute` and `write` are not called."""
        if self.cam_type == MASKS:
            mask = read_mask(Path(self.cam_dir) / f"{name}.png")
            truth = read_truth(self.gt_root, name, self.benchmark.channels, mask.shape)
            self.count(*count_mask(truth, mask, self.benchmark.channels))
        else:
            truth = read_truth(self.gt_root, name, self.benchmark.channels)
            class_ids, cams = camfile.read(self.cam_dir, name, self.cam_type, rounded=False, size=truth.shape)
            self.count(*count_cams(truth, class_ids, cams, self))
        return Outcome(name)


def read_truth(gt_root: str, name: str, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return the ground-truth mask (H, W) uint8 of an image.

    Args:
        channels: number of classes; values must be below it, or 255.
        size: (H, W) of the prediction, if it is known already.

    Raises:
        ValueError: the mask cannot be read, has a value that is not a class, or differs in size from the
            prediction.
    """
    file = Path(gt_root) / f"{name}.png"
    truth = read_mask(file)
    check_values(truth, channels, file)
    if size not in (None, truth.shape):
        raise ValueError(f"the ground truth is {truth.shape} but the prediction {size} (H, W)")
    return truth


def evaluate(
    evaluation: Evaluation,
    names: Sequence[str],
    json_file: str | Path | None = None,
    allow_missing: bool = False,
    num_workers: int = 1,
) -> int:
    """Evaluate predictions, print a table of scores and write them as JSON.

    Args:
        names: image ids.
        json_file: file for the scores; None writes none.
        allow_missing: leave out images without prediction or ground truth, and list them in the JSON file.

    Returns:
        The exit code: 1 if an image failed, else 0.

    Raises:
        FileNotFoundError: predictions or ground truth are missing.
        ValueError: no ground-truth mask has a pixel of a class, and not all are background.
    """
    what = "masks" if evaluation.cam_type == MASKS else "CAMs"
    names, missing = files_present(names, evaluation.cam_dir, allow_missing, what)
    names, without_truth = files_present(names, evaluation.gt_root, allow_missing, "ground-truth masks")
    run = Run(None)  # connects the ranks, so that they notice if one dies in the check
    check_class_pixels(evaluation.gt_root, names, evaluation.benchmark, allow_background=True)
    parts = run.map(evaluation, names, num_workers)
    code = run.finish()
    if run.rank == 0:
        details = {"arithmetic": evaluation.arithmetic}
        evaluation.report(run, parts, names, missing + without_truth, details, json_file)
    return code


def benchmark_scores(hist: np.ndarray, benchmark: Benchmark, absent: str = "drop") -> dict:
    """Return `segmentation.metrics.scores` for the benchmark's groups of classes, else for its classes.

    Args:
        hist: (n, n) [truth, prediction] over the mask values.
        absent: see `scores`.

    Returns:
        See `scores`; class indices refer to `scored_names`.
    """
    if benchmark.groups:
        member = np.eye(len(benchmark.group_names), dtype=np.int64)[benchmark.groups]  # (n, groups)
        hist = member.T @ hist @ member
    return scores(hist, absent)


def scored_names(benchmark: Benchmark) -> list[str]:
    """Return the names that have an IoU: groups of classes, or the background (if any) and the classes."""
    if benchmark.groups:
        return list(benchmark.group_names)
    return ["background"] * benchmark.has_background + list(benchmark.classes)


def report_scores(
    report: dict,
    backgrounds: Sequence[float | None],
    results: list[dict],
    pixels: np.ndarray,
    benchmark: Benchmark,
    json_file: str | Path | None,
) -> None:
    """Print a table of the scores and the IoU of each class for the best background; write all as JSON.

    Args:
        report: further entries of the JSON file.
        backgrounds: (B,) background scores that were tried, see `Evaluation`.
        results: (B,) scores, see `benchmark_scores`.
        pixels: (2,) number of pixels that are predicted 255, and number of all pixels.
        json_file: None writes no file.
    """
    classes = scored_names(benchmark)
    best = max(range(len(results)), key=lambda index: (np.nan_to_num(results[index]["Mean IoU"]), -index))
    if len(results) > 1:
        print(f"{'background':<12}{'':<8}" + "".join(f"{name:<24}" for name in SUMMARY))
        for index, (score, result) in enumerate(zip(backgrounds, results, strict=True)):
            line = f"{_named(score):<12}{'best' * (index == best):<8}"
            print((line + "".join(f"{result[name]:<24.4f}" for name in SUMMARY)).rstrip())
        print(f"\nbackground {_named(backgrounds[best])}:")
    width = max(len(name) for name in (*classes, *SUMMARY)) + 2
    for index, iou in results[best]["Class IoU"].items():
        print(f"{classes[index]:<{width}}{iou:.4f}")
    print()
    for name in SUMMARY:
        print(f"{name:<{width}}{results[best][name]:.4f}")
    ignored = float(pixels[0] / pixels[1]) if pixels[1] else 0.0
    if ignored:
        print(f"{'predicted 255':<{width}}{ignored:.4f} (proportion of the pixels, left out)")
    if json_file is None:
        return
    entries = []
    for score, result in zip(backgrounds, results, strict=True):
        named = {classes[index]: iou for index, iou in result["Class IoU"].items()}
        entries.append({"background": score, **result, "Class IoU": named})
    write_json(json_file, {**report, "ignored": ignored, "best": entries[best], "all": entries})


def benchmark_of(folder: str | Path, benchmark: str | None) -> tuple[str, Benchmark]:
    """Return a benchmark, after its name or file. --benchmark overrides the record of `folder`.

    Raises:
        FileNotFoundError: `folder` does not exist.
        ValueError: `benchmark` is not given and `folder` records none.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--cam_dir: folder {folder} does not exist: give the folder of the CAMs")
    name = benchmark or read_settings(folder).get("settings", {}).get("benchmark")
    if not name or not isinstance(name, str):
        raise ValueError(f"{folder} does not record its benchmark: give --benchmark NAME or FILE.yaml")
    return name, benchmarks.load(name)


def files_present(
    names: Sequence[str], folder: str | Path, allow_missing: bool, what: str
) -> tuple[list[str], list[str]]:
    """Divide images into those with a file in `folder` and those without.

    Args:
        what: "CAMs", or a name for PNG files, such as "masks"; used in errors.

    Raises:
        FileNotFoundError: an image has no file and `allow_missing` is False, or no image has a file.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}, the folder of the {what}, does not exist: give another folder")
    with_file, missing = [], []
    for name in names:
        exists = camfile.find(folder, name) if what == "CAMs" else (Path(folder) / f"{name}.png").is_file()
        (with_file if exists else missing).append(name)
    if missing and (not allow_missing or not with_file):
        none = " (images without labels have none)" if what == "CAMs" else ""
        raise FileNotFoundError(
            f"{folder} lacks the {what} of {len(missing)} of {len(names)} images: {first_few(missing)}{none}"
            "; make them, or leave these images out with --allow_missing"
        )
    return with_file, missing


def _named(score: float | None) -> str:
    return "" if score is None else f"^{score:g}" if score >= 1 else f"{score:g}"
