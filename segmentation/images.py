"""The image reader of all steps, so that all get the same pixels.

Pillow decodes everything. EXIF orientation is ignored, because annotations are drawn in stored order.
"""
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")

# Pillow warns of images above 89 million pixels, which are shrunk here; twice that it refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# What Pillow's decoders raise on files that are damaged, cut short, no images or absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def find_image(folder: str | Path, name: str) -> Path:
    """Return the file of image `name` in `folder`, with the first of `IMAGE_SUFFIXES` that exists.

    Raises:
        FileNotFoundError: there is none.
    """
    for suffix in IMAGE_SUFFIXES:
        if (file := Path(folder) / f"{name}{suffix}").is_file():
            return file
    raise FileNotFoundError(f"no image {name} ({', '.join(IMAGE_SUFFIXES)}) in {folder}")


def image_files(path: str) -> list[str]:
    """Return the image file, or those of a folder by name.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the folder holds no images, or two that differ only in their suffix.
    """
    if Path(path).is_file():
        return [path]
    if not Path(path).is_dir():
        raise FileNotFoundError(f"image or folder {path} does not exist")
    files = sorted(file for file in Path(path).iterdir() if file.suffix in IMAGE_SUFFIXES)
    files = [file for file in files if not file.name.startswith(".")]  # metadata of file managers
    if not files:
        raise ValueError(f"folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    by_stem: dict[str, Path] = {}
    for file in files:
        if by_stem.setdefault(file.stem, file) is not file:
            raise ValueError(f"{by_stem[file.stem]} and {file.name} have the same name: rename one")
    return [str(file) for file in files]


def read_image(file: str | Path | BinaryIO) -> Image.Image:
    """Return a decoded image in its own mode: gray and palette images are not converted.

    Args:
        file: a path, or an open file, whose `name` is used in errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, is cut short, or has more than 8 bits of gray.
    """
    image = decode(file)
    if image.mode.startswith(("I", "F")):  # Pillow would clip their values to 255 without a warning
        mode = f"more than 8 bits (mode {image.mode})"
        raise ValueError(f"image {_label(file)} has {mode}: convert it to 8 bits")
    return image


def decode(file: str | Path | BinaryIO) -> Image.Image:
    """Return an image or mask of any mode, decoded; raises as `read_image`, except for the mode."""
    with _opened(file) as image:
        image.load()
        return image


def read_size(file: str | Path) -> tuple[int, int]:
    """Return the (height, width) in an image file's header; decodes nothing, raises as `decode`."""
    with _opened(file) as image:
        return image.height, image.width


def read_rgb(file: str | Path) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB; raises as `read_image`."""
    return np.asarray(read_image(file).convert("RGB"))


@contextmanager
def _opened(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    if isinstance(file, str | Path) and not Path(file).is_file():
        raise FileNotFoundError(f"image {file} does not exist")
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError:  # its message has the address of a file in memory
        raise ValueError(f"image {_label(file)} cannot be read: it is no image") from None
    except UNREADABLE as error:
        raise ValueError(f"image {_label(file)} cannot be read: {error}") from None


def _label(file: str | Path | BinaryIO) -> str:
    return str(file if isinstance(file, str | Path) else getattr(file, "name", "in memory"))


def shrunk(image: np.ndarray, most: int) -> np.ndarray:
    """Return an image (H, W, 3) uint8 shrunk to at most `most` pixels, by area averaging."""
    height, width = size_within(image.shape[:2], most)
    if (height, width) == image.shape[:2]:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def size_within(size: tuple[int, int], most: int) -> tuple[int, int]:
    """Return the size (H, W) shrunk, in proportion, to at most `most` pixels; itself if it fits."""
    height, width = size
    if height * width <= most:
        return size
    factor = math.sqrt(most / (height * width))
    height = max(1, min(most, int(height * factor)))
    return height, max(1, min(most // height, int(width * factor)))
