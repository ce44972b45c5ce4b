"""Inputs of the Python interface: images (paths, Pillow images, arrays), class names, settings."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segmentation.images import read_image, without_alpha

ImageLike = str | Path | Image.Image | np.ndarray


def to_pillow(image: ImageLike) -> Image.Image:
    """Return a Pillow image without alpha channel, otherwise in its mode; an array is RGB or gray.

    Raises:
        FileNotFoundError, ValueError: the file does not exist or is not an image.
    """
    if isinstance(image, Image.Image):
        return without_alpha(image)
    return Image.fromarray(image) if isinstance(image, np.ndarray) else read_image(image)


def as_list(images: ImageLike | Sequence[ImageLike]) -> tuple[list[ImageLike], bool]:
    """Return a list of images, and whether the input was a single image.

    Raises:
        TypeError: an image is not a path, Pillow image, or (H, W, 3) or (H, W) uint8 array.
    """
    single = isinstance(images, str | Path | Image.Image | np.ndarray)
    image_list = [images] if single else list(images) if isinstance(images, Sequence) else [images]
    for image in image_list:
        if isinstance(image, np.ndarray):
            fits = image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,))
            what = f"{image.dtype} array of shape {image.shape}"
        else:
            fits, what = isinstance(image, str | Path | Image.Image), type(image).__name__
        if not fits:
            raise TypeError(f"expected a path, a Pillow image or an (H, W, 3) uint8 array, got {what}")
    return image_list, single


def check_names(names: Any, what: str) -> list[str]:
    """Return a list of class names without repetition.

    Args:
        what: subject of the error, such as "labels".

    Raises:
        TypeError: `names` is not a list of non-empty strings.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{what} must be a list of class names, got {names!r}")
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise TypeError(f"{what} must be a list of class names, got {list(names)!r}")
    return list(dict.fromkeys(names))


def split_settings(owner: str, values: dict[str, Any], *classes: type) -> list[dict[str, Any]]:
    """Divide keyword arguments among settings dataclasses.

    Raises:
        TypeError: no class has a setting of this name.
    """
    names = [set(cls.__dataclass_fields__) for cls in classes]
    unknown = sorted(set(values) - set.union(*names))
    if unknown:
        known = sorted(set.union(*names))
        close = get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(known)}"
        raise TypeError(f"{owner} has no setting {unknown[0]!r}; {hint}")
    return [{name: value for name, value in values.items() if name in fields} for fields in names]
