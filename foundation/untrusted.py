"""Readers of files from unknown sources: pickles, NumPy arrays and zip archives.

A file declares how large its content is. Every reader compares this with the number of stored bytes before it
allocates memory, so that a small file cannot take gigabytes. Arrays have plain number or text types.
"""

import ast
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FREE_BYTES = 2**26  # 64 MB, which the content of any file may take
RATIO = 16  # further bytes of content per stored byte; arrays of weights and CAMs compress to a half at most
MEMO = 1_000_000  # highest index of an object that a pickle may refer to; 8 MB
OPCODES = 1_000_000  # of a pickle; its objects take up to 100 bytes each. Checkpoints have 40 per tensor
HEADER_BYTES = 10_000  # of an array; NumPy's own limit
# What `_reconstruct` and `scalar` may build: bool, integers and floats, of either byte order.
NUMBER = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


class Implausible(ValueError):
    """The content of a file would take far more memory than is stored; the message starts with "it"."""


def check_size(declared: int, stored: int, what: str = "it") -> None:
    """Raise Implausible if content of `declared` bytes is implausible for `stored` bytes of a file."""
    if declared > FREE_BYTES + RATIO * stored:
        raise Implausible(f"{what} declares {declared} bytes of content, but has only {stored} bytes")


def open_zip(file: str | Path) -> zipfile.ZipFile:
    """Return an open zip archive whose members declare plausible sizes and lie within the file.

    Raises:
        Implausible: the sizes are implausible.
        zipfile.BadZipFile, OSError: not a zip archive.
    """
    archive = zipfile.ZipFile(file)
    try:
        check_size(sum(member.file_size for member in archive.infolist()), Path(file).stat().st_size)
    except ValueError:
        archive.close()
        raise
    return archive


def read_npz(file: str | Path, text: bool = False) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name.

    Args:
        text: also accept arrays of text.

    Raises:
        Exception: damaged archives raise exceptions of many types.
        ValueError: arrays of another type or size.
    """
    with open_zip(file) as archive:
        return {
            member.filename.removesuffix(".npy"): parse_npy(archive.read(member), text)
            for member in archive.infolist()
        }


def parse_npy(content: bytes, text: bool = False) -> np.ndarray:
    """Return the array in the content of an .npy file; `text` also accepts an array of text.

    Raises:
        ValueError: damaged, of another type, or with more or fewer bytes than its shape.
    """
    dtype, order, shape, start = _npy_header(content)
    kinds = "biufU" if text else "biuf"
    if dtype.kind not in kinds:
        raise ValueError(f"it has an array of type {dtype}, expected numbers{' or text' if text else ''}")
    if math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ValueError(f"it declares the shape {shape}, but has {len(content) - start} bytes of data")
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order=order).copy(order="K")


def _npy_header(content: bytes) -> tuple[np.dtype, str, tuple[int, ...], int]:
    """Return type, memory order, shape and length of the header of the content of an .npy file."""
    if content[:6] != b"\x93NUMPY" or content[6:7] not in (b"\1", b"\2", b"\3"):
        raise ValueError("it is not an .npy file")
    number = "<H" if content[6] == 1 else "<I"
    (length,) = struct.unpack_from(number, content, 8)
    start = 8 + struct.calcsize(number) + length
    if length > HEADER_BYTES or start > len(content):
        raise ValueError("its header is damaged")
    try:
        header = ast.literal_eval(content[start - length : start].decode("latin1").strip())
        dtype, shape = np.dtype(header["descr"]), header["shape"]
    except Exception:  # literal_eval and NumPy raise many types
        raise ValueError("its header is damaged") from None
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its header is damaged: shape {shape!r}"[:100])
    return dtype, "F" if header.get("fortran_order") else "C", shape, start


def check_pickle(stream: BinaryIO) -> None:
    """Raise Implausible if the pickle at the position of a stream would allocate far more than it stores.

    The memo of an unpickler is an array, so an index of 2e8 takes gigabytes. An opcode of one byte creates an
    object of up to 100 bytes, and many opcodes take few bytes in a compressed archive. All other sizes are
    those of stored bytes. The position is restored.

    Raises:
        Implausible: see above.
        ValueError: it is not a pickle, or incomplete.
    """
    start = stream.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > MEMO:
            raise Implausible(f"its memo index {argument} is above {MEMO}")
        if count > OPCODES:
            raise Implausible(f"it has a pickle of more than {OPCODES} operations")
    stream.seek(start)


class Function:
    """A function that a pickle may call; its attributes cannot be changed by the pickle."""

    __slots__ = ("call",)

    def __init__(self, call: Callable):
        self.call = call

    def __call__(self, *arguments):
        return self.call(*arguments)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it changes a function")


class _Type:
    """A NumPy type in a pickle."""

    def __init__(self, code: str, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        _, self.order, *parts = state
        if any(part is not None for part in parts[:3]):  # sub-array, names and fields
            raise pickle.UnpicklingError("it has an array of records")

    def resolve(self) -> np.dtype:
        """Return the type of numbers."""
        if not isinstance(self.code, str) or not NUMBER.fullmatch(self.code):
            raise pickle.UnpicklingError(f"it has an array of type {self.code}, expected numbers")
        dtype = np.dtype(self.code)
        return dtype.newbyteorder(self.order) if self.order in ("<", ">") else dtype


class _Array:
    """An array in a pickle; `value` is set by the state that follows it: the array, or for an object array
    without axes the object."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        if dtype.code in ("O", "O8"):
            if shape != () or not isinstance(data, list) or len(data) != 1:
                raise pickle.UnpicklingError("it has an array of objects")
            (self.value,) = data
        else:
            self.value = _from_buffer(data, dtype, shape, "F" if is_fortran else "C")


