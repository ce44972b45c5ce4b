"""Shared by the subcommands: peak rates of the machine, alternating rounds, peak memory, the table."""

import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from PIL import Image

import clip
from pipeline.compute import ComputeSettings

CACHE = "CLIP_WSSS_CACHE"
REPEATS = 3  # minimum of repetitions in `seconds`
MANY, BRIEF = 10, 0.5  # up to MANY * REPEATS repetitions, until they take BRIEF seconds in total
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the matrix product that measures the peak FLOP/s
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes, larger than any cache
# Results of every subcommand. ceiling_share: fraction of the machine's peak rate that is reached.
# label_agreement: fraction of equal labels in both versions.
COMMON = (
    "images_per_s", "reference_images_per_s", "speedup", "peak_memory_mb", "reference_peak_memory_mb",
    "ceiling_share", "label_agreement",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Settings of a measurement, from the command line.

    Attributes:
        model: a ViT, see `clip.load`; None: random weights in the shape of ViT-B/16.
        device: see `clip.load`.
        precision: of the image tower; the reference always uses float32.
        threads: CPU threads of PyTorch and OpenCV; with a GPU, also the number of decoding processes.
        images: number of images timed per round.
        rounds: number of rounds; each runs ours and the reference once.
        labels: mean number of labels per image.
        backend: backend of the dense CRF, see `refinement.densecrf`.
        network: a name in `deeplab.recipe.NETWORKS`.
        width: channels of the network's first convolution.
        crop: side of a training sample in pixels; None: as published.
        batch, accumulate: images per batch, batches per iteration; None: 1 and 1 on a CPU, as published on a
            GPU.
        variants: precisions and options of training, see `bench.train.run_config`; the results of the first
            one are also the main results.
    """

    model: str | None = None
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1
    images: int = 4
    rounds: int = 3
    labels: float = 1.5
    backend: str = "auto"
    network: str = "deeplab_v2"
    width: int = 64
    crop: int | None = None
    batch: int | None = None
    accumulate: int | None = None
    variants: Sequence[str] = ("fp32", "bf16")

    def __post_init__(self):
        if min(self.threads, self.images, self.rounds) < 1:
            raise ValueError(
                "--threads, --images and --rounds must be 1 or more, got "
                f"{self.threads}, {self.images}, {self.rounds}"
            )
        if any(value is not None and value < 1 for value in (self.crop, self.batch, self.accumulate)):
            raise ValueError(
                "--crop, --batch and --accumulate must be 1 or more, got "
                f"{self.crop}, {self.batch}, {self.accumulate}"
            )
        if not 1 <= self.labels <= 5:
            raise ValueError(f"--labels must be between 1 and 5, got {self.labels:g}")

    @property
    def kind(self) -> str:
        """"cpu" or "cuda"."""
        return clip.pick_device(self.device).type

    @property
    def compute(self) -> ComputeSettings:
        """Settings of computation for our steps."""
        decode_workers = self.threads if self.kind == "cuda" else 0
        return ComputeSettings(self.device, self.precision, decode_workers=decode_workers)

    def limit_threads(self) -> None:
        """Limit PyTorch and OpenCV in this process to `threads`."""
        torch.set_num_threads(self.threads)
        cv2.setNumThreads(self.threads)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder that also caches text features, because no later run has the same weights."""
    previous = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = f"{folder}/features"
        try:
            yield Path(folder)
        finally:
            os.environ.pop(CACHE)
            if previous is not None:
                os.environ[CACHE] = previous


def synchronize(kind: str) -> None:
    """Wait until the GPU has finished all its work."""
    if kind == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], kind: str = "cpu") -> float:
    """Return the median time of `work` in seconds, after one call as warm-up."""
    taken: list[float] = []
    while len(taken) <= REPEATS or (sum(taken) < BRIEF and len(taken) < MANY * REPEATS):
        synchronize(kind)
        start = time.perf_counter()
        work()
        synchronize(kind)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def matmul_rate(kind: str, precision: str) -> float:
    """Return FLOP/s of a large matrix product in the data type of `precision`."""
    rows, dtype = MATRIX[kind], clip.PRECISIONS[precision]
    left, right = torch.rand(2, rows, rows, device=kind).to(dtype)
    return 2 * rows**3 / seconds(lambda: left @ right, kind=kind)


def copy_rate(kind: str) -> float:
    """Return bytes/s of a large copy, counting reads and writes."""
    source = torch.zeros(COPIED[kind], dtype=torch.uint8, device=kind)
    target = torch.ones_like(source)
    return 2 * len(source) / seconds(lambda: target.copy_(source), kind=kind)


