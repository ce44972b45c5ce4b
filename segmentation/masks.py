"""Index masks: 8-bit PNGs whose values are classes, 255 = ignore, with a palette to look at them."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.files import replacing
from segmentation.benchmark import IGNORE
from segmentation.images import UNREADABLE, decode

KEYS = "keys"  # name of the text in a PNG


def read_mask(file: str | Path) -> np.ndarray:
    """Read an index mask.

    Args:
        file: an image of at most 8 bits, palette or grey.

    Returns:
        (H, W) uint8, the indices (not the palette's colours).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or its pixels are no 8-bit indices (RGB, 16-bit, two-level).
    """
    image = decode(file)
    if image.mode not in ("P", "L"):
        raise ValueError(f"mask {file} has mode {image.mode}: expected 8-bit class indices, palette or grey")
    labels = np.array(image)
    if image.mode == "L" and image.format == "PNG":
        labels //= 255 // (2 ** _bit_depth(file) - 1)  # Pillow spreads grey of 2 or 4 bits over 0 to 255
    return labels


def _bit_depth(file: str | Path) -> int:
    """Bits a sample, as the header of a PNG has them."""
    with open(file, "rb") as stream:
        return stream.read(25)[24]  # after the signature (8), the header chunk's length, name, width, height


def write_mask(
    file: str | Path, labels: np.ndarray, palette: np.ndarray, keys: Sequence[int] | None = None
) -> None:
    """Write an index mask as palette PNG; the file appears whole or not at all.

    Args:
        file: where; folders are made.
        labels: (H, W) uint8.
        palette: (256, 3) uint8.
        keys: class indices of the labels that it was made of, kept as text in the file, see `mask_keys`.
    """
    content = encode_mask(labels, palette, keys)
    with replacing(file) as stream:
        stream.write(content)


def encode_mask(labels: np.ndarray, palette: np.ndarray, keys: Sequence[int] | None = None) -> bytes:
    """What `write_mask` writes."""
    image = Image.fromarray(labels)
    image.putpalette(palette.astype(np.uint8).tobytes())  # now of mode P
    stream = BytesIO()
    about = PngInfo()
    if keys is not None:
        about.add_text(KEYS, " ".join(str(int(key)) for key in keys))
    image.save(stream, format="PNG", pnginfo=about)
    return stream.getvalue()


def mask_keys(file: str | Path) -> list[int] | None:
    """The labels that `write_mask` recorded; None where it did not, or could not be read."""
    try:
        with Image.open(file) as image:
            return [int(key) for key in image.info[KEYS].split()]
    except (*UNREADABLE, KeyError):
        return None


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    palette: np.ndarray,
    opacity: float = 0.6,
    clear: Sequence[int] = (0, IGNORE),
) -> np.ndarray:
    """Paint a mask over its image.

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