def _from_buffer(data: Any, dtype: _Type, shape: tuple, order: str = "C", *_) -> np.ndarray:
    return np.frombuffer(data, dtype.resolve()).reshape(shape, order=order)


def _globals() -> dict[tuple[str, str], Any]:
    """Return the globals that a pickled dict of arrays refers to, and their stand-ins."""
    allowed = {
        ("numpy", "ndarray"): None,  # only an argument of _reconstruct
        ("numpy", "dtype"): Function(_Type),
        ("__builtin__", "bytes"): Function(lambda: b""),  # empty bytes in protocols 0 to 2
    }
    for core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
        allowed[f"{core}.multiarray", "_reconstruct"] = Function(lambda *_: _Array())
        allowed[f"{core}.multiarray", "scalar"] = Function(
            lambda dtype, data: _from_buffer(data, dtype, (1,))[0]
        )
        allowed[f"{core}.numeric", "_frombuffer"] = Function(_from_buffer)  # protocol 5
    return allowed


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler of containers, numbers, text and arrays of numbers; check the pickle by `check_pickle` first.

    Args:
        stream: contains the pickle.
        stored: bytes of the file, see `check_size`.
    """

    GLOBALS: Mapping[tuple[str, str], Any] = _globals()

    def __init__(self, stream: BinaryIO, stored: int):
        super().__init__(stream)
        self.declared, self.stored = 0, stored

    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):  # bytes in protocols 0 to 2
            return Function(self._encode)
        if (module, name) in self.GLOBALS:
            return self.GLOBALS[module, name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed")

    def load(self) -> Any:
        try:
            return super().load()
        finally:
            self.memo.clear()  # it refers to this object and would keep all arrays until garbage collection

    def claim(self, size: int) -> None:
        """Count `size` bytes that a call allocates: one stored object can be the argument of many calls.

        Raises:
            Implausible: the sum of all calls is implausible.
        """
        self.declared += size
        check_size(self.declared, self.stored)

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it uses the encoding {encoding}, which is not allowed")
        self.claim(len(text))
        return text.encode("latin1")


def read_npy_dict(file: str | Path) -> dict[str, Any]:
    """Return the dict that `numpy.save` has pickled into an .npy file. Its arrays have number types and are
    read-only.

    NumPy's own unpickling of an array relies on types and addresses in the file: a crafted file makes it read
    any memory. Here types are checked, and arrays are built of the bytes in the file.

    Raises:
        Exception: damaged content raises exceptions of many types.
        ValueError, pickle.UnpicklingError: no such dict, or objects of other types.
    """
    with open(file, "rb") as stream:
        dtype, _, shape, start = _npy_header(stream.read(HEADER_BYTES))
        if shape != () or not dtype.hasobject:
            raise ValueError(f"it contains an array of {dtype}, expected a dict of CAMs")
        stream.seek(start)
        check_pickle(stream)
        value = getattr(ArrayUnpickler(stream, Path(file).stat().st_size).load(), "value", None)
    if not isinstance(value, dict):
        raise ValueError(f"it contains a {type(value).__name__}, expected a dict of CAMs")
    return {key: item.value if isinstance(item, _Array) else item for key, item in value.items()}
