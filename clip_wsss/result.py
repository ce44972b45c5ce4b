"""What segmenting an image gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from segmentation.benchmark import voc_palette
from segmentation.figures import explained


@dataclass
class Result:
    """The segmentation of one image of H x W pixels.

    Attributes:
        names: K class names.
        mask: (H, W) uint8: 0 background, k + 1 for names[k], 255 ignored (posterior below `confidence`).
        posterior: (K + 1, H, W) float32, background first, summing to 1.
        image: (H, W, 3) uint8 RGB.
        cams: (K, H, W) float16 in [0, 1]; None for a trained network.
        palette: (256, 3) uint8, colors of the mask's values.
    """

    names: Sequence[str]
    mask: np.ndarray
    posterior: np.ndarray
    image: np.ndarray
    cams: np.ndarray | None = None
    palette: np.ndarray | None = None

    def overlay(self) -> Image.Image:
        """Return the image with the classes painted over it, and a legend below."""
        palette = voc_palette() if self.palette is None else self.palette
        return Image.fromarray(explained(self.image, self.mask, ["background", *self.names], palette))

    def save(self, file: str) -> None:
        """Write the mask as palette PNG, as the scripts do."""
        from segmentation.masks import write_mask

        write_mask(file, self.mask, voc_palette() if self.palette is None else self.palette)
