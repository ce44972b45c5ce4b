"""The CAM file: the class activation maps of one image, one map per label, in one of two formats.

* full, `<name>.npy`: the public CLIP-ES format, a pickled dict {"keys": (K,) int64,
  "attn_highres": (K, H, W) float16}, maps at image size. Other projects read it.
* compact, `<name>.npz`: the float32 maps on the patch grid and the image size, about 120 times smaller.

Both read to the same maps, so the choice affects no result.
"""

import pickle
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np

from segmentation.images import size_within

FORMATS = {"full": ".npy", "compact": ".npz"}


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}, which no CAM file needs")
    return text.encode("latin1")


# All that a pickled dict of arrays needs. The modules of these functions differ between NumPy 1 and 2;
# __reduce__ of an array returns them in both.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,  # how protocols 0 to 2 store bytes,
    ("__builtin__", "bytes"): lambda: b"",  # and how they store none
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    _ALLOWED[f"{_core}.multiarray", "scalar"] = np.int64(0).__reduce__()[0]
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]  # protocol 5


class _Unpickler(pickle.Unpickler):
    """Loads containers and NumPy arrays; raises UnpicklingError for anything else."""

    def find_class(self, module: str, name: str):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CAM file needs")


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
        raise ValueError(f"CAM format must be full or compact, got {format!r}")
    keys = np.asarray(class_ids, np.int64).reshape(-1)
    cams = {cam_type: np.ascontiguousarray(grid, np.float32) for cam_type, grid in cams.items()}
    for cam_type, grid in cams.items():
        if grid.ndim != 3 or len(grid) != len(keys):
            raise ValueError(f"{cam_type} of shape {grid.shape} does not hold {len(keys)} maps")
    stream = BytesIO()
    if format == "full":
        full = {cam_type: resize(grid, size).astype(np.float16) for cam_type, grid in cams.items()}
        np.save(stream, {"keys": keys, **full}, allow_pickle=True)
    else:
        np.savez(stream, keys=keys, size=np.array(size, np.int64), **cams)
    return stream.getvalue()


def find(folder: str | Path, name: str) -> Path | None:
    """Return the CAM file of image `name`, of either format; None without one."""
    files = (Path(folder) / f"{name}{suffix}" for suffix in FORMATS.values())
    return next((file for file in files if file.is_file()), None)


def class_ids_of(folder: str | Path, name: str) -> list[int] | None:
    """Return the class indices of the maps of image `name`; None without a CAM file.

    Raises:
        ValueError: as `read`.
    """
    file = find(folder, name)
    return None if file is None else _class_ids(_content(file, only="keys"), file).tolist()


def read(
    folder: str | Path,
    name: str,
    cam_type: str = "attn_highres",
    most: int | None = None,
    rounded: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the CAMs of one image, full or compact.

    Args:
        folder: of the CAM files.
        name: image id.
        cam_type: type of the maps. Types with "bg" in their name have a background channel before the K.
        most: pixels; maps of a larger image are shrunk, see `segmentation.images.size_within`.
        rounded: False leaves the maps of a compact file float32: rounding all of them takes longer than the
            rest, and some callers need few.

    Returns:
        class_ids (K,) int64 and maps (K, H, W) float16; (K + 1, H, W) if the type has a background channel.

    Raises:
        FileNotFoundError: no CAM file of this image.
        ValueError: the file is damaged, is no CAM file, asks to run code, or lacks `cam_type`.
    """
    file = find(folder, name)
    if file is None:
        raise FileNotFoundError(f"no CAM file of {name} ({' or '.join(FORMATS.values())}) in {folder}")
    content = _content(file)
    class_ids = _class_ids(content, file)
    if cam_type not in content:
        types = ", ".join(key for key in content if key not in ("keys", "size"))
        raise ValueError(f"{file} holds no {cam_type}, but {types or 'nothing else'}: give --cam_type")
    try:
        maps = np.asarray(content[cam_type])
        height, width = (int(side) for side in content.get("size", maps.shape[1:]))
        size = (height, width) if most is None else size_within((height, width), most)
        if "size" in content or size != maps.shape[1:]:
            maps = resize(maps.astype(np.float32, copy=False), size)
        if rounded or "size" not in content:
            maps = maps.astype(np.float16, copy=False)
    except (TypeError, ValueError, cv2.error) as error:
        raise ValueError(f"{file} is damaged: {str(error).strip().splitlines()[-1]}") from None
    expected = len(class_ids) + ("bg" in cam_type)
    if maps.ndim != 3 or len(maps) != expected:
        raise ValueError(f"{file}: {cam_type} of shape {maps.shape} does not hold {expected} maps")
    return class_ids, maps


def _class_ids(content: dict, file: Path) -> np.ndarray:
    """Return the class indices of a CAM file, (K,) int64."""
    if "keys" not in content:
        raise ValueError(f"{file} is no CAM file: it holds no keys")
    try:
        class_ids = np.asarray(content["keys"]).astype(np.int64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if (class_ids < 0).any():
        raise ValueError(f"{file} is damaged: it holds the class index {class_ids.min()}")
    return class_ids


def _content(file: Path, only: str | None = None) -> dict:
    """Return the entries of a CAM file; `only` this one, if the format can be read in parts."""
    try:
        if file.suffix == FORMATS["compact"]:
            with np.load(file, allow_pickle=False) as arrays:
                return {entry: arrays[entry] for entry in arrays.files if only in (None, entry)}
        with open(file, "rb") as stream:
            np.lib.format.read_magic(stream)  # always version 1.0: the header of a 0-d array is short
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            if shape != () or not dtype.hasobject:
                raise ValueError(f"it holds an array of {dtype}, not a dict of CAMs")
            content = _Unpickler(stream).load()[()]
        if not isinstance(content, dict):
            raise ValueError("it holds no dict")
        return content
    except Exception as error:  # damaged pickles and archives raise exceptions of any type
        raise ValueError(f"{file} cannot be read as CAM file: {error}") from None
