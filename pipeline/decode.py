"""From an image file, or its bytes, to what a network takes: labels and resized pixels."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import clip
from clip.model import CLIP, VisionTransformer
from pipeline.processes import Outcome
from pipeline.step import Decoded
from segmentation.images import find_image, read_image, shrunk
from segmentation.labels import LabelReader

RESNET_MIN_CELLS = 2  # stride-32 cells per side that a ResNet tower needs to attend over


class Grid(NamedTuple):
    """How a model divides images: the side of a patch in pixels, and the least number of patches per side."""

    patch: int
    min_side: int = 1

    @staticmethod
    def of(model: CLIP) -> "Grid":
        is_vit = isinstance(model.visual, VisionTransformer)
        return Grid(model.visual.patch_size, 1 if is_vit else RESNET_MIN_CELLS)

    def size(self, image: Image.Image, factor: float, max_patches: int | None = None) -> tuple[int, int]:
        """Return the (H', W') that an image is resized to, see `clip.target_size`."""
        return clip.target_size(image.height, image.width, self.patch, factor, self.min_side, max_patches)


def resized_views(
    image: Image.Image, grid: Grid, scales: Sequence[float], max_patches: int
) -> tuple[np.ndarray, ...]:
    """Return the image at every scale, of at most `max_patches` patches: (H', W', 3) uint8 each."""
    return tuple(clip.resize_rgb(image, grid.size(image, factor, max_patches)) for factor in scales)


def shrunk_notes(image: Image.Image, grid: Grid, factor: float, max_patches: int) -> list[str]:
    """Return a note if the image has more patches than `max_patches`."""
    if grid.size(image, factor, max_patches) == grid.size(image, factor):
        return []
    return [f"images shrunk to {max_patches} patches (--max_patches)"]


class Sample(NamedTuple):
    """An entry of an archive: the content of an image file and its labels ("3 17"), None if missing."""

    name: str
    content: bytes | None
    labels: str | None


@dataclass
class LabeledImage(Decoded):
    """A decoded image with its labels.

    Attributes:
        class_ids: (K,) class indices.
        size: (H, W).
        views: see `resized_views`.
        image: (H, W, 3) uint8 RGB, or shrunk; None if no stage needs it.
        group: only images of equal groups share a batch.
    """

    class_ids: list[int]
    size: tuple[int, int]
    views: tuple[np.ndarray, ...]
    image: np.ndarray | None = None
    group: Hashable = None

    @property
    def shape(self) -> tuple:
        return (*(view.shape[:2] for view in self.views), self.group)

    def patches(self, model: CLIP) -> int:
        """Return the number of patches of the largest view."""
        return max(math.prod(view.shape[:2]) for view in self.views) // model.visual.patch_size**2

    @property
    def cost(self) -> int:
        return len(self.class_ids)


@dataclass(frozen=True)
class Decoder:
    """Image name, or sample -> labels and resized pixels; pickled for decoding processes.

    Attributes:
        labels: reader of the images' labels; None: samples bring their own.
        image_root: folder of images that come by name.
        stale: folder and suffix of files to remove for images without labels.
        kept_pixels: most pixels of the image that is returned beside the views, which is shrunk to fit; None
            returns no image.
    """

    labels: LabelReader | None
    num_classes: int
    image_root: str
    stale: tuple[tuple[str, str], ...]
    grid: Grid
    scales: tuple[float, ...]
    max_patches: int
    kept_pixels: int | None = None

    def __call__(self, sample: str | Sample) -> LabeledImage | Outcome:
        name = sample if isinstance(sample, str) else sample.name
        if isinstance(sample, Sample) and sample.content is None:
            return Outcome(name, notes=("samples without an image",))
        class_ids = self.labels(name) if self.labels else self._own_labels(sample)
        if not class_ids:
            for folder, suffix in self.stale:  # made of labels that the image no longer has
                (Path(folder) / f"{name}{suffix}").unlink(missing_ok=True)
            return Outcome(name, notes=("images without labels",))
        if isinstance(sample, str):
            file = find_image(self.image_root, sample)
        else:
            file = BytesIO(sample.content)
            file.name = name
        image = read_image(file)
        notes = shrunk_notes(image, self.grid, max(self.scales), self.max_patches)
        views = resized_views(image, self.grid, self.scales, self.max_patches)
        pixels = None
        if self.kept_pixels is not None:
            rgb = image if image.mode == "RGB" else image.convert("RGB")  # which copies even RGB
            pixels = shrunk(np.asarray(rgb), self.kept_pixels)
        return LabeledImage(name, class_ids, (image.height, image.width), views, pixels, notes=notes)

    def _own_labels(self, sample: Sample) -> list[int]:
        name, text = sample.name, sample.labels
        if text is None:
            raise ValueError(
                f"{name} comes without labels: add {name}.cls to its shard, or give --labels FILE"
            )
        words = text.split()
        if not all(word.isdecimal() and int(word) < self.num_classes for word in words):
            raise ValueError(f"its labels are {text.strip()!r}, not class indices below {self.num_classes}")
        return list(dict.fromkeys(map(int, words)))
