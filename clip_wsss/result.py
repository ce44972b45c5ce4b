"""The segmentation of one image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from segmentation.benchmark import voc_palette
from segmentation.figures import labeled_overlay
from segmentation.masks import write_mask


@dataclass(repr=False)
class Result:
    """The segmentation of one image of H x W pixels.

    Attributes:
        names: K class names.
        mask: (H, W) uint8: 0 background, k + 1 for names[k], 255 ignored. Without a background class, k for
            names[k].
        posterior: (K + 1, H, W) float32, background first, summing to 1; (K, H, W) without background.
        image: (H, W, 3) uint8 RGB.
        cams: (K, H, W) float16 in [0, 1]; None for a trained network.
        has_background: whether there is a background class.
        palette: (256, 3) uint8, colors of the mask's values.
    """

    names: Sequence[str]
    mask: np.ndarray
    posterior: np.ndarray
    image: np.ndarray
    cams: np.ndarray | None = None
    has_background: bool = True
    palette: np.ndarray = field(default_factory=voc_palette)

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return f"Result({height} x {width} pixels, names={list(self.names)})"

    def overlay(self) -> Image.Image:
        """Return the image with the classes painted over it, and a legend below."""
        names = ["background"] * self.has_background + list(self.names)
        return Image.fromarray(
            labeled_overlay(self.image, self.mask, names, self.palette, self.has_background)
        )

    def save(self, file: str | Path) -> None:
        """Write the mask as palette PNG, as the scripts do."""
        write_mask(file, self.mask, self.palette)
