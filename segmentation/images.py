"""The image reader of all steps, so that all steps get the same pixels.

Pillow decodes all images. EXIF orientation is ignored, because annotations refer to pixels in stored order.
Transparency is dropped: transparent pixels have their stored colors.
"""
import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")

# Content of image files, whatever their suffix. Others are refused: Pillow would run Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA")
# Pillow warns above 89 million pixels; this project shrinks such images, so the warning is not needed. Above
# twice that size Pillow raises DecompressionBombError.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow refuses PNGs with a text or color profile above 1 MB; the profiles of some printers are larger.
PngImagePlugin.MAX_TEXT_CHUNK = 2**24

# Decoded bytes that a file may declare: 256 MB, plus this many per stored byte. Photographs compress to a
# tenth, plain masks to a thousandth.
FREE_BYTES, RATIO = 2**28, 256
# Exceptions of Pillow's decoders for files that are damaged, truncated, too large, or not images.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# Pillow modes with alpha -> the mode after the alpha channel is dropped.
WITHOUT_ALPHA = {"LA": "L", "PA": "RGB", "RGBA": "RGB"}
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # colors are multiplied by alpha -> they are not


def find_image(folder: str | Path, name: str) -> Path:
    """Return the file of image `name` in `folder`: the first of `IMAGE_SUFFIXES` for which a file exists.

    Raises:
        FileNotFoundError: no file exists.
    """
    for suffix in IMAGE_SUFFIXES:
        if (file := Path(folder) / f"{name}{suffix}").is_file():
            return file
    raise FileNotFoundError(
        f"no image {name} ({', '.join(IMAGE_SUFFIXES)}) in {folder}: check the image folder and the list of "
        "images"
    )


def image_files(path: str) -> list[str]:
    """Return the image files of a folder, sorted by name; a list of one file if `path` is a file.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the folder contains no images, or two images whose names differ only in the suffix.
    """
    if Path(path).is_file():
        return [path]
    if not Path(path).is_dir():
        raise FileNotFoundError(f"image or folder {path} does not exist")
    files = sorted(file for file in Path(path).iterdir() if file.suffix in IMAGE_SUFFIXES)
    files = [file for file in files if not file.name.startswith(".")]  # file managers write hidden files
    if not files:
        raise ValueError(f"folder {path} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    by_stem: dict[str, Path] = {}
    for file in files:
        if by_stem.setdefault(file.stem, file) is not file:
            raise ValueError(f"{by_stem[file.stem]} and {file.name} have the same name: rename one")
    return [str(file) for file in files]


def read_image(file: str | Path | BinaryIO) -> Image.Image:
    """Return a decoded image without alpha channel: gray and palette images are not converted to RGB.

    Args:
        file: a path, or an open file; errors show its `name`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image, is truncated, or has more than 8 bits per gray value.
    """
    image = decode(file)
    if image.mode.startswith(("I", "F")):  # conversion by Pillow clips values to 255 without a warning
        mode = f"more than 8 bits (mode {image.mode})"
        raise ValueError(f"image {_label(file)} has {mode}: convert it to 8 bits")
    return without_alpha(image)


def without_alpha(image: Image.Image) -> Image.Image:
    """Return an image without alpha channel and transparent color; opaque images are returned unchanged.

    Transparent pixels get their stored color. Pillow weights colors by alpha when it resizes an image, so
    that with alpha the pixels would depend on the size that a step needs.
    """
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if image.mode in WITHOUT_ALPHA:
        image = image.convert(WITHOUT_ALPHA[image.mode])
    if "transparency" in image.info:
        image = image.copy()  # the image of a caller is not changed
        del image.info["transparency"]
    return image


def decode(file: str | Path | BinaryIO) -> Image.Image:
    """Return a decoded image or mask of any mode. Raises like `read_image`, but allows more than 8 bits."""
    with _opened(file) as image:
        image.load()
        return image


def read_size(file: str | Path) -> tuple[int, int]:
    """Return the (height, width) in an image's header, without decoding; raises the errors of `decode`."""
    with _opened(file) as image:
        return image.height, image.width


def read_rgb(file: str | Path) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB; raises the errors of `read_image`."""
    return np.asarray(read_image(file).convert("RGB"))


@contextmanager
def _opened(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    if isinstance(file, str | Path) and not Path(file).is_file():
        raise FileNotFoundError(f"image {file} does not exist")
    try:
        with Image.open(file, formats=FORMATS) as image:
            stored = image.fp.seek(0, io.SEEK_END)
            decoded = image.height * image.width * len(image.getbands())
            if decoded > FREE_BYTES + RATIO * stored:
                raise ValueError(f"its {stored} bytes declare {image.height} x {image.width} pixels")
            yield image
    except UnidentifiedImageError:  # Pillow's message can contain a memory address
        reason = "it is not an image" if _has_content(file) else "it is not an image: it is empty"
        raise ValueError(f"image {_label(file)} cannot be read: {reason}") from None
    except UNREADABLE as error:
        raise ValueError(f"image {_label(file)} cannot be read: {error}") from None


def _has_content(file: str | Path | BinaryIO) -> bool:
    if isinstance(file, str | Path):
        return Path(file).stat().st_size > 0
    return file.seek(0, io.SEEK_END) > 0


def _label(file: str | Path | BinaryIO) -> str:
    return str(file if isinstance(file, str | Path) else getattr(file, "name", "in memory"))


def shrunk(image: np.ndarray, most: int) -> np.ndarray:
    """Return an image (H, W, 3) uint8, shrunk by area averaging if it has more than `most` pixels."""
    height, width = size_within(image.shape[:2], most)
    if (height, width) == image.shape[:2]:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def size_within(size: tuple[int, int], most: int) -> tuple[int, int]:
    """Return `size` (H, W), shrunk proportionally if it has more than `most` pixels."""
    height, width = size
    if height * width <= most:
        return size
    factor = math.sqrt(most / (height * width))
    height = max(1, min(most, int(height * factor)))
    return height, max(1, min(most // height, int(width * factor)))
