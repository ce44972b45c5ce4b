"""Step 2a: CAM files, or index masks, and ground truth -> scores."""

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
from segmentation.masks import read_mask
from segmentation.metrics import joint_counts, scores

ARITHMETIC = ("float16", "float32")
INFINITY = 0x7C00  # the bits of float16's
CLOSE = 2.0**-10  # float16 numbers in [0, 1] are half as far apart at most: what differs by more stays apart
MASKS = "png"  # the cam type that stands for index masks instead of CAM files
SUMMARY = ("Mean IoU", "Pixel Accuracy", "Mean Accuracy", "Frequency Weighted IoU")


def backgrounds(threshold: float, cam_type: str, has_background: bool = True) -> tuple[float | None, ...]:
    """Return what the reference evaluation tries for a value of --cam_eval_thres: exponents 1 and 2 (1 to 10
    for maps without attention refinement) for 1 and more, constants 0.05, 0.10, ..., 0.60 below 1."""
    if cam_type == MASKS or "bg" in cam_type or not has_background:
        return (None,)
    if threshold >= 1:
        return tuple(float(exponent) for exponent in range(1, 3 if "attn" in cam_type else 11))
    return tuple(round(0.05 * step, 2) for step in range(1, 13))


def background(top: np.ndarray, score: float, arithmetic: str = "float16") -> np.ndarray:
    """Return the background's score at each pixel, of dtype `arithmetic`.

    Args:
        top: (...) the highest score of any class.
        score: >= 1: an exponent e, the background is (1 - top)^e; below 1: that constant everywhere.
        arithmetic: "float16" rounds the difference, then the power.
    """
    dtype = np.dtype(arithmetic)
    if score < 1:
        return np.full(top.shape, score, dtype)
    difference = (1 - top.astype(np.float32)).astype(dtype)
    return (difference.astype(np.float32) ** score).astype(dtype)


@cache
def _verdicts(
    backgrounds: tuple[float | None, ...], arithmetic: str
) -> tuple[list[int], list[float], np.ndarray]:
    """Return which background scores beat the best class, by intervals of the class's score.

    There are only as many scores as float16 numbers, so all are tried once instead of at every pixel.

    Returns:
        edges (I - 1,) of the intervals in rising order, as `ordered` writes them; the least float32 that are
        rounded to them, for scores in [0, 1]; and wins (I, B) bool. A tie is the background's; None never
        wins.
    """
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    wins = np.zeros((2**16, len(backgrounds)), bool)
    with np.errstate(all="ignore"):  # powers of what no CAM holds
        for index, score in enumerate(backgrounds):
            if score is not None:
                wins[:, index] = background(numbers, score, arithmetic) >= numbers
        scores, first = np.unique(ordered(numbers), return_index=True)
        numbers, wins = numbers[first].astype(np.float32), wins[first]
        changes = 1 + np.flatnonzero((wins[1:] != wins[:-1]).any(1))
        below, edges = numbers[changes - 1], numbers[changes]
        middles = (below + edges) / 2  # are rounded to the even one of the two
        rounded_up = middles.astype(np.float16) == edges
        float32_edges = np.where(rounded_up, middles, np.nextafter(middles, edges))
    return scores[changes].tolist(), float32_edges.tolist(), wins[np.append(0, changes)]


def ordered(numbers: np.ndarray) -> np.ndarray:
    """Return int16 that compare as float16 numbers do, and much faster; NaN is highest.

    What lies in [0, inf] is returned without a copy: its bits are such integers.
    """
    bits = numbers.view(np.int16)
    if bits.min(initial=0) >= 0 and bits.max(initial=0) <= INFINITY:
        return bits
    size = np.minimum(bits & 0x7FFF, INFINITY + 1)  # NaN is what is larger than infinity
    return np.where((bits < 0) & (size <= INFINITY), -size, size)


