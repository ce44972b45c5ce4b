"""Pillow image -> network input (CLIP-ES: no crop, no padding, sides rounded up to the patch)."""
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB, of the data CLIP was trained on
STD = (0.26862954, 0.26130258, 0.27577711)


def target_size(
    height: int, width: int, patch: int, scale: float = 1.0, least: int = 1, most: int | None = None
) -> tuple[int, int]:
    """The size an image is resized to: `scale` times its own, each side rounded up to the patch.

    Args:
        least: patches that a side has at the least.
        most: patches that the image may have altogether; a larger one is shrunk until it fits.

    Returns:
        (H', W'), multiples of `patch`.
    """

    def grid(factor: float) -> tuple[int, int]:
        return tuple(max(least, math.ceil(factor * side / patch)) for side in (height, width))

    rows, columns = grid(scale)
    while most is not None and rows * columns > max(most, least * least):
        scale *= min(0.99, (most / (rows * columns)) ** 0.5)
        rows, columns = grid(scale)
    return rows * patch, columns * patch


def preprocess(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Resize (Pillow's bicubic, in the image's own mode) and normalise.

    Args:
        image: any mode; grey stays grey and a palette stays a palette until it is resized, as
            published results have it (a palette is thereby resized by nearest neighbour).
        size: (H', W').

    Returns:
        (3, H', W') float32.
    """
    height, width = size
    resized = image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1) / 255  # (3, H', W')
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std
