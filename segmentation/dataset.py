"""Training samples: image and mask files -> batches, in an order that depends only on a seed."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from segmentation.benchmark import IGNORE
from segmentation.images import find_image, read_rgb
from segmentation.masks import check_values, read_mask

# (image (H, W, 3) uint8 RGB, mask (H, W) uint8, generator) -> image (3, h, w) float32, mask (h, w) int64
Transform = Callable[[np.ndarray, np.ndarray, random.Random], tuple[np.ndarray, np.ndarray]]
PREFETCH = 2  # batches that are read while the trainer processes another one


class Draw(NamedTuple):
    """One sample: image `index` of the split, used at position `position` of epoch `epoch`."""

    epoch: int
    position: int
    index: int


class Batch(NamedTuple):
    """Samples of one batch. `TrainingSet` yields arrays; the trainer converts them to tensors on its device.

    Attributes:
        images: (B, 3, H, W) float32.
        labels: (B, H, W) int64 masks. Without masks (`TrainingSet.label_dir` is None) they are 0 on the image
            and 255 in the padding.
        names: names of the images.
        extras: values of `TrainingSet.extras` by name: (B, ...) arrays, or lists of B objects.
    """

    images: np.ndarray | Tensor
    labels: np.ndarray | Tensor
    names: list[str]
    extras: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Order:
    """The choice of images for each batch. It depends only on the attributes below and the batch number.

    Attributes:
        images: number of images in the split; an epoch uses each image at most once.
        batch_size: images per batch, over all processes together.
        drop_last: skip the last batch of an epoch if it is incomplete; else it is a smaller batch.
    """

    images: int
    batch_size: int
    seed: int
    drop_last: bool = False

    def __post_init__(self):
        if self.images < 1 or self.batch_size < 1:
            raise ValueError(
                f"training requires at least one image and a batch_size of 1 or more, got {self.images} "
                f"images and batch_size {self.batch_size}"
            )
        if self.drop_last and self.images < self.batch_size:
            raise ValueError(
                f"the split's {self.images} images do not fill one batch of {self.batch_size}: lower "
                "batch_size, or set drop_last to false"
            )

    def batch(self, number: int) -> list[Draw]:
        """Return the samples of batch `number`, counted from 0 over all epochs."""
        full_batches, remainder = divmod(self.images, self.batch_size)
        batches_per_epoch = full_batches + bool(remainder and not self.drop_last)
        epoch, batch_in_epoch = divmod(number, batches_per_epoch)
        start = batch_in_epoch * self.batch_size
        shuffled = _shuffled(self.images, self.seed, epoch)[start : start + self.batch_size]
        return [Draw(epoch, start + offset, index) for offset, index in enumerate(shuffled)]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


@dataclass(frozen=True)
class TrainingSet:
    """Images, with masks or other labels.

    Attributes:
        names: image names.
        image_dir: folder of the images.
        label_dir: folder of the masks `<name>.png`; None to train without masks, see `Batch`.
        channels: number of classes; mask values must be below it, or 255.
        transform: see `Transform`.
        seed: seed of the augmentation. Each sample has its own generator, made from the seed, the epoch and
            the position in the epoch. Samples therefore do not depend on the process or thread.
        extras: additional entries of a batch (image-level labels, captions): entry -> function of image name.
    """

    names: Sequence[str]
    image_dir: str
    label_dir: str | None
    channels: int
    transform: Transform
    seed: int = 0
    extras: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)

    def sample(self, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        """Return the transformed image (3, h, w) float32 and mask (h, w) int64 of a sample.

        Raises:
            FileNotFoundError, ValueError: a file is missing or invalid; the message names it.
        """
        name = self.names[draw.index]
        image = read_rgb(find_image(self.image_dir, name))
        if self.label_dir is None:
            mask = np.zeros(image.shape[:2], np.uint8)
        else:
            mask = read_labels(self.label_dir, name, self.channels, image.shape[:2])
        generator = random.Random(f"sample {self.seed} {draw.epoch} {draw.position}")
        return self.transform(image, mask, generator)

    def batches(
        self, order: Order, numbers: range, rank: int = 0, world: int = 1, threads: int = 1
    ) -> Iterator[Batch]:
        """Yield, for each batch number in `numbers`, the samples of rank `rank` (of `world` ranks).

        Threads read the batches in advance. Decoding, resizing and most of NumPy release the interpreter
        lock, so threads are as fast as processes, and their arrays need no copy.

        Raises:
            FileNotFoundError, ValueError: see `sample`; raised when the invalid batch would be yielded.
        """

        def start(number: int) -> tuple[list[str], list[Future]]:
            draws, read = order.batch(number), self.sample
            # The last, smaller batch of an epoch can leave a rank without a sample. This rank then gets a
            # sample whose pixels are all ignored, because it must take part in every gradient exchange.
            if rank >= len(draws):
                draws, read = draws[:1], self._ignored
            else:
                draws = draws[rank::world]
            return [self.names[draw.index] for draw in draws], [pool.submit(read, draw) for draw in draws]

        pool = ThreadPoolExecutor(threads)
        pending: deque[tuple[list[str], list[Future]]] = deque()
        try:
            for number in numbers:
                pending.append(start(number))
                if len(pending) > PREFETCH:
                    yield self._collate(*pending.popleft())
            while pending:
                yield self._collate(*pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ignored(self, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.sample(draw)
        return image, np.full_like(mask, IGNORE)

    def _collate(self, names: list[str], samples: list[Future]) -> Batch:
        images, labels = zip(*(sample.result() for sample in samples), strict=True)
        extras = {}
        for key, function in self.extras.items():
            values = [function(name) for name in names]
            extras[key] = np.stack(values) if isinstance(values[0], np.ndarray) else values
        return Batch(np.stack(images), np.stack(labels), names, extras)


def check_files(names: Sequence[str], image_dir: str | Path, label_dir: str | Path | None) -> None:
    """Raise FileNotFoundError for the first image or mask that does not exist."""
    for name in names:
        find_image(image_dir, name)
        if label_dir is not None and not (mask_file := Path(label_dir) / f"{name}.png").is_file():
            raise FileNotFoundError(f"mask {mask_file} of image {name} does not exist")


def read_labels(folder: str | Path, name: str, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Return the mask `<name>.png` of an image of `size` (H, W): (H, W) uint8, in [0, channels) or 255.

    Raises:
        FileNotFoundError, ValueError: the file is missing or unreadable, or its size or a value is invalid.
    """
    file = Path(folder) / f"{name}.png"
    if not file.is_file():
        raise FileNotFoundError(f"mask {file} does not exist")
    mask = read_mask(file)
    if mask.shape != size:
        raise ValueError(f"mask {file} is {mask.shape} but its image is {size} (height, width)")
    check_values(mask, channels, file)
    return mask
