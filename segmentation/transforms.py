"""From image and mask to what a segmentation network eats."""

import numpy as np

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
