"""Reader of files of tensors: of `torch.save`, TorchScript archives and safetensors.

`torch.load(weights_only=True)` allocates what a file declares: 1 kB can take any amount of memory. Here the
restricted unpickler of `foundation.untrusted` reads all pickles, and sizes are compared with the stored
bytes.
"""

import io
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from foundation.untrusted import ArrayUnpickler, Function, Implausible, check_pickle, open_zip

LEGACY = 0x1950A86A20F9469CFC6C  # first object of files of PyTorch before 1.6
HEADER_BYTES = 100_000_000  # of safetensors; the limit of the library
MAX_AXES = 64  # of a tensor; the limit of torch
START_BYTES = 512  # read to recognize a format

# Start of files that are often given instead of weights -> what they are, and the cure.
DOWNLOADED = "download the file itself (on Hugging Face from the address with /resolve/, not /blob/)"
FOREIGN = {
    rb"\Z": f"it is empty (truncated to 0 bytes): {DOWNLOADED}",
    rb"version https://git-lfs": "it is a Git LFS pointer, not the weights: run `git lfs pull`, or "
    f"{DOWNLOADED}",
    rb"\s*<": f"it is a web page, or it is damaged: {DOWNLOADED}",
    rb"\s*[{\[]": "it is JSON, such as a configuration or the index of a model in several files, not the "
    "weights: give the file of weights; merge several files into one",
    rb"\x1f\x8b": "it is compressed by gzip: decompress it with gunzip",
    rb"BZh": "it is compressed by bzip2: decompress it with bunzip2",
    rb"\xfd7zXZ": "it is compressed by xz: decompress it with unxz",
    rb"\x28\xb5\x2f\xfd": "it is compressed by zstd: decompress it with unzstd",
    rb"7z\xbc\xaf|Rar!": "it is a 7z or RAR archive: unpack it and give the file of weights",
    rb"(?s).{257}ustar": "it is a tar archive: unpack it and give the file of weights",
    rb"\x89HDF": "it has the format HDF5 (Keras): give weights of PyTorch, or convert it",
    rb"GGUF": "it has the format GGUF: give weights of PyTorch or safetensors",
    rb"\x89PNG|\xff\xd8\xff|GIF8": "it is an image: give the file of weights",
    rb"%PDF": "it is a PDF: give the file of weights",
}
NUMBER = re.compile(r"bool|(u?int|b?float|complex)\d+(_e\dm\d(fn)?(uz)?)?")  # names of types in torch
TEXT = re.compile(rb"[\t\r\n\x20-\x7e\x80-\xff]+")


class _Refused(ValueError):
    """The file is complete, but is no checkpoint; the message starts with "it" and names the cure."""


def read_tensors(file: str | Path) -> Any:
    """Return the content of a file of tensors, on the CPU. The content determines the format, not the suffix.

    Returns:
        What `torch.save` wrote: containers, numbers, text and tensors. For TorchScript archives and
        safetensors: name -> tensor.

    Raises:
        OSError: the file cannot be read, or does not fit in memory.
        ValueError: the file has another format, is damaged, contains other objects, or declares far more
            content than it stores. The message names the file.
    """
    file = Path(file)
    with open(file, "rb") as stream:
        start = stream.read(START_BYTES)
    try:
        return _read(file, start)
    except Implausible as error:
        fault = f"{error}: it is truncated or damaged, use another file"
    except _Refused as error:
        fault = str(error)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:100]
        reason = f" ({reason})" if reason.startswith("it ") else ""  # not a message of the pickle module
        fault = (
            f"it is damaged, or it contains Python objects other than tensors{reason}, which are not loaded "
            "for safety: save only its state dict"
        )
    except MemoryError:
        raise OSError(f"{file} does not fit in memory: free some memory, or use a smaller model") from None
    except OSError:
        raise
    except Exception:  # readers raise exceptions of many types for damaged files
        fault = (
            "it is truncated, or it is not a TorchScript archive, a state dict of plain tensors or a "
            "safetensors file"
        )
    raise ValueError(f"{file} is not a readable checkpoint: {foreign_format(start) or fault}") from None


def foreign_format(start: bytes) -> str:
    """Return what a file is, and the cure, if it starts like a file that is no checkpoint; else ""."""
    start = start.removeprefix(b"\xef\xbb\xbf")  # byte order mark of UTF-8
    for pattern, sentence in FOREIGN.items():
        if re.match(pattern, start):
            return sentence
    if TEXT.fullmatch(start):
        words = start.decode("utf-8", "replace").split()
        return f"it is damaged, or a text file (it starts with {' '.join(words)[:40]!r}): {DOWNLOADED}"
    return ""


def _read(file: Path, start: bytes) -> Any:
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < HEADER_BYTES:
        return load_file(file)
    if not start.startswith(b"PK\3\4"):
        return _read_legacy(file.read_bytes())
    with open_zip(file) as archive:
        root = archive.namelist()[0].split("/")[0]
        if f"{root}/data.pkl" not in archive.namelist():
            name = archive.namelist()[0][:100]
            raise _Refused(
                f"it is a zip archive of other files ({name!r}): unpack it and give the file of weights"
            )
        reader = _ArchiveReader(archive, root, file.stat().st_size)
        content = reader.load()
    return dict(_named_tensors(content)) if isinstance(content, _Module) else content


class _Dict(dict):
    """Replacement for OrderedDict, without the attributes that a file sets, such as `_metadata`."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Module:
    """Replacement for every scripted module class; unpickling stores the module's attributes in __dict__."""


