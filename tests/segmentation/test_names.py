"""Image names: which are accepted, and that accepted names stay below a folder and can be read back."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmentation.names import NAMES, image_name


@pytest.mark.parametrize(
    "text, name",
    [
        ("2007_000032", "2007_000032"),
        ("train2014/x", "train2014/x"),
        ("a.folder.jpg/x", "a.folder.jpg/x"),
        ("images\\x", "images/x"),
        (".\\a\\.\\x", "a/x"),
        ("./a//x", "a/x"),
        ("x_jpg.rf.1a2b", "x_jpg.rf.1a2b"),
        ("Paris,France", "Paris,France"),
        ("..x..", "..x.."),
        ("caf\u00e9/\u6a39", "caf\u00e9/\u6a39"),
        ("conference", "conference"),
        ("x" * 240, "x" * 240),
    ],
)
def test_names_below_a_folder_are_accepted(text, name):
    assert image_name(text) == name == image_name(name)


@pytest.mark.parametrize(
    "text, fault",
    [
        ("/x", "is an absolute path"),
        ("\\\\server\\x", "is an absolute path"),
        ("c:\\x", "is an absolute path"),
        ("C:x", "is an absolute path"),
        ("https://host/x", "is an absolute path"),
        ("..", "contains `..`"),
        ("a/../../x", "contains `..`"),
        ("a\\..\\x", "contains `..`"),
        ("", "is empty"),
        ("./", "is empty"),
        ("x.jpg", "has the suffix .jpg"),
        ("JPEGImages/x.JPEG", "has the suffix .JPEG"),
        ("x.xml", "has the suffix .xml"),
        (".png", "has the suffix .png"),
        ("x,", "ends in a comma"),
        ("x;3;1", "ends in a comma"),
        ("x\0", "contains a control character"),
        ("x\x7f", "contains a control character"),
        ("x\u2028", "contains a control character"),
        ("x\ud800", "contains a control character"),
        ("com1", "is reserved by Windows"),
        ("a/Aux.2/x", "is reserved by Windows"),
        ("x" * 241, "is too long"),
        ("\u6a39" * 81, "is too long"),
        ("abc/" * 300 + "x", "is too long"),
    ],
)
def test_other_names_are_refused_with_the_reason(text, fault):
    with pytest.raises(ValueError, match=r"image name '.*") as error:
        image_name(text)
    message = str(error.value)
    assert fault in message and "\n" not in message and len(message) < 300
    message.encode()  # surrogates are escaped
    assert (NAMES in message) == (not message.endswith("rename the image"))


@given(st.text(st.sampled_from("ab./\\:,\0 \ud800\ufeff1j") | st.characters(), max_size=12))
def test_an_accepted_name_stays_below_any_folder(text):
    try:
        name = image_name(text)
    except ValueError:
        return
    path = os.path.normpath(f"/folder/{name}.png")
    assert path == f"/folder/{name}.png" and image_name(name) == name
    assert len(os.fsencode(path.rsplit("/", 1)[1])) <= 255
