"""Decoding: read an image file, or its bytes, with its labels, and resize it for the network."""

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

import clip
from clip.model import CLIP, VisionTransformer
from foundation.files import below
from pipeline.processes import Outcome
from pipeline.step import Decoded
from segmentation.images import find_image, read_image, shrunk
from segmentation.labels import LabelReader
from segmentation.names import shortened

INDEX = re.compile("[0-9]{1,9}")  # a class index in text
RESNET_MIN_CELLS = 2  # minimum number of stride-32 cells per side for the attention pooling of a ResNet tower


class Grid(NamedTuple):
    """How a model divides images: side of a patch in pixels, and minimum number of patches per side."""

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
    """Return the image resized to every scale, (H', W', 3) uint8 each, with at most `max_patches` patches."""
    return tuple(clip.resize_rgb(image, grid.size(image, factor, max_patches)) for factor in scales)


def shrunk_notes(image: Image.Image, grid: Grid, factor: float, max_patches: int) -> list[str]:
    """Return a note if the image has more patches than `max_patches`."""
    if grid.size(image, factor, max_patches) == grid.size(image, factor):
        return []
    return [f"images shrunk to {max_patches} patches (--max_patches)"]


class Sample(NamedTuple):
    """A sample of a tar shard: the content of an image file and its labels as text, such as "3 17". Each
    is None if the shard lacks it. `fault` says why the sample cannot be used; for `notes` see `Decoded`."""

    name: str
    content: bytes | None = None
    labels: str | None = None
    fault: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class LabeledImage(Decoded):
    """A decoded image with its labels.

    Attributes:
        class_ids: (K,) class indices.
        size: (H, W).
        views: see `resized_views`.
        image: (H, W, 3) uint8 RGB, shrunk to `Decoder.kept_pixels`; None if the step does not need it.
        group: images share a batch only if their groups are equal.
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
    """Function that returns the labels and resized pixels of an image name or `Sample`. It is pickled for
    decoding processes.

    Attributes:
        labels: reader of the images' labels; None: every sample contains its labels, see `Sample`.
        image_root: folder of the images that are given by name.
        stale: (folder, suffix) of the output files to remove for images without labels.
        kept_pixels: also return the image itself, shrunk to at most this many pixels; None returns only the
            views.
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
        if isinstance(sample, Sample) and sample.fault:
            raise ValueError(sample.fault)
        if isinstance(sample, Sample) and sample.content is None:
            return Outcome(name, notes=("samples without an image",))
        class_ids = self.labels(name) if self.labels else self._own_labels(sample)
        if not class_ids:
            for folder, suffix in self.stale:  # an earlier run made them, from other labels
                below(folder, f"{name}{suffix}").unlink(missing_ok=True)
            return Outcome(name, notes=("images without labels",))
        if isinstance(sample, str):
            file = find_image(self.image_root, sample)
        else:
            file = BytesIO(sample.content)
            file.name = name
        image = read_image(file)
        notes = shrunk_notes(image, self.grid, max(self.scales), self.max_patches)
        if isinstance(sample, Sample):
            notes += sample.notes
        views = resized_views(image, self.grid, self.scales, self.max_patches)
        pixels = None
        if self.kept_pixels is not None:
            rgb = image if image.mode == "RGB" else image.convert("RGB")  # convert copies even RGB images
            pixels = shrunk(np.asarray(rgb), self.kept_pixels)
        return LabeledImage(name, class_ids, (image.height, image.width), views, pixels, notes=notes)

    def _own_labels(self, sample: Sample) -> list[int]:
        name, text = sample.name, sample.labels
        if text is None:
            raise ValueError(
                f"{name} has no labels: add {name}.cls to its shard, or give --labels FILE"
            )
        words = text.split()
        if not all(INDEX.fullmatch(word) and int(word) < self.num_classes for word in words):
            raise ValueError(
                f"{name}.cls contains {shortened(text.strip())}: expected class indices "
                f"0..{self.num_classes - 1}, separated by spaces"
            )
        return list(dict.fromkeys(map(int, words)))
