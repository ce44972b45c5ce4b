"""Images, CAMs and masks as pictures of the report page."""

import base64
import io

import cv2
import numpy as np
from PIL import Image

from segmentation.benchmark import IGNORE, Benchmark

SIDE = 320  # pixels of a picture's longer side: sharp on a dense screen at the width it is shown
HEAT = cv2.COLORMAP_TURBO
OPACITY, FAINT = 0.7, 0.4  # of CAMs over images, and the activation below which it fades
BACKGROUND = (238, 240, 243)  # VOC paints background black, which shouts on a white page
HATCH = 8  # pixels from one stripe of "unsure" to the next
JPEG = {"format": "JPEG", "quality": 88, "subsampling": 0}
PNG = {"format": "PNG", "optimize": True}


def heat(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """A CAM over its image, whose colours step back.

    Args:
        image: (H, W, 3) uint8 RGB.
        cam: (H, W) in [0, 1].

    Returns:
        (H, W, 3) uint8 RGB.
    """
    cam = np.float32(cam)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    glow = cv2.applyColorMap(np.rint(cam * 255).astype(np.uint8), HEAT)[..., ::-1]
    weight = OPACITY * np.minimum(cam / FAINT, 1)[..., None]  # where there is no activation, see the image
    return np.rint(grey * (1 - weight) + glow * weight).astype(np.uint8)


def paint(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """An index mask in its palette's colours, background pale and 255 hatched.

    Args:
        labels: (H, W) uint8.
        palette: (256, 3) uint8, as `colours` gives it.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    y, x = np.indices(labels.shape)
    stripe = np.where((x + y) % HATCH < HATCH // 3, 140, 255).astype(np.uint8)
    return np.where((labels == IGNORE)[..., None], stripe[..., None], palette[labels])


def colours(benchmark: Benchmark) -> np.ndarray:
    """(256, 3) uint8: the benchmark's palette, its black background exchanged for a pale one."""
    palette = benchmark.palette.copy()
    if benchmark.has_background:
        palette[0] = BACKGROUND
    return palette


def css(colour: np.ndarray) -> str:
    """A colour (3,) in CSS."""
    return "#" + bytes(int(channel) for channel in colour).hex()


def photo(pixels: np.ndarray) -> str:
    """An image (H, W, 3) uint8 RGB as data address, at the size it is shown."""
    return _embed(_resize(pixels, _shown_size(pixels.shape[:2]), cv2.INTER_CUBIC), JPEG)


def label_picture(labels: np.ndarray, palette: np.ndarray) -> str:
    """A mask (H, W) uint8 as data address, painted in `colours`, at the size it is shown."""
    return _embed(paint(_resize(labels, _shown_size(labels.shape), cv2.INTER_NEAREST), palette), PNG)


def _shown_size(size: tuple[int, int]) -> tuple[int, int]:
    factor = SIDE / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _resize(pixels: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    shrinks = size[0] < pixels.shape[0] and interpolation != cv2.INTER_NEAREST
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if shrinks else interpolation)


def _embed(pixels: np.ndarray, options: dict) -> str:
    """A picture as data address."""
    image = Image.fromarray(pixels)
    if options["format"] == "PNG":
        image = image.quantize(256)  # few colours each: exact, and a third of the size
    stream = io.BytesIO()
    image.save(stream, **options)
    return f"data:image/{options['format'].lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
