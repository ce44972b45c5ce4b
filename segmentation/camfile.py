"""The CAM file: the class activation maps of one image, one map per label, in one of two formats.

* full, `<name>.npy`: the format of CLIP-ES's reference implementation, a pickled dict {"keys": (K,) int64,
  "attn_highres": (K, H, W) float16} with maps at image size. Other projects can read it.
* compact, `<name>.npz`: the float32 maps on the patch grid and the image size, about 120 times smaller.

`read` returns the same maps from both formats, so the format does not affect results.
"""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np

from foundation.untrusted import read_npy_dict, read_npz
from segmentation.images import size_within

FORMATS = {"full": ".npy", "compact": ".npz"}
# A compact file declares the size of its image. If no other size is known, the maps at this size may take
# 256 MB plus 4096 times the grid maps: 10,000 patches of 64 x 64 pixels are an image of 40 million pixels.
FREE_BYTES = 2**28
PIXELS_PER_PATCH = 4096


def resize(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return maps resized bilinearly (half-pixel centers, edges replicated, no antialiasing).

    Args:
        maps: (K, h, w) float32.
        size: (H, W).

    Returns:
        (K, H, W) float32.
    """
    height, width = size
    resized = np.empty((len(maps), height, width), np.float32)
    for source, target in zip(maps, resized, strict=True):
        cv2.resize(source, (width, height), target, interpolation=cv2.INTER_LINEAR)
    return resized


def encode(
    class_ids: Sequence[int] | np.ndarray,
    cams: Mapping[str, np.ndarray],
    size: tuple[int, int],
    format: str = "full",
) -> bytes:
    """Return the content of a CAM file.

    Args:
        class_ids: (K,), 0-based without background.
        cams: CAM type -> (K, h, w) float32 in [0, 1] on the patch grid, e.g. {"attn_highres": ...}.
        size: (H, W) of the image.
        format: "full" or "compact".
    """
    if format not in FORMATS:
        raise ValueError(f"CAM format must be one of {', '.join(FORMATS)}, got {format!r}")
    keys = np.asarray(class_ids, np.int64).reshape(-1)
    cams = {cam_type: np.ascontiguousarray(grid, np.float32) for cam_type, grid in cams.items()}
    for cam_type, grid in cams.items():
        if grid.ndim != 3 or len(grid) != len(keys):
            raise ValueError(f"{cam_type} has shape {grid.shape}, expected {len(keys)} maps (K, h, w)")
    stream = BytesIO()
    if format == "full":
        full = {cam_type: resize(grid, size).astype(np.float16) for cam_type, grid in cams.items()}
        np.save(stream, {"keys": keys, **full}, allow_pickle=True)
    else:
        np.savez(stream, keys=keys, size=np.array(size, np.int64), **cams)
    return stream.getvalue()


def find(folder: str | Path, name: str) -> Path | None:
    """Return the CAM file of image `name`, in either format; None if there is none."""
    files = (Path(folder) / f"{name}{suffix}" for suffix in FORMATS.values())
    return next((file for file in files if file.is_file()), None)


def class_ids_of(folder: str | Path, name: str) -> list[int] | None:
    """Return the class indices in the CAM file of image `name`; None if there is no file.

    Raises:
        ValueError: see `read`.
    """
    file = find(folder, name)
    return None if file is None else _class_ids(_content(file), file).tolist()


def read(
    folder: str | Path,
    name: str,
    cam_type: str = "attn_highres",
    most: int | None = None,
    rounded: bool = True,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the CAMs of one image, from a file in either format.

    Args:
        folder: folder of the CAM files.
        name: image name, without suffix.
        cam_type: type of the maps. Types with "bg" in their name have a background channel before the K maps.
        most: maximum number of pixels; maps of a larger image are resized to
            `segmentation.images.size_within`. None: no limit.
        rounded: round maps of a compact file to float16. False returns them as float32: rounding all maps
            takes longer than the rest of this function, and some callers use only a few of the maps.
        size: (H, W) of the image if it is known; a file of another size is an error.

    Returns:
        class_ids (K,) int64 and maps (K, H, W) float16; (K + 1, H, W) if the type has a background channel.

    Raises:
        FileNotFoundError: the image has no CAM file.
        ValueError: the file is damaged, is not a CAM file, contains code, or has no maps of type `cam_type`.
    """
    file = find(folder, name)
    if file is None:
        raise FileNotFoundError(
            f"no CAM file of {name} ({' or '.join(FORMATS.values())}) in {folder}: run step 1 for this "
            "image, or give another --cam_dir"
        )
    content = _content(file)
    class_ids = _class_ids(content, file)
    if cam_type not in content:
        types = ", ".join(key for key in content if key not in ("keys", "size"))
        raise ValueError(f"{file} has no {cam_type} maps (available: {types or 'none'}): give --cam_type")
    try:
        maps = np.asarray(content[cam_type])
        expected = len(class_ids) + ("bg" in cam_type)
        if maps.ndim != 3 or len(maps) != expected or maps.dtype.kind not in "fiu":
            raise ValueError(f"{cam_type} has shape {maps.shape}, expected {expected} maps (K, H, W)")
        if not is_finite(maps):
            raise ValueError(f"{cam_type} has values that are not finite")
        declared = _declared_size(content, maps)
        if size is not None and declared != tuple(size):
            raise ValueError(f"it has CAMs of an image of size {declared} (H, W), expected {tuple(size)}")
        target = declared if most is None else size_within(declared, most)
        if size is None and expected * math.prod(target) * 4 > FREE_BYTES + PIXELS_PER_PATCH * maps.nbytes:
            raise ValueError(f"it declares the image size {declared}, too large for maps of {maps.shape}")
        if "size" in content or target != maps.shape[1:]:
            maps = resize(maps.astype(np.float32, copy=False), target)
        if rounded or "size" not in content:
            maps = maps.astype(np.float16, copy=False)
    except (TypeError, ValueError, OverflowError, cv2.error) as error:
        raise ValueError(f"{file} cannot be used: {str(error).strip().splitlines()[-1]}") from None
    return class_ids, maps


def is_finite(array: np.ndarray) -> bool:
    """Return whether all numbers are finite; float16 is compared by its bits, which is ten times faster."""
    if array.dtype == np.float16:
        return not ((array.view(np.uint16) & 0x7C00) == 0x7C00).any()
    return bool(np.isfinite(array).all())


def _declared_size(content: dict, maps: np.ndarray) -> tuple[int, int]:
    """Return the size (H, W) of the image of a CAM file."""
    if "size" not in content:
        return maps.shape[1:]
    height, width = (int(side) for side in content["size"])
    if min(height, width) < 1:
        raise ValueError(f"it has the image size {height} x {width}")
    return height, width


def _class_ids(content: dict, file: Path) -> np.ndarray:
    """Return the class indices of a CAM file, (K,) int64."""
    if "keys" not in content:
        raise ValueError(f"{file} is not a CAM file: it has no entry `keys`")
    try:
        keys = content["keys"]
        if not isinstance(keys, np.ndarray) and not all(isinstance(key, int | np.integer) for key in keys):
            raise ValueError("its keys are not class indices")
        class_ids = np.asarray(keys).astype(np.int64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if (class_ids < 0).any():
        raise ValueError(f"{file} is damaged: it has the class index {class_ids.min()}")
    return class_ids


def _content(file: Path) -> dict:
    """Return the entries of a CAM file."""
    try:
        return read_npz(file) if file.suffix == FORMATS["compact"] else read_npy_dict(file)
    except Exception as error:  # damaged pickles and archives raise exceptions of any type
        raise ValueError(
            f"{file} cannot be read as a CAM file: {error}; delete it and run step 1 again"
        ) from None
