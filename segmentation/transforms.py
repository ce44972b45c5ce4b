"""Image and mask -> input and target of a segmentation network.

`ScaleCrop` and `JitterScaleCrop` draw training samples. They take an image (H, W, 3) uint8 RGB, its labels
(H, W) uint8 and a random generator. They return the normalized image (3, crop, crop) float32, padded with 0
(the mean), and the labels (crop, crop) int64, padded with 255. They raise ValueError if image and labels
differ in size.
"""

import math
import random
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from segmentation.benchmark import IGNORE

CAFFE_MEAN = np.array([104.008, 116.669, 122.675])  # Caffe's ImageNet means (B, G, R), as in DeepLab-v2
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # torchvision's ImageNet statistics (R, G, B)
IMAGENET_STD = (0.229, 0.224, 0.225)


def caffe_normalize(image: np.ndarray) -> np.ndarray:
    """Return BGR minus `CAFFE_MEAN`, (3, H, W) float32, for RGB (H, W, 3), uint8 or float32."""
    bgr = np.float64(image[..., ::-1]) - CAFFE_MEAN  # float64: the result is rounded only once
    return np.ascontiguousarray(bgr.transpose(2, 0, 1), np.float32)


def caffe_denormalize(image: np.ndarray) -> np.ndarray:
    """Return RGB (H, W, 3) uint8: the inverse of `caffe_normalize`, rounded."""
    bgr = np.rint(image.transpose(1, 2, 0) + CAFFE_MEAN)
    return np.clip(bgr, 0, 255).astype(np.uint8)[..., ::-1]


