"""python -m pipeline.convert_masks: masks of other tools become index masks; unknown colors are reported."""

import re
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline import convert_masks
from pipeline.run import command
from segmentation.benchmark import voc_palette
from segmentation.masks import read_mask

LABELS = np.array([[0, 1, 2], [2, 1, 255]], np.uint8)
COLORS = "0: [0, 0, 0]\n1: [255, 0, 0]\n2: [[0, 255, 0], [0, 254, 0]]\n255: [9, 9, 9]\n"
TABLE = np.zeros((256, 3), np.uint8)
TABLE[[1, 2, 255]] = (255, 0, 0), (0, 255, 0), (9, 9, 9)


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Function that runs the command on the folder `in` and returns (exit code, stderr)."""
    (tmp_path / "in").mkdir()
    (tmp_path / "colors.yaml").write_text(COLORS)

    def run(*flags):
        words = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--num_workers", 1, *flags]
        monkeypatch.setattr(sys, "argv", ["convert_masks", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            command(convert_masks.main)
        return ended.value.code, capsys.readouterr().err

    return run


def save(tmp_path, pixels: np.ndarray, name: str = "a.png", mode: str | None = None, **options):
    image = Image.fromarray(pixels)
    file = tmp_path / "in" / name
    file.parent.mkdir(exist_ok=True)
    (image.convert(mode) if mode else image).save(file, **options)


def converted(tmp_path, name: str = "a.png") -> np.ndarray:
    with Image.open(tmp_path / "out" / name) as image:
        assert image.mode == "P" and image.getpalette() == voc_palette().ravel().tolist()
    return read_mask(tmp_path / "out" / name)


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, np.full(pixels.shape[:2], 7, np.uint8)])


GRAY = np.array([[0, 255, 0], [255, 0, 255]], np.uint8)
VOC = voc_palette()[LABELS]


@pytest.mark.parametrize("pixels, mode, flags, expected", [
    (TABLE[LABELS], None, ["--colors"], LABELS),
    (with_alpha(TABLE[LABELS]), None, ["--colors"], LABELS),
    (VOC, None, ["--palette", "voc"], LABELS),
    (with_alpha(VOC), None, ["--palette", "voc"], LABELS),
    (GRAY, None, ["--values", "0=0", "255=1"], GRAY // 255),
    (GRAY, "1", ["--values", "0=0", "255=1"], GRAY // 255),
    (GRAY, "1", ["--values", "0=0", "1=1"], GRAY // 255),
    (GRAY, "LA", ["--values", "0=0", "255=1"], GRAY // 255),
    (GRAY, "RGB", ["--values", "0=0", "255=1"], GRAY // 255),
    (GRAY, "RGBA", ["--values", "0=0", "255=1"], GRAY // 255),
    (GRAY.astype(np.uint16) * 100, None, ["--values", "0=0", "25500=7"], GRAY // 255 * 7),
    (np.where(GRAY, 254, 0).astype(np.uint8), None, ["--values", "0=255", "254=3"], np.where(GRAY, 3, 255)),
])  # fmt: skip
def test_masks_of_every_mode_are_converted(convert, tmp_path, pixels, mode, flags, expected):
    save(tmp_path, pixels, mode=mode)
    code, errors = convert(*flags, *([tmp_path / "colors.yaml"] if flags == ["--colors"] else []))
    assert code == 0, errors
    np.testing.assert_array_equal(converted(tmp_path), expected)


@pytest.mark.parametrize("name, options", [
    ("a.bmp", {}), ("a.tif", {}), ("a.gif", {}), ("a.TIFF", {"compression": "tiff_lzw"}),
    ("a.webp", {"lossless": True}),
])  # fmt: skip
def test_every_lossless_file_is_converted(convert, tmp_path, name, options):
    save(tmp_path, GRAY, name, **options)
    assert convert("--values", "0=0", "255=1")[0] == 0
    np.testing.assert_array_equal(converted(tmp_path), GRAY // 255)


@pytest.mark.parametrize("lines", ["2: [[0, 255, 0], [0, 254, 0]]", "2: [0, 255, 0]\n2: [0, 254, 0]"])
def test_several_colors_can_have_one_value(tmp_path, lines):
    (tmp_path / "c.yaml").write_text(lines)
    assert convert_masks.read_colors(str(tmp_path / "c.yaml")) == {255 << 8: 2, 254 << 8: 2}


def test_a_palette_image_is_converted_by_its_colors_not_its_indices(convert, tmp_path):
    image = Image.fromarray(LABELS % 3)
    image.putpalette([*VOC[0, 2], *VOC[0, 0], *VOC[0, 1]])
    image.save(tmp_path / "in" / "a.png")
    assert convert("--palette", "voc")[0] == 0
    np.testing.assert_array_equal(converted(tmp_path), np.array([2, 0, 1])[LABELS % 3])


def test_unknown_colors_fail_with_file_color_and_count(convert, tmp_path):
    save(tmp_path, TABLE[LABELS], "good.png")
    pixels = TABLE[LABELS]
    pixels[0] = 1, 2, 3
    save(tmp_path, pixels, "sub/bad.png")
    code, errors = convert("--colors", tmp_path / "colors.yaml")
    failed = (tmp_path / "out" / "failed.txt").read_text()
    assert code == 1 and "2 images, 1 failed" in errors
    assert "sub/bad.png has 1 colors that --colors does not map: (1, 2, 3) in 3 pixels; add them" in failed
    assert (tmp_path / "out" / "good.png").is_file() and not (tmp_path / "out" / "sub" / "bad.png").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_unknown_values_become_255_if_ignored_and_are_logged(convert, tmp_path, workers):
    for name in ("a.png", "b.png"):
        save(tmp_path, np.array([[0, 255, 7, 7]], np.uint8), name)
    code, errors = convert("--values", "0=0", "255=1", "--unknown", "ignore", "--num_workers", workers)
    assert code == 0 and "masks with unknown values: 2 (a, b)" in errors
    assert f"7 became 255: 4 pixels, first in {tmp_path / 'in' / 'a.png'}" in errors
    assert converted(tmp_path).tolist() == [[0, 1, 255, 255]]


def test_a_stopped_run_is_continued_and_other_settings_are_an_error(convert, tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path, GRAY, name)
    assert convert("--values", "0=0", "255=1")[0] == 0
    (tmp_path / "out" / "b.png").write_bytes(b"cut")
    before = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    assert convert("--values", "0=0", "255=1")[0] == 0
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == before
    np.testing.assert_array_equal(converted(tmp_path, "b.png"), GRAY // 255)
    code, errors = convert("--values", "0=0", "255=2")
    assert code == 2 and "filled with other settings: mapping" in errors
    assert convert("--values", "0=0", "255=2", "--overwrite")[0] == 0
    np.testing.assert_array_equal(converted(tmp_path), GRAY // 255 * 2)


@pytest.mark.parametrize("pixels, name, flag, message", [
    (GRAY, "a.jpg", ["--values", "0=0", "255=1"], "is a JPEG, which changes values"),
    (VOC, "a.png", ["--values", "0=0", "255=1"], "has colors, not gray values: give --colors or --palette"),
    (GRAY.astype(np.uint16), "a.png", ["--palette", "voc"], "has more than 8 bits .*: give --values"),
    (GRAY * np.float32(0.1), "a.tif", ["--values", "0=0"], "has the value 25.5, expected whole numbers"),
    (-GRAY.astype(np.int32), "a.tif", ["--values", "0=0"], "has the value -255, expected whole numbers"),
    (GRAY, "a.png", ["--values", "0=0"], "has 1 values that --values does not map: 255 in 3 pixels"),
])  # fmt: skip
def test_masks_that_cannot_be_converted_fail(convert, tmp_path, pixels, name, flag, message):
    save(tmp_path, pixels, name)
    code, _ = convert(*flag)
    failed = (tmp_path / "out" / "failed.txt").read_text()
    assert code == 1 and failed.count("\n") == 1
    assert re.search(message, failed)


def test_empty_and_cut_files_fail_and_the_others_are_converted(convert, tmp_path):
    for name in ("a.png", "cut.png"):
        save(tmp_path, GRAY, name)
    (tmp_path / "in" / "cut.png").write_bytes((tmp_path / "in" / "cut.png").read_bytes()[:50])
    (tmp_path / "in" / "empty.png").touch()
    (tmp_path / "in" / ".hidden.png").touch()
    code, errors = convert("--values", "0=0", "255=1")
    assert code == 1 and "3 images, 2 failed" in errors and "empty.png cannot be read: it is not" in errors
    np.testing.assert_array_equal(converted(tmp_path), GRAY // 255)


@pytest.mark.parametrize("content, message", [
    ("[1, 2]", "no lines"),
    ("", "no lines"),
    ("1: [0, 0", "line 1: the file ends before the bracket or quote of this line is closed"),
    ("256: [0, 0, 0]", "has the mask value 256: expected 0..255"),
    ("cat: [0, 0, 0]", "has the mask value 'cat': expected 0..255"),
    ("1: [0, 0, 256]", r"mask value 1: expected \[red, green, blue\], 0..255 each, got \[0, 0, 256\]"),
    ("1: [0, 0]", r"got \[0, 0\]"),
    ("1: [[0, 0, 0], 3]", "got 3"),
    ("1: black", "got 'black'"),
    ("1: {a: 1}", "got 'a mapping'"),
    ("1: &a [*a]", "line 1: anchors .* are not allowed"),
    ("[" * 2000, "line 1: values are nested more than 20 deep"),
    ("1: [0, 0, 0]\n2: [0, 0, 0]", r"gives \[0, 0, 0\] to the mask values 1 and 2"),
])  # fmt: skip
def test_invalid_color_files_raise(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"--colors: .*c\.yaml.*{message}"):
        convert_masks.read_colors(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("pairs, message", [
    (["255"], "got '255'"), (["a=1"], "got 'a=1'"), (["1=256"], "got '1=256'"), (["-1=0"], "got '-1=0'"),
    (["65536=0"], "got"), (["1=2=3"], "got"), (["1=2", "1=3"], "1 is mapped twice: remove 1=3"),
])  # fmt: skip
def test_invalid_values_raise(pairs, message):
    with pytest.raises(ValueError, match=f"--values: .*{message}"):
        convert_masks.read_values(pairs)


def test_user_errors_exit_with_code_2(convert, tmp_path):
    assert "contains no masks" in convert("--palette", "voc")[1]
    save(tmp_path, GRAY, "a.png")
    assert "none does not exist" in convert("--palette", "voc", "--input", tmp_path / "none")[1]
    assert "not allowed with argument" in convert("--palette", "voc", "--values", "0=0")[1]
    assert "is required" in convert()[1]
    for output in (tmp_path / "in", tmp_path / "in" / "deep", tmp_path):
        code, errors = convert("--palette", "voc", "--output", output)
        assert code == 2 and "overlaps with --input" in errors
    save(tmp_path, GRAY, "a.bmp")
    code, errors = convert("--palette", "voc")
    assert code == 2 and "have the same name: rename one" in errors
    assert not (tmp_path / "out").exists()
