"""Pillow image -> network input, as in CLIP-ES: sides rounded up to whole patches, no crop, no padding."""
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip.model import RGB, Config


def target_size(
    height: int, width: int, patch: int, scale: float = 1.0, least: int = 1, most: int | None = None
) -> tuple[int, int]:
    """Return the network input size (H', W'): `scale` times the image size, rounded up to whole patches.

    Args:
        least: minimum number of patches along each side.
        most: maximum number of patches of the image; a larger image is shrunk until it fits. None: no limit.
    """

    def grid(factor: float) -> tuple[int, int]:
        return tuple(max(least, math.ceil(factor * side / patch)) for side in (height, width))

    rows, columns = grid(scale)
    while most is not None and rows * columns > max(most, least * least):
        scale *= min(0.99, (most / (rows * columns)) ** 0.5)
        rows, columns = grid(scale)
    return rows * patch, columns * patch


def resize_rgb(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize an image of any mode to `size` (H', W') by Pillow's bicubic and return (H', W', 3) uint8 RGB.

    The image is resized before it is converted to RGB. Published results depend on this order: Pillow resizes
    palette images by nearest neighbor.
    """
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC).convert("RGB"))


def normalize(pixels: Tensor, mean: RGB = Config.mean, std: RGB = Config.std) -> Tensor:
    """Return network input (..., 3, H', W') float32 from `pixels` (..., H', W', 3) uint8 RGB.

    `mean` and `std` are the statistics of RGB values in [0, 1] used in the model's training; the defaults are
    OpenAI's.
    """
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels.movedim(-1, -3) / 255 - mean) / std


def preprocess(
    image: Image.Image, size: tuple[int, int], mean: RGB = Config.mean, std: RGB = Config.std
) -> Tensor:
    """Return one image resized and normalized, (3, H', W') float32; see `resize_rgb` and `normalize`."""
    return normalize(torch.from_numpy(resize_rgb(image, size).copy()), mean, std)
