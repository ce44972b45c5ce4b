"""The image reader: size and pixels as stored, and one-line errors for files that are not images."""
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segmentation import images

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def encoded(kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, kind, **options)
    return stream.getvalue()


def test_find_image_tries_every_suffix(tmp_path):
    for suffix in images.IMAGE_SUFFIXES:
        (tmp_path / f"image{suffix[1:]}{suffix}").touch()
        found = images.find_image(tmp_path, f"image{suffix[1:]}")
        assert found.is_file() and found.suffix.lower() == suffix.lower()
    with pytest.raises(FileNotFoundError, match="no image absent"):
        images.find_image(tmp_path, "absent")


@pytest.mark.parametrize("suffix", [".JPG", ".JPEG", ".PNG"])
def test_find_image_accepts_upper_case_suffixes(tmp_path, suffix):
    (tmp_path / f"a{suffix}").touch()
    assert images.find_image(tmp_path, "a").is_file()


def test_find_image_accepts_names_with_dots(tmp_path):
    (tmp_path / "a.b.jpg").touch()
    assert images.find_image(tmp_path, "a.b").name == "a.b.jpg"


def test_read_rgb_and_read_size_return_stored_pixels_and_size(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded())
    np.testing.assert_array_equal(images.read_rgb(file), PIXELS)
    assert images.read_size(file) == (5, 7)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_read_image_keeps_the_mode_and_read_rgb_converts_it(tmp_path, mode):
    file = tmp_path / "a.png"
    Image.fromarray(PIXELS).convert(mode).save(file)
    assert images.read_image(file).mode == mode
    assert images.read_rgb(file).shape == (5, 7, 3)


@pytest.mark.parametrize("mode, suffix", [("I;16", "png"), ("I", "tif"), ("F", "tif")])
def test_images_with_more_than_8_bits_raise(tmp_path, mode, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.new(mode, (3, 2), 3000).save(file)
    for read in (images.read_image, images.read_rgb):
        with pytest.raises(ValueError, match=rf"a\.{suffix} has more than 8 bits .*: convert it to 8 bits"):
            read(file)
    assert images.decode(file).mode.startswith(mode[0])


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees for display
    file = tmp_path / "a.jpg"
    file.write_bytes(encoded("JPEG", exif=exif))
    assert images.read_rgb(file).shape == (5, 7, 3)
    assert images.read_size(file) == (5, 7)


@pytest.mark.parametrize("read", [images.read_image, images.read_rgb, images.read_size])
def test_missing_and_invalid_files_raise(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read(tmp_path / "none.png")
    for content in (b"", b"not an image", encoded()[:20]):
        file = tmp_path / "bad.png"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"image .*bad\.png cannot be read"):
            read(file)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG"]), st.data())
def test_damaged_files_raise_value_error_or_return_pixels(tmp_path_factory, kind, data):
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert images.read_rgb(file).ndim == 3
    except ValueError as error:
        assert "cannot be read" in str(error)
