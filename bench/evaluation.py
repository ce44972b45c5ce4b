"""Step 2a, from CAM files and ground truth to confusion matrices for two background scores."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

import voc12
from bench import data, measure
from bench.measure import Setting
from bench.reference import reference_evaluation
from pipeline.evaluate import Evaluation, count_cams
from pipeline.processes import Outcome, drain
from pipeline.step import run_step
from segmentation import camfile
from segmentation.masks import read_mask

BENCHMARK = voc12.BENCHMARK
EXPONENTS = (1.0, 2.0)
GROWTH = 4  # memory is also measured for this multiple of the images


def ours(
    setting: Setting, folder: Path, names: Sequence[str], format: str = "compact"
) -> Iterator[Outcome]:
    """Run our step 2a; the generator returns the value of `Evaluation.finish`."""
    step = Evaluation(BENCHMARK, str(folder / format), str(folder / "truth"), backgrounds=EXPONENTS)
    return run_step(names, 0, step)


def reference(setting: Setting, folder: Path, names: Sequence[str]) -> Iterator[list[np.ndarray]]:
    """Run the reference: first on one image as warm-up, then on all."""
    for part in (names[:1], names):
        yield reference_evaluation(part, folder / "full", folder / "truth", EXPONENTS, BENCHMARK.channels)


def run(setting: Setting) -> dict:
    """Measure; see `bench.measure.COMMON` for the results that every subcommand returns.

    "full_images_per_s" and "full_speedup" are those of our step on the reference's full CAM files.
    "peak_memory_4n_mb" is for 4 times as many images.
    """
    setting.limit_threads()
    with measure.scratch() as folder:
        names = data.write_cams(folder, setting.images, setting.labels)
        matrices = {}

        def version(name: str, work: Callable[[], list[np.ndarray]]) -> Callable[[int], float]:
            work()  # warms up

            def in_turn(number: int) -> float:
                start = time.perf_counter()
                matrices[name] = work()
                return (time.perf_counter() - start) / len(names)

            return in_turn

        turns = {
            "compact": version("compact", lambda: _matrices(ours(setting, folder, names))),
            "full": version("full", lambda: _matrices(ours(setting, folder, names, "full"))),
            "reference": version("reference", lambda: list(reference(setting, folder, names))[-1]),
        }
        taken = measure.take_turns(turns, setting.rounds)
        result = measure.compared(taken["compact"], taken["reference"])
        full = measure.compared(taken["full"], taken["reference"])
        result |= {f"full_{key}": full[key] for key in ("images_per_s", "speedup")}
        result["label_agreement"] = _agreement(matrices["compact"], matrices["reference"])
        for prefix, work in (("", ours), ("reference_", reference)):
            for suffix, times in (("", 1), (f"_{GROWTH}n", GROWTH)):
                peak = measure.peak_memory(work, setting, folder, names * times)
                result[f"{prefix}peak_memory{suffix}_mb"] = peak["memory_mb"]
        result["stages"], least = stages(folder, names[0])
        result["ceiling_share"] = least * result["images_per_s"]
    return result


def stages(folder: Path, name: str) -> tuple[list[dict], float]:
    """Time the stages for one image.

    Returns:
        The stages, and the seconds for a copy of the full-size maps and the ground truth.
    """
    copied = measure.copy_rate("cpu")
    truth = read_mask(folder / "truth" / f"{name}.png")
    class_ids, maps = camfile.read(folder / "compact", name, rounded=False)
    stored = 2 * maps.size  # bytes of the full-size float16 maps
    evaluation = Evaluation(BENCHMARK, "", "", backgrounds=EXPONENTS)
    works: dict[str, tuple[Callable, int]] = {
        "read ground truth": (lambda: read_mask(folder / "truth" / f"{name}.png"), truth.nbytes),
        "read compact CAMs": (lambda: camfile.read(folder / "compact", name, rounded=False), stored),
        "read full CAMs": (lambda: camfile.read(folder / "full", name), stored),
        "count": (lambda: count_cams(truth, class_ids, maps, evaluation), stored + truth.nbytes),
    }
    rows = [
        measure.stage(stage, measure.seconds(work), moved / 1e9, "GB/s", copied / 1e9)
        for stage, (work, moved) in works.items()
    ]
    return rows, 2 * (stored + truth.nbytes) / copied


def _matrices(outcomes: Iterator[Outcome]) -> list[np.ndarray]:
    """Return the confusion matrices (n, n) of both exponents."""
    hists, _ = drain(outcomes, lambda outcome: measure.check([outcome]))
    return list(hists)


def _agreement(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Return the fraction of pixels that both confusion matrices count in the same cell."""
    pairs = [np.minimum(a, b).sum() / b.sum() for a, b in zip(ours, theirs, strict=False)]
    return float(min(pairs))