def _dict(pairs: list = ()) -> _Dict:
    result = _Dict(pairs)
    if pairs:
        pairs.clear()  # a second call with the same list would take memory again
    return result


def _torch_globals() -> dict[tuple[str, str], Any]:
    """Return globals in files of tensors, and their stand-ins; `_TensorUnpickler` has the functions that
    make tensors."""
    names = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
    types = {"Byte": "uint8", "Char": "int8"}
    allowed = {("torch", f"{name}Storage"): getattr(torch, types.get(name, name.lower())) for name in names}
    allowed["torch.storage", "UntypedStorage"] = torch.uint8
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype) and NUMBER.fullmatch(name):
            allowed["torch", name] = value
    for kind in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
        allowed[kind] = None  # only an argument of _rebuild_from_type_v2
    return allowed | {
        ("torch", "device"): Function(lambda *_: None),
        ("torch", "Size"): Function(lambda sides: sides),
        ("torch._utils", "_rebuild_parameter"): Function(lambda tensor, *_: tensor),
        ("torch._utils", "_rebuild_parameter_with_state"): Function(lambda tensor, *_: tensor),
        ("torch._tensor", "_rebuild_from_type_v2"): Function(
            lambda function, _, values, *__: function(*values)
        ),
        ("torch.jit._pickle", "restore_type_tag"): Function(lambda value, _: value),
        ("collections", "OrderedDict"): Function(_dict),
    }


class _TensorUnpickler(ArrayUnpickler):
    """Unpickler that also makes tensors, of the storages that `persistent_load` returns."""

    GLOBALS = ArrayUnpickler.GLOBALS | _torch_globals()

    def find_class(self, module: str, name: str):
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return Function(self._tensor)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return Function(self._tensor_of_type)
        return super().find_class(module, name)

    def _tensor(self, storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
        """Return a view of a storage (N,). Views can be far larger than the storage, and are copied later."""
        if len(size) > MAX_AXES or not all(type(side) is int and side >= 0 for side in size):
            raise pickle.UnpicklingError("it has a tensor without a size")
        self.claim(math.prod(size) * storage.element_size())
        return torch.as_strided(storage, size, stride, offset)  # RuntimeError if it exceeds the storage

    def _tensor_of_type(self, storage: Tensor, *arguments) -> Tensor:
        offset, size, stride, _, _, dtype, *_ = arguments
        return self._tensor(storage.view(dtype), offset, size, stride)


class _ArchiveReader(_TensorUnpickler):
    """Unpickler of an archive of `torch.save` or TorchScript."""

    def __init__(self, archive: zipfile.ZipFile, root: str, stored: int):
        stream = io.BytesIO(archive.read(f"{root}/data.pkl"))
        check_pickle(stream)
        super().__init__(stream, stored)
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}  # record name -> uint8 (N,)
        order = f"{root}/byteorder"
        self.swapped = order in archive.namelist() and archive.read(order) != sys.byteorder.encode()

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return type("Module", (_Module,), {})  # of its own, because a pickle can change the class
        if module == "torch.jit._pickle" and name.startswith("build_"):  # typed lists of plain values
            return Function(lambda values: values)
        return super().find_class(module, name)

    def persistent_load(self, identifier: tuple) -> Tensor:
        _, dtype, key, *_ = identifier
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            values = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            if self.swapped:
                values.untyped_storage().byteswap(dtype)
            self.storages[key] = values
        return self.storages[key].view(dtype)


class _LegacyReader(_TensorUnpickler):
    """Unpickler of files of PyTorch before 1.6: the storages follow the pickle."""

    def __init__(self, stream: io.BytesIO, stored: int):
        super().__init__(stream, stored)
        self.storages: dict[str, Tensor] = {}  # key -> (N,)
        self.free = stored

    def persistent_load(self, identifier: tuple) -> Tensor:
        kind, dtype, key, _, count, view = identifier
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError("it contains a module or a view of a storage")
        if key not in self.storages:
            self.free -= count * dtype.itemsize
            if self.free < 0 or count < 0:
                raise Implausible(f"it declares {count} numbers, but has only {self.stored} bytes")
            self.storages[key] = torch.empty(count, dtype=dtype)
        return self.storages[key]


def _read_legacy(content: bytes) -> Any:
    stream = io.BytesIO(content)

    def load() -> tuple[Any, dict[str, Tensor]]:
        check_pickle(stream)
        reader = _LegacyReader(stream, len(content))
        return reader.load(), reader.storages

    if load()[0] != LEGACY:
        raise pickle.UnpicklingError("it is a pickle, but not of torch.save")
    load()  # version of the format
    if not load()[0].get("little_endian", True):
        raise pickle.UnpicklingError("it has numbers of the other byte order")
    result, storages = load()
    keys, _ = load()
    if sorted(keys) != sorted(storages):
        raise pickle.UnpicklingError("it lacks storages")
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        size = count * storages[key].element_size()
        if count != len(storages[key]) or stream.tell() + size > len(content):
            raise pickle.UnpicklingError("it has a storage of another size")
        if count:
            data = bytearray(stream.read(size))
            storages[key].copy_(torch.frombuffer(data, dtype=storages[key].dtype))
    return result


def _named_tensors(
    module: _Module, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a module and its submodules, with the names of a state dict. A submodule with
    several names is yielded once: nested, its number of names could be exponential."""
    seen = set() if seen is None else seen
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            if id(value) not in seen:
                yield from _named_tensors(value, f"{prefix}{name}.", seen)
        elif isinstance(value, Tensor):
            yield prefix + name, value
