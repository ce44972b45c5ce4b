"""Index masks: 8-bit palette PNGs whose values are classes, 255 = ignore."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.files import write_file
from segmentation.benchmark import IGNORE
from segmentation.images import UNREADABLE, decode

CLASS_IDS = "keys"  # name of the text in a PNG


def read_mask(file: str | Path) -> np.ndarray:
    """Return an index mask.

    Args:
        file: an image of at most 8 bits, palette or gray.

    Returns:
        (H, W) uint8, the indices (not the palette's colors).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or its pixels are no 8-bit indices (RGB, 16-bit, two-level).
    """
    image = decode(file)
    if image.mode not in ("P", "L"):
        raise ValueError(f"mask {file} has mode {image.mode}: expected 8-bit class indices, palette or grey")
    labels = np.array(image)
    if image.mode == "L" and image.format == "PNG":
        with open(file, "rb") as stream:
            bits = stream.read(25)[24]  # after the signature (8), the header chunk's length, name and size
        labels //= 255 // (2**bits - 1)  # Pillow maps gray of 2 or 4 bits to 0..255
    return labels


def write_mask(
    file: str | Path, labels: np.ndarray, palette: np.ndarray, class_ids: Sequence[int] | None = None
) -> None:
    """Write an index mask to `file`, which appears whole or not at all; other arguments: `encode_mask`."""
    write_file(file, encode_mask(labels, palette, class_ids))


def encode_mask(labels: np.ndarray, palette: np.ndarray, class_ids: Sequence[int] | None = None) -> bytes:
    """Return an index mask as palette PNG.

    Args:
        labels: (H, W) uint8.
        palette: (256, 3) uint8.
        class_ids: classes that it was made for, recorded as text in the file, see `mask_class_ids`.
    """
    image = Image.fromarray(labels)
    image.putpalette(palette.astype(np.uint8).tobytes())  # now of mode P
    stream = BytesIO()
    text = PngInfo()
    if class_ids is not None:
        text.add_text(CLASS_IDS, " ".join(str(int(class_id)) for class_id in class_ids))
    image.save(stream, format="PNG", pnginfo=text)
    return stream.getvalue()


def mask_class_ids(file: str | Path) -> list[int] | None:
    """Return the classes that `write_mask` recorded; None if it did not, or the file cannot be read."""
    try:
        with Image.open(file) as image:
            return [int(class_id) for class_id in image.info[CLASS_IDS].split()]
    except (*UNREADABLE, KeyError):
        return None


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    palette: np.ndarray,
    opacity: float = 0.6,
    clear: Sequence[int] = (0, IGNORE),
) -> np.ndarray:
    """Return an image with its mask painted over it.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8.
        palette: (256, 3) uint8.
        opacity: of the paint, in [0, 1].
        clear: indices that leave the image as it is.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    paint = palette[labels]  # (H, W, 3)
    weight = np.where(np.isin(labels, clear), 0.0, opacity)[..., None]
    return np.rint(image * (1 - weight) + paint * weight).astype(np.uint8)