def count_cams(
    truth: np.ndarray, class_ids: np.ndarray, cams: np.ndarray, evaluation: "Evaluation"
) -> tuple[np.ndarray, int]:
    """Count the pixels of one image for all of the evaluation's background scores at once.

    A pixel is of its best class, or of the background where that scores as high; among classes ties go to
    the earlier one in `class_ids`. NaN counts as highest.

    Args:
        truth: (H, W) uint8 mask values.
        class_ids: (K,) class indices.
        cams: (K, H, W) float16; (K + 1, H, W) if they have a background channel. float32 counts as if it
            were rounded to float16, but only close rivals are.

    Returns:
        hists (B, n, n) int64 [truth, prediction] for the B background scores; and the number of pixels of
        known truth that are predicted 255 at the first of them, which are in no matrix.

    Raises:
        ValueError: a pixel of known truth is predicted as a class that the benchmark does not have.
    """
    offset = int(evaluation.benchmark.has_background)
    indices = class_ids + offset
    if "bg" in evaluation.cam_type:
        indices = np.append(0, indices)
    edges, float32_edges, wins = _verdicts(evaluation.backgrounds, evaluation.arithmetic)
    if len(cams):
        if cams.dtype == np.float32 and cams.min() >= 0 and cams.max() <= 1:
            edges = float32_edges
        else:  # float16, or NaN
            cams = ordered(cams.astype(np.float16, copy=False))
        best, top = _argmax(cams.reshape(len(cams), -1))  # (H * W,), (H * W,)
        code = best.astype(np.min_scalar_type(len(cams) * len(wins))) * len(wins)  # and the interval of top
        most = top.max()
        for edge in edges:
            if edge <= most:
                code += top >= edge
    else:  # nothing is predicted, whatever the score
        indices, wins = np.array([0 if offset else IGNORE]), np.zeros((1, len(evaluation.backgrounds)), bool)
        code = np.zeros(truth.size, np.uint8)
    joint = joint_counts(truth.ravel(), code, evaluation.benchmark.channels, len(indices) * len(wins))
    joint = joint.reshape(-1, len(indices), len(wins))  # (n, K, I)
    classes = joint @ ~wins  # (n, K, B)
    of_background = joint.sum(1, keepdims=True) @ wins  # (n, 1, B)
    return _matrices(np.append(indices, 0), np.concatenate([classes, of_background], 1))


def count_mask(truth: np.ndarray, mask: np.ndarray, channels: int) -> tuple[np.ndarray, int]:
    """Return what `count_cams` returns, with B = 1, for an index mask (H, W) uint8."""
    return _matrices(np.arange(256), joint_counts(truth, mask, channels, 256)[..., None])


