"""Images as users have them: a path, a Pillow image or an array."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segmentation.images import read_image

ImageLike = str | Path | Image.Image | np.ndarray


def to_pillow(image: ImageLike) -> Image.Image:
    """Return an image in its own mode.

    Args:
        image: path, Pillow image, or (H, W, 3) or (H, W) uint8 array, RGB or grey.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or no image.
        TypeError: none of these.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and (
        image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    ):  # fmt: skip
        return Image.fromarray(image)
    what = f"{image.dtype} array of shape {image.shape}" if isinstance(image, np.ndarray) else repr(image)
    raise TypeError(f"expected a path, a Pillow image or an (H, W, 3) uint8 array, got {what}")


def as_list(images: ImageLike | Sequence[ImageLike]) -> tuple[list[ImageLike], bool]:
    """Return the images, and whether there was a single one."""
    single = isinstance(images, str | Path | Image.Image | np.ndarray)
    return ([images] if single else list(images)), single


def split_settings(owner: str, values: dict[str, Any], *classes: type) -> list[dict[str, Any]]:
    """Divide keyword arguments among settings dataclasses.

    Raises:
        TypeError: a name that none of them has.
    """
    names = [set(cls.__dataclass_fields__) for cls in classes]
    unknown = sorted(set(values) - set.union(*names))
    if unknown:
        known = ", ".join(sorted(set.union(*names)))
        raise TypeError(f"{owner} has no setting {unknown[0]!r}; there are {known}")
    return [{name: value for name, value in values.items() if name in fields} for fields in names]
