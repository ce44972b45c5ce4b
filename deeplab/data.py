"""Where the images and masks of a configuration lie."""

from dataclasses import dataclass, replace

from deeplab.config import Config
from segmentation import benchmark as benchmarks
from segmentation.benchmark import Benchmark
from segmentation.labels import split_of


@dataclass(frozen=True)
class Split:
    """Images and their masks.

    Attributes:
        names: image ids.
        image_dir, label_dir: folders.
    """

    names: list[str]
    image_dir: str
    label_dir: str


def benchmark_of(config: Config) -> Benchmark:
    """The benchmark, at the configuration's root."""
    benchmark = benchmarks.load(config.data.benchmark)
    return replace(benchmark, root=config.data.root) if config.data.root else benchmark


def training_split(config: Config, benchmark: Benchmark) -> Split:
    """What to train on.

    Raises:
        FileNotFoundError, ValueError: see `segmentation.labels.split_of`.
    """
    data = config.data
    names = list(split_of(benchmark, data.train_split))
    image_dir = data.image_dir or benchmark.path(benchmark.image_dir)
    return Split(names, str(image_dir), str(data.label_dir or benchmark.path(benchmark.mask_dir)))


def validation_split(config: Config, benchmark: Benchmark) -> Split:
    """What to validate and test on; the masks to train on are never it.

    Raises:
        FileNotFoundError, ValueError: as `training_split`, or there is no such split.
    """
    data = config.data
    if not data.val_split:  # the benchmark's own is that to train on
        raise ValueError("the configuration names no data.val_split")
    names = list(split_of(benchmark, data.val_split))
    image_dir = data.val_image_dir or data.image_dir or benchmark.path(benchmark.image_dir)
    return Split(names, str(image_dir), str(data.val_label_dir or benchmark.path(benchmark.mask_dir)))
