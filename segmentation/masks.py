"""Index masks: 8-bit palette PNGs with the class of each pixel; 255 marks ignored pixels."""

import math
import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from foundation.files import write_file
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.images import UNREADABLE, decode

CONVERTER = "python -m pipeline.convert_masks"  # makes index masks from masks of other tools
LOOKED_AT = 100  # masks without a class that `check_class_pixels` reads before it raises
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
        ValueError: the file cannot be read, is a JPEG or GIF, or its pixels are not 8-bit indices (RGB,
            16-bit, 1-bit gray).
    """
    image = decode_lossless(file)
    if image.format == "GIF":  # programs renumber the palette of a GIF
        raise ValueError(
            f"mask {file} is a GIF, which does not keep class indices: convert it with {CONVERTER}"
        )
    if image.mode not in ("P", "L"):
        raise ValueError(
            f"mask {file} has mode {image.mode}, expected 8-bit class indices: convert it with {CONVERTER}"
        )
    return stored_values(image, file)


def decode_lossless(file: str | Path) -> Image.Image:
    """Return a decoded mask of any mode. Raises like `segmentation.images.decode`, and for a JPEG."""
    image = decode(file)
    if image.format in ("JPEG", "MPO"):
        raise ValueError(f"mask {file} is a JPEG, which changes values at borders: save the masks as PNG")
    return image


def stored_values(image: Image.Image, file: str | Path) -> np.ndarray:
    """Return the values (H, W) uint8 of a palette or gray image as stored in `file`."""
    values = np.array(image)
    if image.mode == "L" and image.format == "PNG":
        with open(file, "rb") as stream:
            bits = stream.read(25)[24]  # bit depth, after the PNG signature and the first 16 header bytes
        values //= 255 // (2**bits - 1)  # Pillow maps gray of 2 or 4 bits to 0..255
    return values


def check_values(mask: np.ndarray, channels: int, file: str | Path) -> None:
    """Raise ValueError if an index mask has a value that is neither below `channels` nor 255.

    Args:
        mask: (H, W) uint8.
        file: file of the mask, shown in the error.
    """
    if (mask + np.uint8(1)).max() > channels:  # 255 becomes 0; ten times as fast as two comparisons
        wrong = mask[(mask >= channels) & (mask != IGNORE)]
        raise ValueError(
            f"mask {file} has the value {wrong[0]}, expected one of the {channels} class indices (0 to "
            f"{channels - 1}) or {IGNORE}: give the benchmark of these masks, or convert them with "
            f"{CONVERTER}"
        )


def check_class_pixels(
    folder: str | Path, names: Sequence[str], benchmark: Benchmark, allow_background: bool = False
) -> None:
    """Raise ValueError if the masks of a split have no pixel of a class, as masks of 0 and 255 have none.

    Masks at even steps of the split are read until one has a pixel of a class, which is usually the first.
    The search ends after `LOOKED_AT` masks without a class. Masks of background alone do not count: in some
    data sets most images have no class. Masks that do not exist are skipped.

    Args:
        folder: folder of the masks `<name>.png`.
        allow_background: accept masks of background alone, which are valid ground truth.

    Raises:
        ValueError: see above, or no mask can be read (the error of the first one).
    """
    first, last = int(benchmark.has_background), benchmark.channels - 1
    step, looked_at = math.ceil(len(names) / LOOKED_AT), 0
    values: set[int] = set()
    error = None
    for index in sorted(range(len(names)), key=lambda index: index % step):
        try:
            mask = read_mask(Path(folder) / f"{names[index]}.png")
        except FileNotFoundError:
            continue
        except (ValueError, OSError) as unreadable:
            error, found = error or unreadable, []
        else:
            found = np.flatnonzero(np.bincount(mask.ravel())).tolist()
            if any(first <= value <= last for value in found):
                return
            values.update(found)
        looked_at += found != [0]
        if looked_at == LOOKED_AT:
            break
    if values - {0} or (values and not allow_background):
        listed = ", ".join(map(str, sorted(values)))
        raise ValueError(
            f"the masks in {folder} have no pixel of a class: their values are {listed}, but classes have "
            f"the values {first}..{last}, and {IGNORE} is ignored: convert the masks with {CONVERTER} (see "
            "its --help), or give the folder and the benchmark of other masks"
        )
    if error:
        raise error


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