def imagenet_normalize(image: np.ndarray) -> np.ndarray:
    """Return standardized RGB (3, H, W) float32 for (H, W, 3) uint8, computed in float32 as in SEAM."""
    scaled = np.float32(image) / np.float32(255)
    standard = (scaled - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    return np.ascontiguousarray(standard.transpose(2, 0, 1))


def imagenet_denormalize(image: np.ndarray) -> np.ndarray:
    """Return RGB (H, W, 3) uint8, the input of SEAM's CRF: the inverse of `imagenet_normalize`, truncated.

    Because of the truncation, a third to half of the values are 1 less than in the original image.
    """
    unit = image.transpose(1, 2, 0) * np.float32(IMAGENET_STD) + np.float32(IMAGENET_MEAN)
    return np.clip(unit * np.float32(255), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class ScaleCrop:
    """Training samples of DeepLab-v2, as in deeplab-pytorch: random scale, crop and flip.

    Attributes:
        crop: side of the sample in pixels.
        scales: factors, from which one is drawn.
        base: longer side at scale 1 in pixels; None uses the size of the image.
        flip: mirror half of the samples.
    """

    crop: int
    scales: tuple[float, ...]
    base: int | None = None
    flip: bool = True

    def __post_init__(self):
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be numbers above 0, got {list(self.scales)}")

    def __call__(
        self, image: np.ndarray, label: np.ndarray, draw: random.Random
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a sample: draw scale, top, left and flip, in this order; pad at the right and bottom."""
        height, width = _common_size(image, label)
        if self.base is not None:
            longer = max(height, width)
            height, width = int(self.base * height / longer), int(self.base * width / longer)
        scale = draw.choice(self.scales)
        height, width = max(1, int(height * scale)), max(1, int(width * scale))
        top = draw.randint(0, max(height - self.crop, 0))
        left = draw.randint(0, max(width - self.crop, 0))
        mirrored = self.flip and draw.random() < 0.5

        window = slice(top, top + self.crop), slice(left, left + self.crop)
        image = cv2.resize(np.float32(image), (width, height), interpolation=cv2.INTER_LINEAR)
        rows = nearest_index(height, len(label))[window[0]]
        columns = nearest_index(width, label.shape[1])[window[1]]
        sample = _padded(caffe_normalize(image[window]), label[np.ix_(rows, columns)], self.crop)
        return tuple(part[..., ::-1].copy() for part in sample) if mirrored else sample


@dataclass(frozen=True)
class JitterScaleCrop:
    """Training samples of DeepLab-v1 on ResNet-38d, as in SEAM's reference implementation.

    Attributes:
        crop: side of the sample in pixels.
        scale_range: range from which the scale is drawn uniformly.
        jitter: maximum shift of hue, saturation and value, see `jitter_hsv`.
        flip: mirror half of the samples.
    """

    crop: int
    scale_range: tuple[float, float] = (0.5, 1.5)
    jitter: int = 10
    flip: bool = True

    def __post_init__(self):
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1] < math.inf:
            raise ValueError(f"scale_range must be two numbers above 0, got {list(self.scale_range)}")

    def __call__(
        self, image: np.ndarray, label: np.ndarray, draw: random.Random
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a sample: draw jitter, flip, scale, left and top, in this order; the padding is random."""
        size = _common_size(image, label)
        image = jitter_hsv(image, draw, self.jitter)
        if self.flip and draw.random() < 0.5:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        least, most = self.scale_range
        scale = max(draw.random() * (most - least) + least, 1 / min(size))  # avoids a side of 0 pixels
        # With factors instead of a size, OpenCV computes source positions from the scale, not from rounded
        # sides.
        factors = {"dsize": None, "fx": scale, "fy": scale}
        image = cv2.resize(image, **factors, interpolation=cv2.INTER_CUBIC)
        label = cv2.resize(label, **factors, interpolation=cv2.INTER_NEAREST)

        height, width = label.shape
        left, x = self._offsets(width, draw)
        top, y = self._offsets(height, draw)
        window = slice(top, top + self.crop), slice(left, left + self.crop)
        return _padded(imagenet_normalize(image[window]), label[window], self.crop, y, x)

    def _offsets(self, side: int, draw: random.Random) -> tuple[int, int]:
        """Return the offset of the crop in the image and of the image in the sample; one of them is 0."""
        offset = draw.randrange(abs(side - self.crop) + 1)
        return (offset, 0) if side > self.crop else (0, offset)


def jitter_hsv(image: np.ndarray, draw: random.Random, most: int = 10) -> np.ndarray:
    """Return an image (H, W, 3) uint8 RGB with hue, saturation and value shifted by up to `most` each.

    Values are OpenCV's: hue is cyclic, 0 to 179; saturation and value are clipped to 0 to 255.
    """
    hue, saturation, value = (draw.randint(-most, most) for _ in range(3))
    steps = np.arange(256)
    tables = [(steps + hue) % 180, np.clip(steps + saturation, 0, 255), np.clip(steps + value, 0, 255)]
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    shifted = cv2.LUT(hsv, np.stack(tables, axis=-1).astype(np.uint8)[None])  # (1, 256, 3) tables
    return cv2.cvtColor(shifted, cv2.COLOR_HSV2RGB)


def _common_size(image: np.ndarray, label: np.ndarray) -> tuple[int, int]:
    if image.shape[:2] != label.shape:
        raise ValueError(f"the image is {image.shape[:2]} but its mask is {label.shape} (H, W)")
    return label.shape


def _padded(
    image: np.ndarray, label: np.ndarray, crop: int, y: int = 0, x: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return image (3, h, w) and label (h, w), placed at (y, x) and padded to side `crop` with 0 and 255."""
    height, width = label.shape
    images = np.zeros((3, crop, crop), np.float32)
    labels = np.full((crop, crop), IGNORE, np.int64)
    images[:, y : y + height, x : x + width] = image
    labels[y : y + height, x : x + width] = label
    return images, labels


def nearest_index(out: int, size: int) -> np.ndarray:
    """Return the source pixel in [0, size) of each of `out` pixels, as in Pillow's NEAREST, (out,) int64.

    Pillow adds up source positions step by step in double precision, starting at half a step. The product
    (i + 0.5) * step rounds differently and selects other pixels at common factors such as 0.75 and 1.25.
    """
    steps = np.full(out, size / out)
    steps[0] /= 2
    return np.cumsum(steps).astype(np.int64)  # truncated


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return labels (B, H, W) of any type, resized on their device to `size` (h, w) like Pillow's NEAREST.

    Labels that already have this size are returned unchanged.
    """
    if labels.shape[-2:] == size:
        return labels
    rows, columns = (
        torch.from_numpy(nearest_index(out, side)).to(labels.device, non_blocking=True)
        for out, side in zip(size, labels.shape[-2:], strict=True)
    )
    return labels.index_select(1, rows).index_select(2, columns)  # (B, h, W), (B, h, w)
