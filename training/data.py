"""The images and masks that a configuration names."""

from dataclasses import replace
from typing import NamedTuple

from segmentation import benchmark as benchmarks
from segmentation.benchmark import Benchmark
from segmentation.labels import split_of
from training.config import Config


class Split(NamedTuple):
    """Image ids, and the folders of their images and masks; `label_dir` is None if no masks are needed."""

    names: list[str]
    image_dir: str
    label_dir: str | None


def benchmark_of(config: Config) -> Benchmark:
    """Return the benchmark of the configuration, with `data.root` as its folder."""
    benchmark = benchmarks.load(config.data.benchmark)
    return replace(benchmark, root=config.data.root) if config.data.root else benchmark


def training_split(config: Config, benchmark: Benchmark, needs_masks: bool = True) -> Split:
    """Return the images and masks for training. Raises the errors of `segmentation.labels.split_of`."""
    data = config.data
    names = list(split_of(benchmark, data.train_split))
    image_dir = data.image_dir or benchmark.path(benchmark.image_dir)
    label_dir = str(data.label_dir or benchmark.path(benchmark.mask_dir)) if needs_masks else None
    return Split(names, str(image_dir), label_dir)


def validation_split(config: Config, benchmark: Benchmark) -> Split:
    """Return the images and masks for validation and test. `data.label_dir` (training masks) is never used.

    Raises:
        FileNotFoundError, ValueError: see `training_split`; also if `data.val_split` is empty.
    """
    data = config.data
    if not data.val_split:  # no default: the split of the benchmark is the training split
        raise ValueError("data.val_split is empty: set it, or give --split_file FILE")
    names = list(split_of(benchmark, data.val_split))
    image_dir = data.val_image_dir or data.image_dir or benchmark.path(benchmark.image_dir)
    return Split(names, str(image_dir), str(data.val_label_dir or benchmark.path(benchmark.mask_dir)))
