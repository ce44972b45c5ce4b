"""CAM files: both formats give equal maps, files of other programs are read, no file runs code."""

import codecs
import io
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segmentation import camfile
from tests.camfiles import write_cams
from tests.conftest import golden


def test_resize_matches_golden():
    arrays = golden("scaling")
    for key in [name[len("scaled_") :] for name in arrays if name.startswith("scaled_")]:
        width, height = arrays[f"size_wh_{key}"]
        resized = camfile.resize(arrays[f"scaled_{key}"][None], (int(height), int(width)))
        np.testing.assert_allclose(resized[0], arrays[f"resized_{key}"], atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    labels=st.integers(0, 20),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    zero=st.booleans(),
)
def test_full_and_compact_files_read_equal(tmp_path_factory, labels, grid, size, zero):
    random = np.random.default_rng(labels)
    maps = random.random((labels, *grid), np.float32) * (not zero)
    keys = random.permutation(20)[:labels]
    folder = tmp_path_factory.mktemp("cams")
    for format in camfile.FORMATS:
        write_cams(folder / format, "a", keys, {"attn_highres": maps, "highres": maps / 2}, size, format)
    full, compact = (camfile.read(folder / format, "a") for format in camfile.FORMATS)
    assert full[0].dtype == np.int64 and (full[0] == keys).all() and (compact[0] == keys).all()
    assert full[1].dtype == np.float16 and full[1].shape == (labels, *size)
    assert (full[1] == compact[1]).all()
    assert (full[1] == camfile.resize(maps, size).astype(np.float16)).all()
    assert (camfile.read(folder / "full", "a", "highres")[1] <= 0.5).all()


def test_full_format_is_the_one_of_the_reference_implementation(tmp_path):
    file = write_cams(tmp_path, "a", [3, 1], {"attn_highres": np.ones((2, 2, 2), np.float32)}, (4, 6))
    content = np.load(file, allow_pickle=True).item()
    assert file.name == "a.npy" and set(content) == {"keys", "attn_highres"}
    assert content["keys"].dtype == np.int64 and content["keys"].tolist() == [3, 1]
    assert content["attn_highres"].dtype == np.float16 and content["attn_highres"].shape == (2, 4, 6)


def test_equal_maps_give_equal_bytes(tmp_path):
    maps = {"attn_highres": np.random.default_rng(0).random((2, 3, 3), np.float32)}
    for format in camfile.FORMATS:
        one, two = (write_cams(tmp_path / part, "a", [0, 1], maps, (9, 9), format) for part in "xy")
        assert one.read_bytes() == two.read_bytes()
        assert sorted(os.listdir(one.parent))[-1] == one.name


def test_image_names_can_contain_folders(tmp_path):
    maps = {"attn_highres": np.ones((1, 1, 1), np.float32)}
    assert not camfile.find(tmp_path, "2012/a.b")
    write_cams(tmp_path, "2012/a.b", [0], maps, (2, 2), "compact")
    assert camfile.find(tmp_path, "2012/a.b")
    assert camfile.read(tmp_path, "2012/a.b")[1].shape == (1, 2, 2)


@pytest.mark.parametrize("format", camfile.FORMATS)
def test_class_ids_of_reads_only_the_class_indices(tmp_path, format):
    assert camfile.class_ids_of(tmp_path, "a") is None
    maps = {"attn_highres": np.ones((2, 2, 2), np.float32)}
    file = write_cams(tmp_path, "a", [7, 2], maps, (4, 6), format)
    assert camfile.class_ids_of(tmp_path, "a") == [7, 2]
    write_cams(tmp_path, "none", [], {"attn_highres": np.ones((0, 2, 2), np.float32)}, (4, 6), format)
    assert camfile.class_ids_of(tmp_path, "none") == []
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.np. cannot be read"):
        camfile.class_ids_of(tmp_path, "a")


@pytest.mark.parametrize("keys", [["cat"], [-1], None])
def test_missing_or_invalid_keys_raise_value_error(tmp_path, keys):
    content = {"attn_highres": np.zeros((1, 2, 2))} if keys is None else {"keys": keys}
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    for read in (camfile.class_ids_of, camfile.read):
        with pytest.raises(ValueError, match=r"a\.npy is (damaged|not a CAM file)"):
            read(tmp_path, "a")


