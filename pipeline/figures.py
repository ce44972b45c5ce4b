"""Figures of the report page: images, CAMs and masks as data URLs."""

import base64
import io

import cv2
import numpy as np
from PIL import Image

from segmentation.benchmark import IGNORE, Benchmark

SIDE = 320  # longer side of a figure in pixels: twice the width at which it is displayed
COLORMAP = cv2.COLORMAP_TURBO
OPACITY, FADE_BELOW = 0.7, 0.4  # opacity of CAM colors; for activations below 0.4 it falls linearly to 0
BACKGROUND = (238, 240, 243)  # VOC's black background is too dominant on a white page
HATCH = 8  # pixels between the stripes of ignored pixels
JPEG = {"format": "JPEG", "quality": 88, "subsampling": 0}
PNG = {"format": "PNG", "optimize": True}


def cam_overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """Return an image in gray, with the colors of a CAM (H, W) in [0, 1] over it, (H, W, 3) uint8 RGB.

    Args:
        image: (H, W, 3) uint8 RGB.
    """
    cam = np.float32(cam)
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    colors = cv2.applyColorMap(np.rint(cam * 255).astype(np.uint8), COLORMAP)[..., ::-1]
    weight = OPACITY * np.minimum(cam / FADE_BELOW, 1)[..., None]
    return np.rint(gray * (1 - weight) + colors * weight).astype(np.uint8)


def paint(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return an index mask (H, W) uint8 as colors (H, W, 3) uint8 of a `page_palette`; 255 is hatched."""
    y, x = np.indices(labels.shape)
    stripes = np.where((x + y) % HATCH < HATCH // 3, 140, 255).astype(np.uint8)
    return np.where((labels == IGNORE)[..., None], stripes[..., None], palette[labels])


def page_palette(benchmark: Benchmark) -> np.ndarray:
    """Return the benchmark's palette (256, 3) uint8 with a pale background instead of black."""
    palette = benchmark.palette.copy()
    if benchmark.has_background:
        palette[0] = BACKGROUND
    return palette


def image_figure(pixels: np.ndarray) -> str:
    """Return the data URL of an image (H, W, 3) uint8 RGB, as JPEG."""
    size = _displayed_size(pixels)
    interpolation = cv2.INTER_AREA if size[0] < pixels.shape[1] else cv2.INTER_CUBIC
    return _data_url(cv2.resize(pixels, size, interpolation=interpolation), JPEG)


def mask_figure(labels: np.ndarray, palette: np.ndarray) -> str:
    """Return the data URL of a mask (H, W) uint8 in the colors of a `page_palette`, as PNG."""
    labels = cv2.resize(labels, _displayed_size(labels), interpolation=cv2.INTER_NEAREST)
    return _data_url(paint(labels, palette), PNG)


def _displayed_size(pixels: np.ndarray) -> tuple[int, int]:
    """Return the (width, height) of a figure."""
    height, width = pixels.shape[:2]
    factor = SIDE / max(height, width)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _data_url(pixels: np.ndarray, options: dict) -> str:
    image = Image.fromarray(pixels)
    if options["format"] == "PNG":
        image = image.quantize(256)  # a third of the size; exact for the masks, which have few colors
    stream = io.BytesIO()
    image.save(stream, **options)
    return f"data:image/{options['format'].lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
