"""The CAM file: the class activation maps of one image, one map per label, in one of two formats.

* full, `<name>.npy`: the format of CLIP-ES's reference implementation, a pickled dict {"keys": (K,) int64,
  "attn_highres": (K, H, W) float16} with maps at image size. Other projects can read it.
* compact, `<name>.npz`: the float32 maps on the patch grid and the image size, about 120 times smaller.

`read` returns the same maps from both formats, so the format does not affect results.
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
        raise pickle.UnpicklingError(f"it uses the encoding {encoding}, which is not allowed in CAM files")
    return text.encode("latin1")


# The globals that a pickled dict of arrays refers to, and their values. NumPy 1 and 2 define the functions in
# different modules; __reduce__ of an array returns them in both versions.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,  # bytes in protocols 0 to 2
    ("__builtin__", "bytes"): lambda: b"",  # empty bytes in protocols 0 to 2
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    _ALLOWED[f"{_core}.multiarray", "scalar"] = np.int64(0).__reduce__()[0]
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]  # protocol 5


class _Unpickler(pickle.Unpickler):
    """Unpickler of containers and NumPy arrays; raises UnpicklingError for other objects."""

    def find_class(self, module: str, name: str):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed in CAM files")


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
    return None if file is None else _class_ids(_content(file, only="keys"), file).tolist()


def read(
    folder: str | Path,
    name: str,
    cam_type: str = "attn_highres",
    most: int | None = None,
    rounded: bool = True,
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

    Returns:
        class_ids (K,) int64 and maps (K, H, W) float16; (K + 1, H, W) if the type has a background channel.

    Raises:
        FileNotFoundError: the image has no CAM file.
        ValueError: the file is damaged, is not a CAM file, contains code, or has no maps of type `cam_type`.
    """
    file = find(folder, name)
    if file is None:
        raise FileNotFoundError(f"no CAM file of {name} ({' or '.join(FORMATS.values())}) in {folder}")
    content = _content(file)
    class_ids = _class_ids(content, file)
    if cam_type not in content:
        types = ", ".join(key for key in content if key not in ("keys", "size"))
        raise ValueError(f"{file} has no {cam_type} maps (available: {types or 'none'}): give --cam_type")
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
        raise ValueError(f"{file}: {cam_type} has shape {maps.shape}, expected {expected} maps (K, H, W)")
    return class_ids, maps


def _class_ids(content: dict, file: Path) -> np.ndarray:
    """Return the class indices of a CAM file, (K,) int64."""
    if "keys" not in content:
        raise ValueError(f"{file} is not a CAM file: it has no entry `keys`")
    try:
        class_ids = np.asarray(content["keys"]).astype(np.int64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if (class_ids < 0).any():
        raise ValueError(f"{file} is damaged: it has the class index {class_ids.min()}")
    return class_ids


def _content(file: Path, only: str | None = None) -> dict:
    """Return the entries of a CAM file. If `only` is given, only this entry of a compact file is read."""
    try:
        if file.suffix == FORMATS["compact"]:
            with np.load(file, allow_pickle=False) as arrays:
                return {entry: arrays[entry] for entry in arrays.files if only in (None, entry)}
        with open(file, "rb") as stream:
            np.lib.format.read_magic(stream)  # always version 1.0: the header of a 0-d array is short
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            if shape != () or not dtype.hasobject:
                raise ValueError(f"it contains an array of {dtype}, expected a dict of CAMs")
            content = _Unpickler(stream).load()[()]
        if not isinstance(content, dict):
            raise ValueError(f"it contains a {type(content).__name__}, expected a dict of CAMs")
        return content
    except Exception as error:  # damaged pickles and archives raise exceptions of any type
        raise ValueError(f"{file} cannot be read as a CAM file: {error}") from None