def save(file, payload: bytes):
    """Write a .npy file of one object with the pickle `payload`."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
    file.write_bytes(stream.getvalue() + payload)


@pytest.mark.parametrize("labels", [0, 2])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("package", [b"numpy._core", b"numpy.core"])
def test_files_of_every_pickle_protocol_are_read(tmp_path, labels, protocol, package):
    maps = np.arange(labels * 12).reshape(labels, 3, 4).astype(np.float16)
    content = {"keys": np.arange(labels) + 200, "attn_highres": maps}
    payload = pickle.dumps(np.array(content, dtype=object), protocol)
    current = np.empty(0).__reduce__()[0].__module__.removesuffix(".multiarray").encode()
    if protocol >= 4 and package != current:
        pytest.skip("from protocol 4 on, names are stored with their length and cannot be replaced")
    save(tmp_path / "a.npy", payload.replace(current, package))
    keys, read = camfile.read(tmp_path, "a")
    assert (keys == content["keys"]).all() and (read == maps).all() and read.shape == maps.shape


def test_encoding_other_than_latin1_raises(tmp_path):
    content = {"keys": [0], "attn_highres": Malicious(codecs.encode, "abc", "rot13")}
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match="uses the encoding rot13, which is not allowed"):
        camfile.read(tmp_path, "a")


def test_a_list_of_keys_and_float32_maps_are_read(tmp_path):
    content = {"keys": [np.int64(4)], "attn_highres": np.full((1, 2, 2), 0.3, np.float32)}
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    keys, maps = camfile.read(tmp_path, "a")
    assert keys.tolist() == [4] and maps.dtype == np.float16


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, argument", [(os.system, "touch {}"), (eval, "open('{}', 'w')")])
def test_file_with_code_raises_and_runs_nothing(tmp_path, function, argument):
    trace = tmp_path / "trace"
    content = {"keys": Malicious(function, argument.format(trace)), "attn_highres": np.zeros((1, 1, 1))}
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as a CAM file: it refers to"):
        camfile.read(tmp_path, "a")
    np.savez(tmp_path / "b.npz", keys=np.array([Malicious(function, argument.format(trace))], dtype=object))
    with pytest.raises(ValueError, match=r"b\.npz cannot be read as a CAM file"):
        camfile.read(tmp_path, "b")
    assert not trace.exists()


def test_damaged_and_invalid_files_raise_value_error(tmp_path):
    maps = {"attn_highres": np.ones((1, 2, 2), np.float32)}
    for format, suffix in camfile.FORMATS.items():
        file = write_cams(tmp_path, format, [0], maps, (4, 4), format)
        whole = file.read_bytes()
        for end in (0, 5, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:end])
            with pytest.raises(ValueError, match=f"{format}{suffix}"):
                camfile.read(tmp_path, format)
    with pytest.raises(FileNotFoundError, match="no CAM file of nowhere"):
        camfile.read(tmp_path, "nowhere")

    def assert_raises(match, content, cam_type="attn_highres"):
        np.save(tmp_path / "b.npy", content, allow_pickle=True)
        with pytest.raises(ValueError, match=match):
            camfile.read(tmp_path, "b", cam_type)

    one_map = np.zeros((1, 2, 2))
    assert_raises("an array of float64, expected a dict of CAMs", np.zeros(3))
    assert_raises("a NoneType, expected a dict of CAMs", None)
    assert_raises("not a CAM file: it has no entry `keys`", {"cams": one_map})
    content = {"keys": [0], "attn_highres": one_map}
    assert_raises(r"no cams maps \(available: attn_highres\): give --cam_type", content, "cams")
    assert_raises(r"shape \(1, 2, 2\), expected 2 maps", {"keys": [0, 1], "attn_highres": one_map})
    assert_raises(r"shape \(1, 2, 2\), expected 2 maps", {"keys": [0], "bg_highres": one_map}, "bg_highres")
    assert_raises("is damaged", {"keys": ["cat"], "attn_highres": one_map})
    with pytest.raises(ValueError, match="must be one of full, compact, got 'tiny'"):
        write_cams(tmp_path, "c", [0], maps, (4, 4), "tiny")
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\), expected 2 maps"):
        write_cams(tmp_path, "c", [0, 1], maps, (4, 4))
