"""Index masks: written masks are read back unchanged; images of other modes raise an error."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segmentation.benchmark import Benchmark, voc_palette
from segmentation.masks import check_class_pixels, overlay, read_mask, write_mask

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


# Adam7's passes: first row and column, and steps.
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png(values: np.ndarray, depth: int, palette: bool, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """A PNG of `values` (H, W), `depth` bits per pixel. Pillow cannot write all of these.

    Args:
        extra: content of a gAMA chunk.
    """

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    lines = b""
    for row, column, rows, columns in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        part = values[row::rows, column::columns]
        if part.size:
            bits = np.unpackbits(part[..., None].astype(np.uint8), axis=-1)[..., 8 - depth :]
            packed = np.packbits(bits.reshape(len(part), -1), axis=1)
            lines += b"".join(b"\0" + line.tobytes() for line in packed)  # filter type 0 for each row
    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, depth, 3 if palette else 0, 0, 0, interlaced)
    colors = chunk(b"PLTE", PALETTE[: 2**depth].tobytes()) if palette else b""
    pixels = chunk(b"IDAT", zlib.compress(lines))
    gamma = chunk(b"gAMA", extra) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + gamma + colors + pixels + chunk(b"IEND", b"")


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


@pytest.mark.parametrize("palette", [True, False])
@pytest.mark.parametrize("depth", [2, 4, 8])
def test_interlaced_masks_with_gamma_are_read(tmp_path, depth, palette):
    labels = np.arange(11 * 13).reshape(11, 13) % 2**depth
    content = png(labels, depth, palette, interlaced=True, extra=struct.pack(">I", 45455))
    (tmp_path / "a.png").write_bytes(content)
    assert (read_mask(tmp_path / "a.png") == labels).all()


LABELS = np.array([[0, 3, 255], [1, 1, 20]], np.uint8)


def exif() -> Image.Exif:
    orientation = Image.Exif()
    orientation[0x0112] = 6  # rotate by 90 degrees for display
    return orientation


@pytest.mark.parametrize("kind, options", [
    ("PNG", {"exif": exif()}), ("PNG", {"icc_profile": b"profile" * 100}), ("PNG", {"transparency": 0}),
    ("PNG", {"save_all": True, "append_images": [Image.new("L", (3, 2), 9)]}), ("BMP", {}), ("PPM", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
])  # fmt: skip
def test_lossless_files_are_read_whatever_their_suffix(tmp_path, kind, options):
    Image.fromarray(LABELS).save(tmp_path / "a.png", kind, **options)
    assert (read_mask(tmp_path / "a.png") == LABELS).all()


def test_a_mask_with_trailing_bytes_and_a_mask_of_one_pixel_are_read(tmp_path):
    write_mask(tmp_path / "a.png", LABELS, PALETTE)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes() + b"trailing")
    assert (read_mask(tmp_path / "a.png") == LABELS).all()
    write_mask(tmp_path / "b.png", LABELS[1:, :1], PALETTE)
    assert read_mask(tmp_path / "b.png").tolist() == [[1]]


def test_a_cut_mask_raises_or_has_all_its_pixels(tmp_path):
    labels = np.random.default_rng(0).integers(0, 21, (30, 40)).astype(np.uint8)
    write_mask(tmp_path / "a.png", labels, PALETTE)
    content, complete = (tmp_path / "a.png").read_bytes(), 0
    for length in range(0, len(content), 7):
        (tmp_path / "a.png").write_bytes(content[:length])
        try:
            assert (read_mask(tmp_path / "a.png") == labels).all()
            complete += 1
        except ValueError as error:
            assert "a.png cannot be read" in str(error)
    assert complete < 5


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_masks_raise(tmp_path, mode):
    Image.fromarray(LABELS).convert(mode).save(tmp_path / "a.png", "JPEG")
    with pytest.raises(ValueError, match=r"a\.png is a JPEG, which changes values .*: save the masks as PNG"):
        read_mask(tmp_path / "a.png")


def test_gif_masks_raise(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "a.png", "GIF")  # Pillow stores the indices 0, 1, 2, ...
    with pytest.raises(ValueError, match=r"a\.png is a GIF, .*: convert it with .*pipeline\.convert_masks"):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "1", "LA"])
def test_images_of_other_modes_raise(tmp_path, mode):
    Image.new(mode, (3, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"expected 8-bit class indices: convert it .*pipeline\.convert"):
        read_mask(tmp_path / "a.png")


def write_masks(folder, *masks) -> list[str]:
    """Write masks, given as lists of values, and return their names."""
    for number, values in enumerate(masks):
        write_mask(folder / f"{number}.png", np.array([values], np.uint8), PALETTE)
    return [str(number) for number in range(len(masks))]


TWO = Benchmark("b", ["cat", "dog"])
ALL = Benchmark("b", ["cat", "dog"], has_background=False)


@pytest.mark.parametrize("benchmark, masks", [
    (TWO, [[0, 1]]), (TWO, [[0], [0], [2, 255]]), (ALL, [[0]]), (ALL, [[255], [1]]),
    (TWO, [[0, 255]] * 50 + [[1]]), (TWO, [[0]] * 150 + [[1]]), (TWO, []),
])  # fmt: skip
def test_one_pixel_of_a_class_is_enough(tmp_path, benchmark, masks):
    names = write_masks(tmp_path, *masks)
    check_class_pixels(tmp_path, [*names, "absent"], benchmark)


@pytest.mark.parametrize("benchmark, masks, values", [
    (TWO, [[0, 255]] * 3, r"0, 255, but classes have the values 1\.\.2"),
    (TWO, [[0], [0, 254]], r"0, 254, but"),
    (TWO, [[0]], "0, but"),
    (TWO, [[255]], "255, but"),
    (ALL, [[255]], r"255, but classes have the values 0\.\.1"),
])  # fmt: skip
def test_masks_without_a_class_raise_with_their_values(tmp_path, benchmark, masks, values):
    names = write_masks(tmp_path, *masks)
    with pytest.raises(ValueError, match=rf"no pixel of a class: their values are {values}.*convert_masks"):
        check_class_pixels(tmp_path, names, benchmark)


def test_masks_of_background_alone_are_valid_ground_truth(tmp_path):
    check_class_pixels(tmp_path, write_masks(tmp_path, [0, 0], [0]), TWO, allow_background=True)
    with pytest.raises(ValueError, match="their values are 0, 255"):
        check_class_pixels(tmp_path, write_masks(tmp_path, [0, 0], [0, 255]), TWO, allow_background=True)


def test_the_search_for_a_class_reads_at_most_100_masks_at_even_steps(tmp_path, monkeypatch):
    seen = []

    def read(file):
        seen.append(int(file.stem))
        return np.array([[0, 255]], np.uint8)

    monkeypatch.setattr("segmentation.masks.read_mask", read)
    with pytest.raises(ValueError, match="no pixel of a class"):
        check_class_pixels(tmp_path, [str(number) for number in range(1000)], TWO)
    assert seen == list(range(0, 1000, 10))


def test_masks_that_cannot_be_read_raise_only_if_all_are(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png has mode RGB"):
        check_class_pixels(tmp_path, ["x"], TWO)
    check_class_pixels(tmp_path, ["x", *write_masks(tmp_path, [1])], TWO)


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
