"""From image and mask to what a segmentation network eats."""

import numpy as np
import torch
from torch import Tensor

# Caffe's ImageNet means (B, G, R), as DeepLab-v2 has them.
CAFFE_MEAN = np.array([104.008, 116.669, 122.675])

# torchvision's ImageNet statistics (R, G, B).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def caffe_normalise(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB, uint8 or float32 -> (3, H, W) float32 BGR minus mean, as Caffe's networks read it."""
    bgr = np.float64(image[..., ::-1]) - CAFFE_MEAN  # in double precision, then rounded once
    return np.ascontiguousarray(bgr.transpose(2, 0, 1), np.float32)


def imagenet_normalise(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (3, H, W) float32, standardised; float32 at every step, as published."""
    scaled = np.float32(image) / np.float32(255)
    standard = (scaled - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    return np.ascontiguousarray(standard.transpose(2, 0, 1))


def nearest_index(out: int, size: int) -> np.ndarray:
    """Which of `size` pixels Pillow's NEAREST puts at each of `out`.

    Pillow adds up source positions step by step in double precision, from half a step on; the product
    (i + 0.5) * step rounds to other pixels at common factors such as 0.75 and 1.25.

    Returns:
        (out,) int64.
    """
    steps = np.full(out, size / out)
    steps[0] /= 2
    return np.cumsum(steps).astype(np.int64)  # truncated


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels at another size, by the rule of Pillow's NEAREST, on the device that they are on.

    Args:
        labels: (B, H, W) of any type.
        size: (h, w).

    Returns:
        (B, h, w); the labels themselves where they have that size.
    """
    if labels.shape[-2:] == size:
        return labels
    rows, columns = (
        torch.from_numpy(nearest_index(out, side)).to(labels.device)
        for out, side in zip(size, labels.shape[-2:], strict=True)
    )
    return labels.index_select(1, rows).index_select(2, columns)  # (B, h, W), (B, h, w)
