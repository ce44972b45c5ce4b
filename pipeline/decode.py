"""From an image file, or its bytes, to what a network takes: labels and resized pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import clip
from pipeline.processes import Outcome, failed
from segmentation.images import find_image, read_image, shrunk
from segmentation.labels import LabelReader


class Grid(NamedTuple):
    """How a model divides images: the side of a patch, and the patches that a side has at the least."""

    patch: int
    least: int

    def size(self, image: Image.Image, factor: float, most: int | None = None) -> tuple[int, int]:
        """(H', W') that an image is resized to, see `clip.target_size`."""
        return clip.target_size(image.height, image.width, self.patch, factor, self.least, most)


def resized_views(
    image: Image.Image, grid: Grid, scales: Sequence[float], most: int
) -> tuple[np.ndarray, ...]:
    """The image at every scale, of at most `most` patches: (H', W', 3) uint8 each."""
    return tuple(clip.resize_rgb(image, grid.size(image, factor, most)) for factor in scales)


def shrunk_notes(image: Image.Image, grid: Grid, factor: float, most: int) -> list[str]:
    """What is worth counting where an image has more patches than it may have."""
    if grid.size(image, factor, most) == grid.size(image, factor):
        return []
    return [f"images shrunk to {most} patches (--max_patches)"]


class Sample(NamedTuple):
    """An image that comes with its content, and perhaps with its labels, `3 17`, from an archive. What has no
    content is no image."""

    name: str
    content: bytes | None
    labels: str | None


@dataclass
class Labelled:
    """A decoded image, see `pipeline.flow.Decoded`.

    Attributes:
        name: image id.
        keys: (K,) class indices.
        size: (H, W).
        views: see `resized_views`.
        notes: what is worth counting.
        image: (H, W, 3) uint8 RGB, or shrunk; None if nobody needs it.
    """

    name: str
    keys: list[int]
    size: tuple[int, int]
    views: tuple[np.ndarray, ...]
    notes: list[str]
    image: np.ndarray | None = None

    @property
    def shape(self) -> tuple:
        return tuple(view.shape[:2] for view in self.views)

    @property
    def cost(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Decoder:
    """Image name, or sample -> labels and resized pixels; pickled for decoding processes.

    Attributes:
        labels: of the images; None: they bring theirs.
        classes: how many there are.
        image_root: of images that come by name.
        stale: folder and suffix of files that an image without labels must not keep.
        grid: of the model.
        scales, max_patches: see `resized_views`.
        kept_pixels: the image itself is kept, shrunk to so many; None: it is not.
    """

    labels: LabelReader | None
    classes: int
    image_root: str
    stale: tuple[tuple[str, str], ...]
    grid: Grid
    scales: tuple[float, ...]
    max_patches: int
    kept_pixels: int | None = None

    def __call__(self, sample: str | Sample) -> Labelled | Outcome:
        name = sample if isinstance(sample, str) else sample.name
        try:
            return self._decoded(name, sample)
        except Exception as error:  # one bad image never loses a run
            return failed(name, error)

    def _decoded(self, name: str, sample: str | Sample) -> Labelled | Outcome:
        if isinstance(sample, Sample) and sample.content is None:
            return Outcome(name, notes=("samples without an image",))
        keys = self.labels(name) if self.labels else self._indices(sample)
        if not keys:
            for folder, suffix in self.stale:  # of labels that the image no longer has
                (Path(folder) / f"{name}{suffix}").unlink(missing_ok=True)
            return Outcome(name, notes=("images without labels",))
        if isinstance(sample, str):
            image = read_image(find_image(self.image_root, name))
        else:
            file = BytesIO(sample.content)
            file.name = name
            image = read_image(file)
        notes = shrunk_notes(image, self.grid, max(self.scales), self.max_patches)
        views = resized_views(image, self.grid, self.scales, self.max_patches)
        kept = None
        if self.kept_pixels is not None:
            rgb = image if image.mode == "RGB" else image.convert("RGB")  # which copies even RGB
            kept = shrunk(np.asarray(rgb), self.kept_pixels)
        return Labelled(name, keys, (image.height, image.width), views, notes, kept)

    def _indices(self, sample: Sample) -> list[int]:
        """The labels that an image brings."""
        name, text = sample.name, sample.labels
        if text is None:
            raise ValueError(
                f"{name} comes without labels: add {name}.cls to its shard, or give --labels FILE"
            )
        fields = text.split()
        if not all(field.isdecimal() and int(field) < self.classes for field in fields):
            raise ValueError(f"its labels are {text.strip()!r}, not class indices below {self.classes}")
        return list(dict.fromkeys(map(int, fields)))