def _argmax(cams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first of the highest CAMs, and its value: (K, N) -> (N,), (N,). float32 CAMs in [0, 1] are
    compared as if rounded to float16; their highest value is not rounded."""
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
        np.maximum(best, higher * best.dtype.type(index), out=best)  # later indices are higher
        np.maximum(top, channel, out=top)
    return best, top


def _matrices(indices: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Return what `count_cams` returns, from counts (n, C, B) of candidates and their mask values (C,)."""
    channels, _, backgrounds = counts.shape
    used = counts.any((0, 2))
    unknown = indices[used & (indices >= channels) & (indices != IGNORE)]
    if len(unknown):
        raise ValueError(f"the prediction holds {unknown.max()}, but there are {channels} classes")
    hists = np.zeros((backgrounds, channels, channels), np.int64)
    for candidate in np.flatnonzero(used & (indices < channels)):  # two indices may be equal
        hists[:, :, indices[candidate]] += counts[:, candidate].T
    return hists, int(counts[:, indices == IGNORE, 0].sum())


class ScoringStep(Step):
    """A step that compares predictions with ground truth; subclasses have a `benchmark` and a `cam_type`."""

    backgrounds: Sequence[float | None] = (None,)

    def __post_init__(self):
        self.reset()

    def reset(self) -> None:
        """Start to count from zero."""
        channels = self.benchmark.channels
        self.hists = np.zeros((len(self.backgrounds), channels, channels), np.int64)
        self.pixels = np.zeros(2, np.int64)

    def count(self, hists: np.ndarray, ignored: int) -> None:
        """Add what `count_cams` or `count_mask` returned for one image."""
        self.hists += hists
        self.pixels += (ignored, int(hists[0].sum()) + ignored)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return hists (B, n, n) int64 [truth, prediction] for the B background scores, and pixels (2,):
        those of known truth that are predicted 255 (and left out), and all of known truth."""
        counts = self.hists, self.pixels
        self.reset()  # for another run of the same step
        return counts

    def report(
        self, run: Run, parts: list, names: Sequence[str], missing: list[str], details: dict, json_file: Any
    ) -> None:
        """Print and write the scores of a finished run.

        Args:
            parts: what `finish` returned in each process.
            names: image ids of the run; `missing` were left out before.
            details: what else the JSON file holds.
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
        cam_type: CAMs to take from the files; a type with "bg" in its name has a background channel;
            "png" evaluates index masks.
        backgrounds: background scores to try, see `background`; (None,) where there is nothing to try.
        arithmetic: "float16" compares background and classes in the type CAMs are stored in, as for the
            published numbers; "float32" moves single pixels at ties.
    """

    benchmark: Benchmark
    cam_dir: str
    gt_root: str
    cam_type: str = "attn_highres"
    backgrounds: tuple[float | None, ...] = (1.0, 2.0)
    arithmetic: str = "float16"

    def decode(self, name: str) -> Outcome:
        """Read and count an image, after which nothing is left to compute."""
        if self.cam_type == MASKS:
            mask = read_mask(Path(self.cam_dir) / f"{name}.png")
            self.count(*count_mask(read_truth(self.gt_root, name, mask.shape), mask, self.benchmark.channels))
        else:
            class_ids, cams = camfile.read(self.cam_dir, name, self.cam_type, rounded=False)
            self.count(*count_cams(read_truth(self.gt_root, name, cams.shape[1:]), class_ids, cams, self))
        return Outcome(name)


def read_truth(gt_root: str, name: str, size: tuple[int, int]) -> np.ndarray:
    """Return the ground truth (H, W) uint8 of an image.

    Raises:
        ValueError: it cannot be read, or its size is not that of the prediction.
    """
    truth = read_mask(Path(gt_root) / f"{name}.png")
    if truth.shape != size:
        raise ValueError(f"the ground truth is {truth.shape} but the prediction {size} (H, W)")
    return truth


def evaluate(
    evaluation: Evaluation,
    names: Sequence[str],
    json_file: str | Path | None = None,
    allow_missing: bool = False,
    num_workers: int = 1,
) -> int:
    """Evaluate, print a table, write JSON.

    Args:
        names: image ids.
        json_file: where the scores are written, if anywhere.
        allow_missing: leave out images without prediction or ground truth, and report them.

    Returns:
        The exit code: 1 if an image could not be evaluated.

    Raises:
        FileNotFoundError: predictions or ground truth are missing.
    """
    what = "masks" if evaluation.cam_type == MASKS else "CAMs"
    names, missing = files_present(names, evaluation.cam_dir, allow_missing, what)
    names, without_truth = files_present(names, evaluation.gt_root, allow_missing, "ground-truth masks")
    run = Run(None)
    parts = run.map(evaluation, names, num_workers)
    code = run.finish()
    if run.rank == 0:
        details = {"arithmetic": evaluation.arithmetic}
        evaluation.report(run, parts, names, missing + without_truth, details, json_file)
    return code


def benchmark_scores(hist: np.ndarray, benchmark: Benchmark, absent: str = "drop") -> dict:
    """Return `segmentation.metrics.scores` of the benchmark's groups of classes, or else of its classes.

    Args:
        hist: (n, n) [truth, prediction], of the benchmark's masks.
        absent: see `scores`, as for what is returned; its class indices are those of `scored_names`.
    """
    if benchmark.groups:
        member = np.eye(len(benchmark.group_names), dtype=np.int64)[benchmark.groups]  # (n, groups)
        hist = member.T @ hist @ member
    return scores(hist, absent)


def scored_names(benchmark: Benchmark) -> list[str]:
    """Return what has an IoU: groups of classes, or classes with the background before them."""
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
    """Print scores as tables, the best background in full, and write them as JSON.

    Args:
        report: what else the JSON file holds.
        backgrounds: (B,) what was tried; None where there is nothing to try.
        results: (B,) see `benchmark_scores`.
        pixels: (2,) predicted 255, all.
        json_file: where, if anywhere.
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
        print(f"{'predicted 255':<{width}}{ignored:.4f} (share of pixels, left out)")
    if json_file is None:
        return
    entries = []
    for score, result in zip(backgrounds, results, strict=True):
        named = {classes[index]: iou for index, iou in result["Class IoU"].items()}
        entries.append({"background": score, **result, "Class IoU": named})
    write_json(json_file, {**report, "ignored": ignored, "best": entries[best], "all": entries})


def benchmark_of(folder: str | Path, benchmark: str | None) -> tuple[str, Benchmark]:
    """Return name or file, and the benchmark, of --benchmark, or else of the run that filled `folder`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: neither names one.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"folder {folder}, which should hold the CAMs, does not exist")
    name = benchmark or read_settings(folder).get("settings", {}).get("benchmark")
    if not name or not isinstance(name, str):
        raise ValueError(f"{folder} does not record its benchmark: give --benchmark NAME or FILE.yaml")
    return name, benchmarks.load(name)


def files_present(
    names: Sequence[str], folder: str | Path, allow_missing: bool, what: str
) -> tuple[list[str], list[str]]:
    """Divide images into those with a file in `folder` and those without.

    Args:
        what: "CAMs", or what PNGs are called.

    Raises:
        FileNotFoundError: some lack it and `allow_missing` is False, or all do.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"folder {folder}, which should hold the {what}, does not exist")
    with_file, missing = [], []
    for name in names:
        exists = camfile.find(folder, name) if what == "CAMs" else (Path(folder) / f"{name}.png").is_file()
        (with_file if exists else missing).append(name)
    if missing and (not allow_missing or not with_file):
        none = " (images without labels have none)" if what == "CAMs" else ""
        raise FileNotFoundError(
            f"{folder} lacks the {what} of {len(missing)} of {len(names)} images: {first_few(missing)}{none}"
            "; make them, or leave these images out by --allow_missing"
        )
    return with_file, missing


def _named(score: float | None) -> str:
    return "" if score is None else f"^{score:g}" if score >= 1 else f"{score:g}"
