"""Readers of files from unknown sources: small files cannot take gigabytes, and types are checked."""

import _codecs
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from foundation import untrusted
from foundation.untrusted import open_zip, parse_npy, read_npy_dict, read_npz


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode()
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def saved(array, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.random.default_rng(0).random((3, 4), np.float32)),
        np.zeros((0, 5), np.float16),
        np.array(3.5),
        np.array([True, False]),
    ],
)
def test_arrays_of_numbers_are_read(array):
    read = parse_npy(saved(array))
    assert read.dtype == array.dtype and read.shape == array.shape
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"12345678?"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", b"1234"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}", b"1234"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': 1}", b"1234"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"12345678"),
        npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}", b"12345678"),
        npy("{'descr': '|V8', 'fortran_order': False, 'shape': (1,)}", b"12345678"),
        npy("{'descr': '<U2', 'fortran_order': False, 'shape': (1,)}", b"12345678"),
        npy("{'descr': '<f4', 'shape': (1,)", b"1234"),
        npy("__import__('os')", b"1234"),
        npy("[" * 9000, b"1234"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}" + " " * 20_000, b"1234", version=2),
        saved(np.zeros(3))[:-1],
    ],
)
def test_invalid_array_raises_value_error(content):
    with pytest.raises(ValueError, match=r"^it|^its"):
        parse_npy(content)


def test_text_is_read_only_on_request(tmp_path):
    np.savez(tmp_path / "a.npz", names=np.array(["a", "bc"]))
    with pytest.raises(ValueError, match=r"type <U2, expected numbers$"):
        read_npz(tmp_path / "a.npz")
    assert read_npz(tmp_path / "a.npz", text=True)["names"].tolist() == ["a", "bc"]


def test_compressed_zeros_are_read_and_zip_bombs_are_not(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(4_000_000, np.float32))
    assert not read_npz(tmp_path / "a.npz")["a"].any()
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(200_000_000))
    with pytest.raises(ValueError, match="declares 200000000 bytes of content, but has only"):
        open_zip(tmp_path / "b.npz")


def pickled_dict(value, protocol: int = 2) -> bytes:
    pickled = pickle.dumps(np.array(value, dtype=object), protocol)
    return npy("{'descr': '|O', 'fortran_order': False, 'shape': ()}", pickled)


def read_dict(tmp_path, content: bytes):
    (tmp_path / "a.npy").write_bytes(content)
    return read_npy_dict(tmp_path / "a.npy")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_dict_of_arrays_is_read(tmp_path, protocol):
    value = {
        "keys": np.array([3, 1]),
        "fortran": np.asfortranarray(np.random.default_rng(0).random((2, 3, 4)).astype(np.float16)),
        "big endian": np.arange(3, dtype=">f8"),
        "scalar": np.float32(0.5),
        "empty": np.zeros((0, 2), bool),
        "list": [1, np.int64(2)],
    }
    read = read_dict(tmp_path, pickled_dict(value, protocol))
    assert read.keys() == value.keys()
    for key in value:
        np.testing.assert_array_equal(read[key], value[key])
    assert read["fortran"].dtype == np.float16 and read["big endian"].dtype == ">f8"


class Reduced:
    """Pickled as the call of a function, followed by a state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


RECORD = Reduced(np.dtype, ("V8", 0, 1), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))
OBJECT_FLAG = Reduced(np.dtype, ("O8", 0, 1), (3, "|", None, None, None, -1, -1, 63))
RECONSTRUCT = np.empty(0).__reduce__()[0]


@pytest.mark.parametrize(
    "value",
    [
        Reduced(np.ndarray, ((1,), RECORD, b"AAAAAAAA")),
        Reduced(np.ndarray, ((1,), np.dtype("O"), b"AAAAAAAA")),
        Reduced(np.ndarray, ((2**33,), np.dtype("f8"))),
        Reduced(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), RECORD, False, b"AAAAAAAA")),
        Reduced(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), OBJECT_FLAG, False, b"AAAAAAAA")),
        Reduced(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (2**40,), np.dtype("f8"), False, b"AAAAAAAA")),
        Reduced(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (-1,), np.dtype("U2"), False, b"AAAAAAAA")),
        Reduced(np.float64(0).__reduce__()[0], (RECORD, b"AAAAAAAA")),
        Reduced(RECONSTRUCT, (np.ndarray, (2**33,), b"d")),
        np.array([{"a": 1}, 2], dtype=object),
        np.zeros(2, [("a", "f4")]),
        np.array(["text"]),
    ],
    ids=range(12),
)
def test_pickled_array_of_another_type_or_size_raises(tmp_path, value):
    try:
        read = read_dict(tmp_path, pickled_dict({"keys": value}))
    except Exception as error:
        assert not isinstance(error, MemoryError)
    else:  # built from nothing: an empty stand-in, which is not an array
        assert not isinstance(read["keys"], np.ndarray)


def test_memo_index_that_takes_gigabytes_raises(tmp_path):
    pickled = b"\x80\x02}r" + struct.pack("<I", 2 * 10**8) + b"."
    with pytest.raises(ValueError, match="memo index 200000000 is above"):
        read_dict(tmp_path, npy("{'descr': '|O', 'fortran_order': False, 'shape': ()}", pickled))


def test_pickle_cannot_change_the_functions_that_it_may_call(tmp_path):
    before = dict(vars(untrusted._Array)), dict(vars(untrusted._Type))
    state = (None, {"__setstate__": 1, "call": 2})
    for function in (RECONSTRUCT, np.dtype, np.float64(0).__reduce__()[0]):
        changed = pickle.dumps(function, 2)[:-1] + pickle.dumps(state, 2)[2:-1] + b"b."
        content = npy("{'descr': '|O', 'fortran_order': False, 'shape': ()}", changed)
        with pytest.raises(pickle.UnpicklingError, match="changes a function"):
            read_dict(tmp_path, content)
    assert (dict(vars(untrusted._Array)), dict(vars(untrusted._Type))) == before


def test_one_text_cannot_be_encoded_many_times(tmp_path):
    text = "a" * 10_000_000
    value = {"keys": [Reduced(_codecs.encode, (text, "latin1")) for _ in range(40)]}
    with pytest.raises(ValueError, match=r"declares \d+ bytes of content, but has only 10000"):
        read_dict(tmp_path, pickled_dict(value))


def test_pickle_of_millions_of_objects_raises(tmp_path):
    pickled = b"\x80\x02(" + b"}" * 2_000_000 + b"t."
    with pytest.raises(ValueError, match="more than 1000000 operations"):
        read_dict(tmp_path, npy("{'descr': '|O', 'fortran_order': False, 'shape': ()}", pickled))
