"""The one image reader: every step of the pipeline sees the same pixels.

Pillow decodes everything. EXIF orientation is ignored, because annotations are drawn in stored order.
"""
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def find_image(folder: str | Path, name: str) -> Path:
    """The file of image `name` in `folder`, whichever of `IMAGE_SUFFIXES` it carries.

    Raises:
        FileNotFoundError: when there is none.
    """
    for suffix in IMAGE_SUFFIXES:
        file = Path(folder) / f"{name}{suffix}"
        if file.is_file():
            return file
    raise FileNotFoundError(f"no image {name} ({', '.join(IMAGE_SUFFIXES)}) in {folder}")


def read_image(file: str | Path) -> Image.Image:
    """Decode an image in its own mode (grey and palette images stay what they are).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, or is cut short.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"image {file} does not exist")
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {file} cannot be read: {error}") from None


def read_rgb(file: str | Path) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB; raises as `read_image`."""
    return np.asarray(read_image(file).convert("RGB"))
