"""Training samples: image and mask files -> what a network eats, in an order that depends on a seed alone."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segmentation.benchmark import IGNORE
from segmentation.images import find_image, read_rgb
from segmentation.masks import read_mask

# (image (H, W, 3) uint8 RGB, mask (H, W) uint8, generator) -> image (3, h, w) float32, mask (h, w) int64
Transform = Callable[[np.ndarray, np.ndarray, random.Random], tuple[np.ndarray, np.ndarray]]
AHEAD = 2  # batches that are read while one is computed


class Draw(NamedTuple):
    """One sample: image `index` of the split, which comes at `position` of an epoch."""

    epoch: int
    position: int
    index: int


class Batch(NamedTuple):
    """Images (B, 3, H, W) float32, masks (B, H, W) int64, and the images' names."""

    images: np.ndarray
    labels: np.ndarray
    names: list[str]


@dataclass(frozen=True)
class Order:
    """Which images a batch holds: a function of the seed and of the batch's number, of nothing else.

    Attributes:
        images: of the split; each comes once an epoch.
        batch_size: images of a batch, of all processes together.
        drop_last: leave out the images of an epoch that fill no batch; else they make a smaller one.
    """

    images: int
    batch_size: int
    seed: int
    drop_last: bool = False

    def __post_init__(self):
        if self.images < 1 or self.batch_size < 1:
            raise ValueError("training needs at least one image, and one in a batch")
        if self.drop_last and self.images < self.batch_size:
            raise ValueError(
                f"the split's {self.images} images do not fill one batch of {self.batch_size}: lower "
                "batch_size, or set drop_last to false"
            )

    def batch(self, number: int) -> list[Draw]:
        """The samples of batch `number` (from 0, running on over epochs)."""
        whole, rest = divmod(self.images, self.batch_size)
        epoch, place = divmod(number, whole + bool(rest and not self.drop_last))
        start = place * self.batch_size
        shuffled = _shuffled(self.images, self.seed, epoch)[start : start + self.batch_size]
        return [Draw(epoch, start + offset, index) for offset, index in enumerate(shuffled)]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


@dataclass(frozen=True)
class TrainingSet:
    """Images with masks.

    Attributes:
        names: image ids.
        image_dir, label_dir: their folders; a mask is `<name>.png`.
        channels: values a mask may hold besides 255.
        transform: see `Transform`.
        seed: of the augmentation: each sample has a generator of its own, made of the seed, the epoch and
            its position there, whichever process or thread draws it.
    """

    names: Sequence[str]
    image_dir: str
    label_dir: str
    channels: int
    transform: Transform
    seed: int = 0

    def sample(self, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        """Image (3, h, w) float32 and mask (h, w) int64 as `transform` gives them.

        Raises:
            FileNotFoundError, ValueError: naming the file that is missing, unreadable or does not fit.
        """
        name = self.names[draw.index]
        image_file, mask_file = find_image(self.image_dir, name), Path(self.label_dir) / f"{name}.png"
        image, mask = read_rgb(image_file), read_mask(mask_file)
        if image.shape[:2] != mask.shape:
            raise ValueError(
                f"mask {mask_file} is {mask.shape} but image {image_file} {image.shape[:2]} (height, width)"
            )
        check_values(mask, self.channels, mask_file)
        generator = random.Random(f"sample {self.seed} {draw.epoch} {draw.position}")
        return self.transform(image, mask, generator)

    def batches(
        self, order: Order, numbers: range, rank: int = 0, world: int = 1, threads: int = 1
    ) -> Iterator[Batch]:
        """The part of rank `rank` in each of the batches `numbers`, read ahead by threads.

        Decoding, resizing and most of what NumPy does let other threads run, so threads serve as well as
        processes would, and hand over their arrays without a copy.

        Raises:
            FileNotFoundError, ValueError: see `sample`, when the batch is due.
        """

        def start(number: int) -> list[tuple[str, Future]]:
            draws = order.batch(number)
            # A rank for which nothing is left (of the last, smaller batch of an epoch) computes on a sample
            # without labels, for it has to take part in every exchange of gradients.
            read, mine = self.sample, draws[rank::world]
            if not mine:
                read, mine = self._unlabelled, draws[:1]
            return [(self.names[draw.index], pool.submit(read, draw)) for draw in mine]

        pool = ThreadPoolExecutor(threads)
        pending: deque[list[tuple[str, Future]]] = deque()
        try:
            for number in numbers:
                pending.append(start(number))
                if len(pending) > AHEAD:
                    yield _collected(pending.popleft())
            while pending:
                yield _collected(pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _unlabelled(self, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.sample(draw)
        return image, np.full_like(mask, IGNORE)


def _collected(samples: list[tuple[str, Future]]) -> Batch:
    images, labels = zip(*(future.result() for _, future in samples), strict=True)
    return Batch(np.stack(images), np.stack(labels), [name for name, _ in samples])


def check_files(names: Sequence[str], image_dir: str | Path, label_dir: str | Path) -> None:
    """Raises FileNotFoundError for the first image or mask that is not there."""
    for name in names:
        find_image(image_dir, name)
        mask_file = Path(label_dir) / f"{name}.png"
        if not mask_file.is_file():
            raise FileNotFoundError(f"mask {mask_file} of image {name} does not exist")


def check_values(mask: np.ndarray, channels: int, file: str | Path) -> None:
    """Raises ValueError if a mask (H, W) uint8 holds a value that is neither a class nor 255."""
    allowed = np.zeros(256, bool)
    allowed[:channels] = allowed[IGNORE] = True
    wrong = ~allowed[mask]
    if wrong.any():
        raise ValueError(
            f"mask {file} holds {mask[wrong][0]}, which is neither one of the {channels} classes (0 to "
            f"{channels - 1}) nor {IGNORE}"
        )
