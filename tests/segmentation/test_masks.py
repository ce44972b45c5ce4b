"""Index masks: written masks are read back unchanged; images of other modes raise an error."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segmentation.benchmark import voc_palette
from segmentation.masks import overlay, read_mask, write_mask

PALETTE = voc_palette()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**31), st.booleans())
def test_read_mask_returns_written_labels(tmp_path_factory, height, width, seed, ignored):
    labels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    if ignored:
        labels[:] = 255
    file = tmp_path_factory.mktemp("masks") / "deep" / "a.png"
    write_mask(file, labels, PALETTE)
    assert (read_mask(file) == labels).all()
    with Image.open(file) as image:
        assert image.mode == "P" and (np.asarray(image.convert("RGB")) == PALETTE[labels]).all()
    assert [path.name for path in file.parent.iterdir()] == ["a.png"]


def test_gray_masks_are_read(tmp_path):
    labels = np.array([[0, 20, 255]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "gray.png")
    assert (read_mask(tmp_path / "gray.png") == labels).all()


def png(values: np.ndarray, depth: int, palette: bool) -> bytes:
    """A PNG of `values` (H, W), `depth` bits per pixel. Not every Pillow version can write fewer than 8."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    bits = np.unpackbits(values[..., None].astype(np.uint8), axis=-1)[..., 8 - depth :]
    rows = np.packbits(bits.reshape(len(values), -1), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)  # filter type 0 for each row
    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, depth, 3 if palette else 0, 0, 0, 0)
    colors = chunk(b"PLTE", PALETTE[: 2**depth].tobytes()) if palette else b""
    pixels = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colors + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("palette", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_masks_of_1_to_8_bits_are_read_except_1_bit_gray(tmp_path, depth, palette):
    labels = np.arange(5 * 2**depth).reshape(-1, 5) % 2**depth
    (tmp_path / "a.png").write_bytes(png(labels, depth, palette))
    if depth == 1 and not palette:
        with pytest.raises(ValueError, match="expected 8-bit class indices"):
            read_mask(tmp_path / "a.png")
    else:
        assert (read_mask(tmp_path / "a.png") == labels).all()


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1", "LA"])
def test_images_of_other_modes_raise(tmp_path, mode):
    Image.new(mode, (3, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="expected 8-bit class indices"):
        read_mask(tmp_path / "a.png")


def test_missing_and_damaged_masks_raise(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_mask(tmp_path / "a.png")
    write_mask(tmp_path / "a.png", np.arange(200, dtype=np.uint8).reshape(10, 20), PALETTE)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="cannot be read"):
        read_mask(tmp_path / "a.png")


def test_overlay_paints_neither_background_nor_ignored_pixels():
    image = np.full((1, 3, 3), 100, np.uint8)
    painted = overlay(image, np.array([[0, 1, 255]], np.uint8), PALETTE, opacity=0.5)
    assert painted[0].tolist() == [[100] * 3, [114, 50, 50], [100] * 3]
