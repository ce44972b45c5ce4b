"""Index masks: 8-bit palette PNGs with the class of each pixel; 255 marks ignored pixels."""

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.files import write_file
from segmentation.benchmark import IGNORE
from segmentation.images import UNREADABLE, decode

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CLASS_IDS = "keys"  # name of the PNG text entry with the class indices


def read_mask(file: str | Path) -> np.ndarray:
    """Return an index mask.

    Args:
        file: an image of at most 8 bits, palette or gray.

    Returns:
        (H, W) uint8, the indices (not the palette's colors).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, or its pixels are not 8-bit indices (RGB, 16-bit, 1-bit gray).
    """
    image = decode(file)
    if image.mode not in ("P", "L"):
        raise ValueError(
            f"mask {file} has mode {image.mode}, expected 8-bit class indices: convert it to palette or gray"
        )
    labels = np.array(image)
    if image.mode == "L" and image.format == "PNG":
        with open(file, "rb") as stream:
            bits = stream.read(25)[24]  # bit depth, after the PNG signature and the first 16 header bytes
        labels //= 255 // (2**bits - 1)  # Pillow maps gray of 2 or 4 bits to 0..255
    return labels


def write_mask(
    file: str | Path, labels: np.ndarray, palette: np.ndarray, class_ids: Sequence[int] | None = None
) -> None:
    """Write an index mask; the write is atomic. For other arguments see `encode_mask`."""
    write_file(file, encode_mask(labels, palette, class_ids))


def encode_mask(labels: np.ndarray, palette: np.ndarray, class_ids: Sequence[int] | None = None) -> bytes:
    """Return the bytes of a palette PNG with an index mask.

    Args:
        labels: (H, W) uint8.
        palette: (256, 3) uint8.
        class_ids: image-level labels that the mask was made from, recorded as a text entry; see
            `mask_class_ids`.
    """
    image = Image.fromarray(labels)
    image.putpalette(palette.astype(np.uint8).tobytes())  # now of mode P
    stream = BytesIO()
    text = PngInfo()
    if class_ids is not None:
        text.add_text(CLASS_IDS, " ".join(str(int(class_id)) for class_id in class_ids))
    image.save(stream, format="PNG", pnginfo=text)
    return stream.getvalue()


def is_complete(file: str | Path) -> bool:
    """Return whether a file of `write_mask` exists and is undamaged, by the checksums of its chunks.

    This takes 20 us, decoding a mask a hundred times as long.
    """
    try:
        return is_whole(Path(file).read_bytes())
    except OSError:
        return False


def is_whole(content: bytes) -> bool:
    """Return whether the content of a file of `write_mask` is undamaged, as `is_complete`."""
    position, chunks = len(SIGNATURE), set()
    if not content.startswith(SIGNATURE):
        return False
    while position + 12 <= len(content):  # length, name, data, checksum
        length, chunk = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        checksum = zlib.crc32(content[position + 4 : end - 4])
        if end > len(content) or checksum != int.from_bytes(content[end - 4 : end], "big"):
            return False
        chunks.add(chunk)
        if chunk == b"IEND":
            return {b"IHDR", b"PLTE", b"IDAT"} <= chunks
        position = end
    return False


def mask_class_ids(file: str | Path) -> list[int] | None:
    """Return the classes recorded by `write_mask`; None if none are recorded or the file cannot be read."""
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
    """Return an image with a mask painted over it.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8.
        palette: (256, 3) uint8.
        opacity: opacity of the mask, in [0, 1].
        clear: indices that are not painted.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    paint = palette[labels]  # (H, W, 3)
    weight = np.where(np.isin(labels, clear), 0.0, opacity)[..., None]
    return np.rint(image * (1 - weight) + paint * weight).astype(np.uint8)