def jpeg_rate(file: Path) -> float:
    """Return images/s of decoding this JPEG from memory, on one core."""
    encoded = file.read_bytes()
    return 1 / seconds(lambda: Image.open(io.BytesIO(encoded)).load())


def stage(name: str, taken: float, amount: float, unit: str, ceiling: float) -> dict:
    """Return one row of the stage table.

    Args:
        taken: seconds per image.
        amount: amount of work per image.
        unit: unit of `amount`, with "/s".
        ceiling: peak rate of the machine, in the same unit.
    """
    rate = amount / taken
    return {"stage": name, "seconds": taken, "rate": rate, "unit": unit, "share": rate / ceiling}


def take_turns(versions: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Call each function once per round, so that other load on the machine slows all of them alike.

    Args:
        versions: name -> function of the round's number that returns seconds per image.

    Returns:
        name -> seconds per image of each round.
    """
    taken: dict[str, list[float]] = {name: [] for name in versions}
    for number in range(rounds):
        for name, version in versions.items():
            taken[name].append(version(number))
    return taken


def compared(ours: list[float], reference: list[float]) -> dict[str, float]:
    """Return rates from the median times, and the median of the rounds' speedups.

    Args:
        ours, reference: seconds per image, for each round.
    """
    return {
        "images_per_s": 1 / statistics.median(ours),
        "reference_images_per_s": 1 / statistics.median(reference),
        "speedup": statistics.median(b / a for a, b in zip(ours, reference, strict=True)),
    }


def steady(files: Iterable[Path], warm: int) -> float:
    """Return the seconds per image of a step that writes these files, without the first `warm` files.

    The times are those of the files on disk, because a step may yield outcomes later, and several at once.
    """
    times = sorted(file.stat().st_mtime_ns for file in files)
    return (times[-1] - times[warm - 1]) / (len(times) - warm) / 1e9


def check(outcomes: Iterable) -> None:
    """Consume all outcomes.

    Raises:
        ValueError: an image has failed.
    """
    for outcome in outcomes:
        if outcome.failure:
            raise ValueError(f"image {outcome.name} failed: {outcome.failure}")


def peak_memory(work: Callable[..., Iterator], setting: Setting, *args) -> dict[str, float]:
    """Return the peak memory of a process that runs only `work(setting, *args)`; Linux only.

    The measurement starts after the first item of `work`, so it excludes loading the model. It covers the
    resident memory of the process and its child processes, and on a GPU the memory allocated by PyTorch.

    Args:
        work: a module-level generator function.

    Returns:
        "memory_mb", and on a GPU "gpu_memory_mb".
    """
    context = multiprocessing.get_context("spawn")
    # A process of this pool may start child processes; a process of multiprocessing.Pool may not.
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_watch, work, setting, *args).result()


def _watch(work: Callable[..., Iterator], setting: Setting, *args) -> dict[str, float]:
    setting.limit_threads()
    items = work(setting, *args)
    next(items)
    on_gpu = setting.kind == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for process in _processes():
        (process / "clear_refs").write_text("5")  # reset the peak
    peak = 0.0
    for _ in items:
        peak = max(peak, sum(_resident_peak(process) for process in _processes()))
    gpu = {"gpu_memory_mb": torch.cuda.max_memory_allocated() / 2**20} if on_gpu else {}
    return {"memory_mb": peak, **gpu}


def _processes() -> list[Path]:
    """Return the folders in /proc of this process and its children."""
    started = [Path("/proc", str(child.pid)) for child in multiprocessing.active_children()]
    return [Path("/proc/self"), *(folder for folder in started if folder.is_dir())]


def _resident_peak(process: Path) -> float:
    """Return the peak resident memory in MB."""
    lines = (process / "status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def table(result: dict) -> str:
    """Return the table: the results, the results of each variant, and the stages."""
    lines = []
    for key, value in result.items():
        if key not in ("stages", "variants"):
            lines.append(f"{key:34} {value:12.4f}" if isinstance(value, float) else f"{key:34} {value!s:>12}")
    for variant, figures in result.get("variants", {}).items():
        lines.append(f"\n{variant}")
        lines += [f"  {key:32} {value:12.4f}" for key, value in figures.items()]
    lines.append(f"\n{'stage':34}{'ms per image':>14}{'achieved':>20}{'share of ceiling':>20}")
    for line in result["stages"]:
        achieved = f"{line['rate']:.4g} {line['unit']}"
        lines.append(f"{line['stage']:34}{1e3 * line['seconds']:14.3f}{achieved:>20}{line['share']:20.3f}")
    return "\n".join(lines)
