"""The image reader: size and pixels as stored, and one-line errors for files that are not images."""
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clip
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


HALF = Image.fromarray(np.linspace(0, 255, 35).astype(np.uint8).reshape(5, 7))


def saved(image: Image.Image, file, kind: str = "PNG", **options):
    image.save(file, kind, **options)
    return file


@pytest.mark.filterwarnings("error")  # Pillow warns when it converts a palette with transparency
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_an_alpha_channel_is_dropped_at_every_size(tmp_path, mode):
    opaque = Image.fromarray(PIXELS).convert(mode.removesuffix("A"))
    image = opaque.copy()
    image.putalpha(HALF)
    read = images.read_image(saved(image, tmp_path / "a.png"))
    assert read.mode == opaque.mode
    for size in ((7, 5), (16, 32), (3, 2)):
        np.testing.assert_array_equal(clip.resize_rgb(read, size), clip.resize_rgb(opaque, size))
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.png"), np.asarray(opaque.convert("RGB")))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode, color", [("P", b"\0\x80\xff"), ("P", 1), ("L", 3), ("RGB", (0, 1, 2))])
def test_a_transparent_color_is_dropped(tmp_path, mode, color):
    opaque = Image.fromarray(PIXELS).convert(mode)
    read = images.read_image(saved(opaque, tmp_path / "a.png", transparency=color))
    assert read.mode == mode and "transparency" not in read.info
    for size in ((7, 5), (16, 32)):
        np.testing.assert_array_equal(clip.resize_rgb(read, size), clip.resize_rgb(opaque, size))


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "LA", "RGBA"])
def test_without_alpha_converts_every_mode_with_alpha(mode):
    image = Image.fromarray(PIXELS).convert("P" if mode == "PA" else mode[:-1])
    expected = np.asarray(image.convert("RGB"))
    image.putalpha(255)
    opaque = images.without_alpha(image.convert(mode))
    assert opaque.mode in ("L", "RGB")
    np.testing.assert_array_equal(np.asarray(opaque.convert("RGB")), expected)


def test_without_alpha_does_not_change_the_given_image():
    image = Image.fromarray(PIXELS)
    assert images.without_alpha(image) is image
    image.info["transparency"] = (0, 0, 0)
    assert "transparency" not in images.without_alpha(image).info and "transparency" in image.info


@pytest.mark.parametrize("mode, kind", [
    ("RGB", "PNG"), ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("1", "PNG")
])  # fmt: skip
def test_opaque_images_have_the_pixels_that_pillow_decodes(tmp_path, mode, kind):
    file = saved(Image.fromarray(PIXELS).convert(mode), tmp_path / "a.png", kind)
    with Image.open(file) as expected:
        assert images.read_image(file).mode == expected.mode
        np.testing.assert_array_equal(np.asarray(images.read_image(file)), np.asarray(expected))
        np.testing.assert_array_equal(images.read_rgb(file), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("kind, options", [
    ("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}),
])  # fmt: skip
def test_the_first_frame_of_an_animation_is_read(tmp_path, kind, options):
    first = Image.fromarray(PIXELS).convert("L")
    second = Image.fromarray(255 - np.asarray(first))
    file = saved(first, tmp_path / "a.png", kind, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(images.read_rgb(file), np.asarray(first.convert("RGB")))


def test_profiles_above_1_mb_and_trailing_bytes_do_not_matter(tmp_path):
    profile = np.random.default_rng(0).bytes(2_000_000)
    (tmp_path / "a.png").write_bytes(encoded(icc_profile=profile) + b"trailing")
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.png"), PIXELS)


def test_an_image_of_one_pixel_is_read(tmp_path):
    np.testing.assert_array_equal(
        images.read_rgb(saved(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path / "a.png")), [[[1, 2, 3]]]
    )


def test_an_empty_file_is_named_empty(tmp_path):
    (tmp_path / "a.png").touch()
    for file in (tmp_path / "a.png", io.BytesIO()):
        with pytest.raises(ValueError, match="cannot be read: it is not an image: it is empty"):
            images.read_image(file)


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
