"""The CAM file: the class activation maps of one image, one map per label.

Two formats, read alike:

* full, `<name>.npy`: the public CLIP-ES format, a pickled dict {"keys": (K,) int64,
  "attn_highres": (K, H, W) float16}, maps at image size. Other projects read it.
* compact, `<name>.npz`: the float32 maps on the patch grid and the image size, about 120 times smaller.

Full holds exactly what reading compact gives, so nothing downstream depends on the choice.
"""

import pickle
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np

from common.files import replacing
from segmentation.images import size_within

FORMATS = {"full": ".npy", "compact": ".npz"}


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}, which no CAM file needs")
    return text.encode("latin1")


# All that a pickled dict of arrays needs. NumPy 1 and 2 name the modules of their functions differently;
# asking an array for its own recipe finds them in both.
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
    """Rebuilds containers and NumPy arrays; anything else a pickle asks for is refused."""

    def find_class(self, module: str, name: str):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CAM file needs")


def resize(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize of each map (half-pixel centres, edges replicated, no antialiasing).

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


def write(
    folder: str | Path,
    name: str,
    keys: Sequence[int] | np.ndarray,
    maps: Mapping[str, np.ndarray],
    size: tuple[int, int],
    format: str = "full",
) -> Path:
    """Write the CAMs of one image; the file appears whole or not at all.

    Args:
        folder: where; made if missing.
        name: image id.
        keys: (K,) class indices, 0-based without background.
        maps: CAM type -> (K, h, w) float32 in [0, 1] on the patch grid, e.g. {"attn_highres": ...}.
        size: (H, W) of the image.
        format: "full" or "compact".

    Returns:
        The file written.
    """
    content = encode(keys, maps, size, format)
    file = _path(folder, name, format)
    with replacing(file) as stream:
        stream.write(content)
    return file


def encode(
    keys: Sequence[int] | np.ndarray,
    maps: Mapping[str, np.ndarray],
    size: tuple[int, int],
    format: str = "full",
) -> bytes:
    """What `write` writes."""
    if format not in FORMATS:
        raise ValueError(f"CAM format must be full or compact, got {format!r}")
    keys = np.asarray(keys, np.int64).reshape(-1)
    maps = {cam_type: np.ascontiguousarray(grid, np.float32) for cam_type, grid in maps.items()}
    for cam_type, grid in maps.items():
        if grid.ndim != 3 or len(grid) != len(keys):
            raise ValueError(f"{cam_type} of shape {grid.shape} does not hold {len(keys)} maps")
    stream = BytesIO()
    if format == "full":
        full = {cam_type: resize(grid, size).astype(np.float16) for cam_type, grid in maps.items()}
        np.save(stream, {"keys": keys, **full}, allow_pickle=True)
    else:
        np.savez(stream, keys=keys, size=np.array(size, np.int64), **maps)
    return stream.getvalue()


def find(folder: str | Path, name: str) -> Path | None:
    """The CAM file of image `name`, in whichever format it exists."""
    files = (_path(folder, name, format) for format in FORMATS)
    return next((file for file in files if file.is_file()), None)


def exists(folder: str | Path, name: str) -> bool:
    """Is there a CAM file of image `name`?"""
    return find(folder, name) is not None


def keys(folder: str | Path, name: str) -> list[int] | None:
    """The class indices of the maps that image `name` has; None without a CAM file.

    Raises:
        ValueError: as `read`.
    """
    file = find(folder, name)
    return None if file is None else _keys_of(_content(file, only="keys"), file).tolist()


def read(
    folder: str | Path,
    name: str,
    cam_type: str = "attn_highres",
    most: int | None = None,
    rounded: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Read the CAMs of one image, full or compact.

    Args:
        folder: of the CAM files.
        name: image id.
        cam_type: which maps. Types with "bg" in their name carry a background channel in front of the K.
        most: pixels; maps of a larger image are shrunk, see `segmentation.images.size_within`.
        rounded: False leaves the maps of a compact file float32, for callers that need not have all of them
            rounded; that takes longer than all the rest.

    Returns:
        keys (K,) int64 and maps (K, H, W) float16; (K + 1, H, W) where the type has a background channel.

    Raises:
        FileNotFoundError: no CAM file of this image.
        ValueError: the file is damaged, is no CAM file, asks to run code, or lacks `cam_type`.
    """
    file = find(folder, name)
    if file is None:
        raise FileNotFoundError(f"no CAM file of {name} ({' or '.join(FORMATS.values())}) in {folder}")
    content = _content(file)
    keys = _keys_of(content, file)
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
    expected = len(keys) + ("bg" in cam_type)
    if maps.ndim != 3 or len(maps) != expected:
        raise ValueError(f"{file}: {cam_type} of shape {maps.shape} does not hold {expected} maps")
    return keys, maps


def _path(folder: str | Path, name: str, format: str) -> Path:
    return Path(folder) / f"{name}{FORMATS[format]}"


def _content(file: Path, only: str | None = None) -> dict:
    """What a CAM file holds; `only` that entry, where the format can be read in parts."""
    return _read_full(file) if file.suffix == FORMATS["full"] else _read_compact(file, only)


def _keys_of(content: dict, file: Path) -> np.ndarray:
    """(K,) int64."""
    if "keys" not in content:
        raise ValueError(f"{file} is no CAM file: it holds no keys")
    try:
        keys = np.asarray(content["keys"]).astype(np.int64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if (keys < 0).any():
        raise ValueError(f"{file} is damaged: it holds the class index {keys.min()}")
    return keys


def _read_full(file: Path) -> dict:
    try:
        with open(file, "rb") as stream:
            np.lib.format.read_magic(stream)  # always version 1.0: the header of a 0-d array is short
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            if shape != () or not dtype.hasobject:
                raise ValueError(f"it holds an array of {dtype}, not a dict of CAMs")
            content = _Unpickler(stream).load()[()]
    except Exception as error:  # damaged pickles fail in any way they like
        raise ValueError(f"{file} cannot be read as CAM file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be read as CAM file: it holds no dict")
    return content


def _read_compact(file: Path, only: str | None) -> dict:
    try:
        with np.load(file, allow_pickle=False) as content:
            return {entry: content[entry] for entry in content.files if only in (None, entry)}
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise ValueError(f"{file} cannot be read as CAM file: {error}") from None
