"""Pillow image -> network input (CLIP-ES: no crop, no padding, sides rounded up to the patch)."""
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip.model import Config


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


def resize_rgb(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize by Pillow's bicubic in the image's own mode, then turn to RGB.

    Args:
        image: any mode; grey stays grey and a palette stays a palette until it is resized, as
            published results have it (a palette is thereby resized by nearest neighbour).
        size: (H', W').

    Returns:
        (H', W', 3) uint8.
    """
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB"))


def normalize(
    pixels: Tensor,
    mean: tuple[float, float, float] = Config.mean,
    std: tuple[float, float, float] = Config.std,
) -> Tensor:
    """8-bit RGB -> network input.

    Args:
        pixels: (..., H', W', 3) uint8.
        mean, std: of RGB in [0, 1], as the model was trained with; the default is OpenAI's.

    Returns:
        (..., 3, H', W') float32.
    """
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels.movedim(-1, -3) / 255 - mean) / std


def preprocess(
    image: Image.Image,
    size: tuple[int, int],
    mean: tuple[float, float, float] = Config.mean,
    std: tuple[float, float, float] = Config.std,
) -> Tensor:
    """Resize and normalize one image: (3, H', W') float32; see `resize_rgb` and `normalize`."""
    return normalize(torch.from_numpy(resize_rgb(image, size).copy()), mean, std)
