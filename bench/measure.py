"""What every subcommand measures with: the machine's ceilings, interleaved rounds, peak memory, a table."""

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
REPEATS, MANY = 3, 10  # how often what is timed on its own is repeated, and how many times as often ...
BRIEF = 0.5  # ... as long as that takes less than so many seconds
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the matrix product that stands for the machine's arithmetic
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes, more than any cache holds
COMMON = (
    "images_per_s", "reference_images_per_s", "speedup", "peak_memory_mb", "reference_peak_memory_mb",
    "ceiling_share", "label_agreement",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is measured, as the command line says it.

    Attributes:
        model: what `clip.load` takes, a ViT; None: random weights in the shape of ViT-B/16.
        device: as `clip.load` takes it.
        precision: of the image tower; the reference is float32 whatever it is.
        threads: CPU threads of PyTorch and OpenCV; with a GPU, also processes that decode.
        images: images timed in a round.
        rounds: how often ours and the reference take turns.
        labels: mean number of labels of an image.
        backend: of the dense CRF, see `refinement.densecrf`.
        network: a name in `deeplab.recipe.NETWORKS`.
        width: channels of its first convolution.
        crop: side of a training sample; None: as published.
        batch, accumulate: images of a batch, batches of an iteration; None: 1 and 1 on a CPU, as published
            on a GPU.
        variants: how training computes, see `bench.train.running`; the first one's figures come first.
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
            raise ValueError("--threads, --images and --rounds must be 1 or more")
        if any(value is not None and value < 1 for value in (self.crop, self.batch, self.accumulate)):
            raise ValueError("--crop, --batch and --accumulate must be 1 or more")
        if not 1 <= self.labels <= 5:
            raise ValueError(f"--labels must be between 1 and 5, got {self.labels:g}")

    @property
    def kind(self) -> str:
        """"cpu" or "cuda"."""
        return clip.pick_device(self.device).type

    @property
    def compute(self) -> ComputeSettings:
        """What our steps compute on."""
        decode_workers = self.threads if self.kind == "cuda" else 0
        return ComputeSettings(self.device, self.precision, decode_workers=decode_workers)

    def limit_threads(self) -> None:
        """Have PyTorch and OpenCV of this process use `threads`."""
        torch.set_num_threads(self.threads)
        cv2.setNumThreads(self.threads)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a while, in which text features are cached too: those of random weights serve nobody."""
    usual = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = f"{folder}/features"
        try:
            yield Path(folder)
        finally:
            os.environ.pop(CACHE)
            if usual is not None:
                os.environ[CACHE] = usual


def synchronise(kind: str) -> None:
    """Wait until a GPU has done what it was given."""
    if kind == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], kind: str = "cpu") -> float:
    """Median time of `work`, after one call that warms up."""
    taken: list[float] = []
    while len(taken) <= REPEATS or (sum(taken) < BRIEF and len(taken) < MANY * REPEATS):
        synchronise(kind)
        start = time.perf_counter()
        work()
        synchronise(kind)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def matmul_rate(kind: str, precision: str) -> float:
    """FLOP/s of a large matrix product in the type that `precision` computes in."""
    rows, dtype = MATRIX[kind], clip.PRECISIONS[precision]
    left, right = torch.rand(2, rows, rows, device=kind).to(dtype)
    return 2 * rows**3 / seconds(lambda: left @ right, kind=kind)


def copy_rate(kind: str) -> float:
    """Bytes/s, read and written, of a large copy."""
    source = torch.zeros(COPIED[kind], dtype=torch.uint8, device=kind)
    target = torch.ones_like(source)
    return 2 * len(source) / seconds(lambda: target.copy_(source), kind=kind)


def jpeg_rate(file: Path) -> float:
    """Images/s of decoding this JPEG from memory, on one core."""
    encoded = file.read_bytes()
    return 1 / seconds(lambda: Image.open(io.BytesIO(encoded)).load())


def stage(name: str, taken: float, amount: float, unit: str, ceiling: float) -> dict:
    """One line of the stage table.

    Args:
        taken: seconds an image.
        amount: what is done for an image.
        unit: of `amount`, with "/s".
        ceiling: most that the machine does in a second, in the same unit.
    """
    rate = amount / taken
    return {"stage": name, "seconds": taken, "rate": rate, "unit": unit, "share": rate / ceiling}


def take_turns(ways: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Call each way once a round, so that a busy machine slows all alike.

    Args:
        ways: name -> a function of the round's number that returns seconds an image.

    Returns:
        name -> seconds an image of each round.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            taken[name].append(way(number))
    return taken


def compared(ours: list[float], reference: list[float]) -> dict[str, float]:
    """Seconds an image of each round -> rates from the medians, and the median of the rounds' ratios."""
    return {
        "images_per_s": 1 / statistics.median(ours),
        "reference_images_per_s": 1 / statistics.median(reference),
        "speedup": statistics.median(b / a for a, b in zip(ours, reference, strict=True)),
    }


def steady(files: Iterable[Path], warm: int) -> float:
    """Seconds an image of a step that writes these files, after the first `warm` of them.

    Files tell when they were written; a step may hand back its outcomes later, several at once.
    """
    times = sorted(file.stat().st_mtime_ns for file in files)
    return (times[-1] - times[warm - 1]) / (len(times) - warm) / 1e9


def check(outcomes: Iterable) -> None:
    """Take outcomes to the last.

    Raises:
        ValueError: an image failed.
    """
    for outcome in outcomes:
        if outcome.failure:
            raise ValueError(f"image {outcome.name} failed: {outcome.failure}")


def peak_memory(work: Callable[..., Iterator], setting: Setting, *args) -> dict[str, float]:
    """Peak memory of a process that does nothing but `work(setting, *args)`, Linux only.

    Counted is what happens after the first item that `work` yields, which loads the model: resident memory
    of the process with all processes it has started, and on a GPU what PyTorch has allocated there.

    Args:
        work: a module-level generator function.

    Returns:
        "memory_mb", and on a GPU "gpu_memory_mb".
    """
    context = multiprocessing.get_context("spawn")
    # Unlike those of multiprocessing.Pool, its processes may start processes.
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
        (process / "clear_refs").write_text("5")  # forget the peak
    peak = 0.0
    for _ in items:
        peak = max(peak, sum(_resident_peak(process) for process in _processes()))
    gpu = {"gpu_memory_mb": torch.cuda.max_memory_allocated() / 2**20} if on_gpu else {}
    return {"memory_mb": peak, **gpu}


def _processes() -> list[Path]:
    """Folders in /proc of this process and those it has started."""
    started = [Path("/proc", str(child.pid)) for child in multiprocessing.active_children()]
    return [Path("/proc/self"), *(folder for folder in started if folder.is_dir())]


def _resident_peak(process: Path) -> float:
    """MB."""
    lines = (process / "status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def table(result: dict) -> str:
    """The figures, those of each variant if there are any, and the stages below them."""
    lines = []
    for key, value in result.items():
        if key not in ("stages", "variants"):
            lines.append(f"{key:34} {value:12.4f}" if isinstance(value, float) else f"{key:34} {value!s:>12}")
    for variant, figures in result.get("variants", {}).items():
        lines.append(f"\n{variant}")
        lines += [f"  {key:32} {value:12.4f}" for key, value in figures.items()]
    lines.append(f"\n{'stage':34}{'ms an image':>14}{'achieved':>20}{'share of ceiling':>20}")
    for line in result["stages"]:
        achieved = f"{line['rate']:.4g} {line['unit']}"
        lines.append(f"{line['stage']:34}{1e3 * line['seconds']:14.3f}{achieved:>20}{line['share']:20.3f}")
    return "\n".join(lines)
