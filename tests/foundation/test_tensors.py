"""Reader of files of tensors: it agrees with torch, never takes more memory than is stored, and names files
of other formats."""

import _codecs
import gc
import gzip
import io
import pickle
import struct
import sys
import tarfile
import weakref
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foundation.tensors import foreign_format, read_tensors
from tests.foundation.test_untrusted import Reduced


def everything() -> dict:
    base = torch.randn(5, 6)
    return {
        "float32": base,
        "transposed": base.T,
        "slice": base[1:3, 2],
        "expanded": torch.ones(1).expand(4, 5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "bfloat16": torch.randn(2).bfloat16(),
        "float8": torch.randn(3).to(torch.float8_e4m3fn),
        "uint16": torch.zeros(3, dtype=torch.uint16),
        "bool": torch.tensor([True]),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "numbers": [1, 2.5, "text", (True, None), np.float64(3)],
        "size": base.shape,
        "state dict": OrderedDict(torch.nn.BatchNorm1d(2).state_dict()),
    }


def assert_same(read, expected, name=""):
    if isinstance(expected, torch.Tensor):
        assert read.dtype == expected.dtype and read.stride() == expected.stride(), name
        assert torch.equal(read.float(), expected.float()), name
    elif isinstance(expected, dict):
        assert list(read) == list(expected), name
        for key, value in expected.items():
            assert_same(read[key], value, key)
    elif isinstance(expected, list | tuple):
        for pair in zip(read, expected, strict=True):
            assert_same(*pair, name)
    else:
        assert read == expected, name


@pytest.mark.parametrize("protocol", [1, 2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_save_are_read(tmp_path, legacy, protocol):
    options = {"_use_new_zipfile_serialization": not legacy, "pickle_protocol": protocol}
    expected = everything()
    torch.save(expected, tmp_path / "a.pt", **options)
    assert_same(read_tensors(tmp_path / "a.pt"), expected)


def test_tensor_with_attributes_is_read(tmp_path):
    tensor = torch.randn(3)
    tensor.note = "text"
    torch.save({"a": tensor}, tmp_path / "a.pt")
    assert torch.equal(read_tensors(tmp_path / "a.pt")["a"], tensor)


def test_archive_of_the_other_byte_order_is_read(tmp_path):
    torch.save({"a": torch.arange(3, dtype=torch.float32)}, tmp_path / "a.pt")
    other = "big" if sys.byteorder == "little" else "little"
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data/0"):
                content = np.frombuffer(content, np.float32).byteswap().tobytes()
            target.writestr(name, other if name.endswith("byteorder") else content)
    assert read_tensors(tmp_path / "b.pt")["a"].tolist() == [0, 1, 2]


def test_flipped_bit_in_a_weight_raises(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        content[archive.getinfo("a/data/0").header_offset + 200] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_tensors(tmp_path / "a.pt")


class Storage:
    def __init__(self, kind=torch.FloatStorage, key="0", count=1):
        self.identifier = ("storage", kind, key, "cpu", count)


class Pickler(pickle.Pickler):
    def __init__(self, stream, legacy: bool):
        super().__init__(stream, 2)
        self.legacy = legacy

    def persistent_id(self, value):
        if isinstance(value, Storage):
            return (*value.identifier, None) if self.legacy else value.identifier
        return None


def pickled(value, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, legacy).dump(value)
    return stream.getvalue()


def archive(file: Path, content: bytes, scripted: bool = False, **options) -> Path:
    """Write an archive whose pickle is `content`, with one storage of a float32 number."""
    with zipfile.ZipFile(file, "w", **options) as target:
        target.writestr("a/data.pkl", content)
        target.writestr("a/data/0", struct.pack("<f", 1))
        if scripted:
            target.writestr("a/constants.pkl", pickled(()))
    return file


def legacy(file: Path, content: bytes, keys=("0",), data: bytes = struct.pack("<qf", 1, 1)) -> Path:
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    file.write_bytes(b"".join(map(pickled, header)) + content + pickled(list(keys)) + data)
    return file


def tensor(size, stride, offset=0, storage=None):
    rebuild = torch._utils._rebuild_tensor_v2
    return Reduced(rebuild, (storage or Storage(), offset, size, stride, False, OrderedDict()))


TEXT = "a" * 10_000_000
BOMBS = {
    "stride 0": {"a": tensor((2**31, 2), (0, 0))},
    "many views": {str(i): tensor((2**24,), (0,)) for i in range(20)},
    "memo": b"\x80\x02}r" + struct.pack("<I", 2 * 10**8) + b".",
    "objects": b"\x80\x02(" + b"}" * 2_000_000 + b"t.",
    "encoded text": {i: Reduced(_codecs.encode, (TEXT, "latin1")) for i in range(40)},
}


@pytest.mark.parametrize("kind", ["archive", "TorchScript", "legacy"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_content_far_larger_than_the_file_raises(tmp_path, kind, bomb):
    content = BOMBS[bomb]
    if not isinstance(content, bytes):
        content = pickled(content, legacy=kind == "legacy")
    if kind == "legacy":
        file = legacy(tmp_path / "a.pt", content)
    else:
        file = archive(tmp_path / "a.pt", content, kind == "TorchScript", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.pt is not a readable checkpoint: it.*truncated or damaged"):
        read_tensors(file)


def test_declared_sizes_without_data_raise(tmp_path):
    """torch enlarges a storage to the size of its tensor, and allocates what a legacy file declares."""
    files = [
        archive(tmp_path / "outside.pt", pickled({"a": tensor((2**20,), (1,))})),
        archive(tmp_path / "offset.pt", pickled({"a": tensor((1,), (1,), 2**40)})),
        archive(tmp_path / "negative.pt", pickled({"a": tensor((-1,), (1,))})),
        archive(tmp_path / "text.pt", pickled({"a": tensor(("a", 2**30), (1, 1))})),
        archive(tmp_path / "axes.pt", pickled({"a": tensor((2**60,) * 10_000, (0,) * 10_000)})),
        archive(tmp_path / "no_storage.pt", pickled({"a": tensor((1,), (1,), storage=Storage(key="7"))})),
        archive(tmp_path / "no_type.pt", pickled({"a": tensor((1,), (1,), storage=Storage(kind=None))})),
    ]
    for name, storage in (("huge", Storage(count=2**33)), ("negative", Storage(count=-1))):
        content = pickled({"a": tensor((1,), (1,), storage=storage)}, legacy=True)
        files.append(legacy(tmp_path / f"legacy_{name}.pt", content))
    one = pickled({"a": tensor((1,), (1,))}, legacy=True)
    files += [
        legacy(tmp_path / "legacy_short.pt", one, data=b""),
        legacy(tmp_path / "legacy_other.pt", one, keys=("1",)),
        legacy(tmp_path / "legacy_count.pt", one, data=struct.pack("<q", 2**40)),
    ]
    with zipfile.ZipFile(tmp_path / "records.pt", "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("a/data.pkl", pickled({"a": tensor((1,), (1,))}))
        target.writestr("a/data/0", bytes(200_000_000))
    for file in [*files, tmp_path / "records.pt"]:
        with pytest.raises(ValueError, match=rf"{file.name} is not a readable checkpoint: it ") as caught:
            read_tensors(file)
        assert "\n" not in str(caught.value)
    assert read_tensors(legacy(tmp_path / "good.pt", one))["a"].item() == 1


def test_pickle_cannot_change_classes_or_call_other_functions(tmp_path):
    changed = b"\x80\x02c__torch__\nM\n(N}X\x01\x00\x00\x00xK\x01stb."  # sets M.x = 1
    read_tensors(archive(tmp_path / "a.pt", changed, scripted=True))
    loop = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."  # a module that contains itself
    assert read_tensors(archive(tmp_path / "b.pt", loop, scripted=True)) == {}
    pairs = pickled(Reduced(OrderedDict, ([["a", 1], ["b", 2]],)))  # as Python 2 wrote it
    assert read_tensors(archive(tmp_path / "c.pt", pairs)) == {"a": 1, "b": 2}
    for function, arguments in ((bytearray, (10**10,)), (eval, ("1",)), (torch.zeros, (2**40,))):
        with pytest.raises(ValueError, match=r"objects other than tensors \(it refers to .*not allowed\)"):
            read_tensors(archive(tmp_path / "d.pt", pickled({"a": Reduced(function, arguments)})))


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as target:
        target.addfile(tarfile.TarInfo("weights.pt"))
    return stream.getvalue()


FOREIGN = {
    "it is empty": b"",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "a web page": b"\xef\xbb\xbf\n<!DOCTYPE html><html><body>Not found</body></html>",
    "it is JSON": b'{\n "weight_map": {}}',
    "compressed by gzip": gzip.compress(b"weights"),
    "a tar archive": tar(),
    "it is an image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a text file (it starts with 'Entry not found')": b"Entry not found\n",
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "GGUF": b"GGUF" + bytes(100),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("words", FOREIGN)
def test_file_of_another_format_is_named(tmp_path, words, suffix):
    (tmp_path / f"a{suffix}").write_bytes(FOREIGN[words])
    with pytest.raises(ValueError) as caught:
        read_tensors(tmp_path / f"a{suffix}")
    message = str(caught.value)
    assert words in message and f"a{suffix} is not a readable checkpoint: " in message and "\n" not in message


def test_zip_archive_of_other_files_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as target:
        target.writestr("weights/model.pt", b"")
    with pytest.raises(ValueError, match=r"zip archive of other files .*: unpack it"):
        read_tensors(tmp_path / "a.pt")


def test_weights_do_not_look_like_another_format(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    save_file({"a": torch.zeros(2)}, tmp_path / "c.pt")
    assert not any(foreign_format((tmp_path / f"{name}.pt").read_bytes()[:512]) for name in "abc")


def test_content_determines_the_format_not_the_suffix(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    for name in ("a.bin", "a.safetensors"):
        assert read_tensors(tmp_path / name)["a"].tolist() == [1, 1]
    (tmp_path / "cut.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        read_tensors(tmp_path / "cut.bin")


def test_tensors_are_freed_without_garbage_collection(tmp_path):
    """Else two copies of the weights stay in memory."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    gc.disable()
    try:
        for name in ("a.pt", "b.pt"):
            content = read_tensors(tmp_path / name)
            storage = weakref.ref(content["a"])
            del content
            assert storage() is None
    finally:
        gc.enable()
