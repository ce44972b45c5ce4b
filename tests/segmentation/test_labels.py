"""Image-level labels from each source, and errors for invalid sources."""
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segmentation import labels
from segmentation.benchmark import Benchmark

CLASSES = ["cat", "dog", "person"]


def reader(source, root, **options):
    """The label reader of a benchmark whose annotations, masks and JSON are in `root`."""
    paths = {"annotation_dir": ".", "mask_dir": ".", "annotation_file": "a.json"}
    options = {"classes": CLASSES, **paths, **options}
    return labels.reader(Benchmark("b", labels=source, root=str(root), **options), {})


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, newline="")
    return file


# --- text files -------------------------------------------------------------------------------------


def test_read_split_ignores_blanks_empty_lines_and_byte_order_mark(tmp_path):
    file = write(tmp_path / "a.txt", "\ufeffx 3 0 3\r\n\r\n  y  \r\nz\t1\n\n")
    assert labels.read_split(file) == {"x": [3, 0], "y": [], "z": [1]}
    assert list(labels.read_split(file)) == ["x", "y", "z"]


NAMES = st.text("ab_019.", min_size=1).filter(lambda name: name not in (".", ".."))


@given(st.dictionaries(NAMES, st.lists(st.integers(0, 9), unique=True), min_size=1))
def test_read_split_returns_written_labels(tmp_path_factory, split):
    file = tmp_path_factory.getbasetemp() / "round.txt"
    file.write_text("".join(" ".join([name, *map(str, found)]) + "\n" for name, found in split.items()))
    assert labels.read_split(file, 10) == split


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\ny\n\nx 1\n", r"a\.txt line 4: image x was listed before"),
        ("x 1\ny 3\n", r"a\.txt line 2: class index 3 is out of range, expected 0 to 2"),
        ("x -1\n", "line 1: class index -1 is out of range"),
        ("x cat\n", "line 1: expected `name index index ...`, got 'x cat'"),
        ("/JPEGImages/x.jpg /SegmentationClass/x.png\n", "line 1: expected `name index.*go without suffix"),
        ("JPEGImages/x.jpg SegmentationClass/x.png\n", "line 1: expected `name index.*go without suffix"),
        ("x 0,3\n", "line 1: expected `name index index ...`, got 'x 0,3'"),
        (f"x {'9' * 5000}\n", "line 1: expected"),
        ("x\n\ny.jpg 1\n", r"a\.txt line 3: image name 'y\.jpg' has the suffix \.jpg: image names go"),
        ("x\r\n/tmp/y 1\r\n", "line 2: image name '/tmp/y' is an absolute path: image names go without"),
        ("x\ry/../../z 1\r", r"line 2: image name 'y/\.\./\.\./z' contains `\.\.`"),
        ("x,0\n", "line 1: image name 'x,0' ends in a comma or in numbers after one"),
        ("a/x 0\na\\x 1\n", "line 2: image a/x was listed before"),
        ("x 0\n./x 1\n", "line 2: image x was listed before"),
        ("x 0\n\ufeffy 1\n", "line 2: image name .* contains a control character"),
        ("x 1.0\n", "line 1: expected"),
        ("x --1\n", "line 1: expected"),
        ("x ²\n", "line 1: expected"),
        (" \n\n", "lists no images"),
    ],
)
def test_invalid_split_line_raises(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        labels.read_split(write(tmp_path / "a.txt", text), 3)


def test_missing_or_binary_split_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        labels.read_split(tmp_path / "none.txt")
    for content, line in ((b"\xff\xd8\xff\xe0", 1), (b"x 0\r\n\ncaf\xe9 1\n", 3), (b"\xff\xfex\0\n\0", 1)):
        (tmp_path / "binary.txt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"binary\.txt line {line}: it is not a text file in UTF-8"):
            labels.read_split(tmp_path / "binary.txt")


def test_read_split_returns_names_with_slashes(tmp_path):
    file = write(tmp_path / "a.txt", "./x 0\na\\y 1\nb//z\nimg.2.rf 2\n")
    assert labels.read_split(file) == {"x": [0], "a/y": [1], "b/z": [], "img.2.rf": [2]}


@pytest.mark.parametrize(
    "file, message",
    [
        (b"caf\xe9.png", r"image name 'caf\\udce9' contains a control character, or bytes that are not"),
        (b"new\nline.png", "contains a control character"),
        (b"a b.png", "contains a blank: rename"),
        (b"a\\b.png", "contains a backslash: rename"),
        (b"x.jpg.png", r"image name 'x\.jpg' has the suffix \.jpg"),
        (b"a,1.png", "ends in a comma or in numbers after one"),
        (b"NUL.png", "is reserved by Windows"),
        (b"x" * 245 + b".png", "is too long"),
    ],
)
def test_image_in_a_folder_whose_name_a_list_cannot_contain_raises(tmp_path, file, message):
    (tmp_path / "x.png").touch()
    (tmp_path / os.fsdecode(file)).touch()
    with pytest.raises(ValueError, match=message) as error:
        labels.split_of(Benchmark("b", classes=CLASSES), None, tmp_path)
    assert str(tmp_path) in str(error.value)


def test_without_num_classes_only_negative_labels_are_out_of_range(tmp_path):
    assert labels.read_split(write(tmp_path / "a.txt", "x 1000\n")) == {"x": [1000]}
    with pytest.raises(ValueError, match="expected 0 or more"):
        labels.read_split(write(tmp_path / "a.txt", "x -1\n"))


def test_from_file_returns_labels_of_listed_images(tmp_path):
    read = labels.from_file(write(tmp_path / "a.txt", "x 2 0\ny\n"), 3)
    assert read("x") == [2, 0]
    assert read("y") == []
    with pytest.raises(ValueError, match=r"image z is not listed in .*a\.txt"):
        read("z")


# --- VOC XML ----------------------------------------------------------------------------------------

PERSON_AND_DOG = """<annotation>
  <size><width>7</width><height>5</height><depth>3</depth></size>
  <object><name>person</name><difficult>0</difficult>
    <part><name>cat</name></part><part><name>head</name></part></object>
  <object><name> dog </name><difficult>1</difficult><truncated>1</truncated></object>
  <object><name>person</name></object>
</annotation>"""


def test_voc_xml_includes_every_object_but_no_parts(tmp_path):
    file = write(tmp_path / "x.xml", PERSON_AND_DOG)
    assert reader("voc_xml", tmp_path)("x") == [2, 1]
    assert labels.read_voc_xml(file) == (["person", "dog"], (5, 7))


def test_voc_xml_without_objects_or_size(tmp_path):
    file = write(tmp_path / "x.xml", "<annotation><size><width>7</width></size></annotation>")
    assert labels.read_voc_xml(file) == ([], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PERSON_AND_DOG.replace("person", "unicorn"), r"x\.xml contains the class 'unicorn', which"),
        ("<annotation><object/></annotation>", "an object without a name"),
        ("<annotation><object><name>dog<b/></name></object></annotation>", "an object without a name"),
        (
            "<annotation><object><name>dog</name><name>cat</name></object></annotation>",
            "an object with several names: dog, cat",
        ),
        ("<annotations><annotation/><annotation/></annotations>", "its root is <annotations>, expected"),
        ("<annotations><image id='0'/></annotations>", "its root is <annotations>, expected <annotation>"),
        ("<html/>", "is not a VOC annotation: its root is <html>"),
        (PERSON_AND_DOG[:100], r"annotation .*x\.xml cannot be read"),
        ("", "cannot be read"),
        ("<annotation><folder>B\udce4ume</folder></annotation>", "cannot be read: .*, line 1, column \\d+$"),
    ],
)
def test_invalid_voc_xml_raises(tmp_path, text, message):
    (tmp_path / "x.xml").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        reader("voc_xml", tmp_path)("x")


def test_voc_xml_entities_read_no_other_file(tmp_path):
    secret = write(tmp_path / "secret", "cat")
    text = f'<!DOCTYPE a [<!ENTITY e SYSTEM "{secret.as_uri()}">]>{PERSON_AND_DOG.replace("person", "&e;")}'
    write(tmp_path / "x.xml", text)
    with pytest.raises(ValueError, match="an object without a name"):
        reader("voc_xml", tmp_path)("x")


def test_missing_voc_xml_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.xml does not exist"):
        reader("voc_xml", tmp_path)("x")
    with pytest.raises(FileNotFoundError, match=r"annotation folder .*none does not exist"):
        reader("voc_xml", tmp_path / "none")


@pytest.mark.parametrize(
    "text",
    [
        '<annotation xmlns="urn:voc"><object><name>dog</name></object></annotation>',
        "<v:annotation xmlns:v='urn:voc'><v:object><v:name>dog</v:name></v:object></v:annotation>",
        "<Annotation><Object><Name>Dog</Name></Object></Annotation>",
        "<annotations><version>1</version><annotation><object><name>dog</name></object></annotation></annotations>",
        "<annotation><objects><object><name>dog</name></object></objects></annotation>",
        '\n <?xml version="1.0"?><annotation><object><name> DOG\n</name></object></annotation>',
        "<annotation><object><name><![CDATA[dog]]></name></object><object><name>Dog</name></object></annotation>",
        "<annotation><object><name>do<!-- dog -->g</name></object><?x y?></annotation>",
    ],
)
def test_voc_xml_of_other_tools_is_read(tmp_path, text):
    write(tmp_path / "x.xml", text)
    assert reader("voc_xml", tmp_path)("x") == [1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso-8859-1", "gbk", "euc-kr"])
def test_voc_xml_is_read_in_its_encoding(tmp_path, encoding):
    folder = {"gbk": "图片", "euc-kr": "사진"}.get(encoding, "Bäume")
    declared = encoding.removesuffix("-sig")
    text = f'<?xml version="1.0" encoding="{declared}"?>\n{PERSON_AND_DOG}'.replace(
        "<size>", f"<folder>{folder}</folder><size>"
    )
    (tmp_path / "x.xml").write_bytes(text.encode(encoding))
    assert reader("voc_xml", tmp_path)("x") == [2, 1]


@pytest.mark.parametrize("declared", ["utf-16", "unicode", "none"])
def test_utf8_voc_xml_that_declares_another_encoding_is_read(tmp_path, declared):
    text = f'\ufeff\n<?xml version="1.0" encoding="{declared}"?>{PERSON_AND_DOG}'
    (tmp_path / "x.xml").write_text(text.replace("<size>", "<folder>Bäume</folder><size>"), encoding="utf-8")
    assert reader("voc_xml", tmp_path)("x") == [2, 1]


# --- masks ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.booleans(), st.lists(st.integers(0, 255), min_size=1, max_size=12))
def test_mask_labels_returns_the_classes_of_the_mask_values(has_background, values):
    expected = sorted({value - has_background for value in values if value != 255} - {-1})
    mask = np.array([values], np.uint8)
    if expected and expected[-1] >= 20:
        with pytest.raises(ValueError, match=r"mask m\.png has the value \d+, which is not a class"):
            labels.mask_labels(mask, has_background, 20, "m.png")
    else:
        assert labels.mask_labels(mask, has_background, 20, "m.png") == expected


def test_reader_of_masks(tmp_path):
    Image.fromarray(np.array([[0, 3], [255, 1]], np.uint8)).save(tmp_path / "x.png")
    assert reader("masks", tmp_path)("x") == [0, 2]
    assert reader("masks", tmp_path, has_background=False, classes=list("abcd"))("x") == [0, 1, 3]
    with pytest.raises(ValueError, match=r"has the value 3, .* expected 0 to 2, or 255"):
        reader("masks", tmp_path, classes=["cat", "dog"])("x")
    with pytest.raises(OSError, match=r"y\.png"):
        reader("masks", tmp_path)("y")
    with pytest.raises(FileNotFoundError, match="mask folder"):
        reader("masks", tmp_path / "none")


def test_from_masks_reads_the_labels_of_one_image(tmp_path):
    Image.fromarray(np.array([[0, 3], [255, 1]], np.uint8)).save(tmp_path / "x.png")
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "y.png")
    read = pickle.loads(pickle.dumps(labels.from_masks(tmp_path, True, 3)))
    assert read("x") == [0, 2] and read("y") == []
    assert labels.from_masks(tmp_path, False, 4)("x") == [0, 1, 3]
    with pytest.raises(ValueError, match=r"value 3, which is not a class.*pipeline\.convert_masks converts"):
        labels.from_masks(tmp_path, True, 2)("x")
    with pytest.raises(FileNotFoundError, match=r"mask folder .*none does not exist"):
        labels.from_masks(tmp_path / "none", True, 3)


def test_masks_of_a_split_without_any_class_raise(tmp_path):
    benchmark = Benchmark("b", ["cat"], labels="masks", root=str(tmp_path), mask_dir=".")
    for name, values in {"x": [0, 255], "y": [0, 255], "z": [0, 1]}.items():
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="no pixel of a class: their values are 0, 255"):
        labels.reader(benchmark, {"x": [], "y": []})
    assert labels.reader(benchmark, {"x": [], "y": [], "z": []})("x") == []  # one image has a class


# --- COCO instances ---------------------------------------------------------------------------------


def instances(**changes):
    return {
        "images": [
            {"id": 7, "file_name": "train2014/x.jpg", "height": 5, "width": 7},
            {"id": 8, "file_name": "y.jpg", "height": 5, "width": 7},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "iscrowd": 1},
            {"id": 2, "image_id": 7, "category_id": 13},
            {"id": 3, "image_id": 7, "category_id": 13},
        ],
        "categories": [
            {"id": 90, "name": "person"}, {"id": 13, "name": "dog"}, {"id": 11, "name": "cat"}
        ],
    } | changes  # fmt: skip


def from_coco_json(folder, classes=CLASSES, category_ids=(), **changes):
    file = write(folder / "a.json", json.dumps(instances(**changes)))
    return labels.from_coco_json(file, classes, category_ids)


def test_reader_of_coco_json(tmp_path):
    write(tmp_path / "a.json", json.dumps(instances()))
    read = reader("coco_json", tmp_path)
    assert read("x") == [1, 2]
    assert read("y") == []
    assert reader("coco_json", tmp_path, category_ids=[13, 90, 11])("x") == [0, 1]
    four = {"classes": list("abcd"), "category_ids": [13, 90, 11, 5]}
    assert reader("coco_json", tmp_path, **four)("x") == [0, 1]
    with pytest.raises(ValueError, match=r"image z is not listed in .*a\.json"):
        read("z")


def test_missing_coco_json_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        reader("coco_json", tmp_path, annotation_file="none.json")


@pytest.mark.parametrize(
    "file_name",
    [
        "a.jpg", "a.PNG", "images\\a.jpg", "C:\\data\\images\\a.jpg", "/data/images/a.jpg", "./a.jpg",
        " a.jpg ", "../images/a.tiff", "a", "https://host.org/images/a.jpg?size=1.5#x/y", "gs://bucket/images/a.jpeg",
    ],
)  # fmt: skip
def test_from_coco_json_finds_images_by_file_name(tmp_path, file_name):
    read = from_coco_json(tmp_path, images=[{"id": 7, "file_name": file_name}])
    assert read("a") == [1, 2]


def test_from_coco_json_keeps_dots_of_names_without_suffix(tmp_path):
    read = from_coco_json(tmp_path, images=[{"id": 7, "file_name": "v1.frame.0001"}])
    assert read("v1.frame.0001") == [1, 2]


def test_from_coco_json_distinguishes_equal_names_by_folder(tmp_path):
    files = {7: "data/train/x.jpg", 8: "data/val/x.jpg", 9: "y.jpg", 10: "data/y.jpg"}
    images = [{"id": image, "file_name": file} for image, file in files.items()]
    read = from_coco_json(tmp_path, images=images)
    read = pickle.loads(pickle.dumps(read))
    assert read("train/x") == read("data/train/x") == [1, 2]
    assert read("val/x") == read("y") == []
    with pytest.raises(ValueError, match=r"image x can be data/train/x or data/val/x in .*: put the folder"):
        read("x")
    with pytest.raises(ValueError, match="image rain/x is not listed"):
        read("rain/x")


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ({"category_id": 99}, "image x in .*: annotation 2 has the unknown category 99"),
        ({"category_id": None}, "image x in .*: annotation 2 has no valid category_id: None"),
        ({}, "image x in .*: annotation 2 has no valid category_id: None"),
        ({"category_id": [13]}, r"annotation 2 has no valid category_id: \[13\]"),
        ({"category_id": float("nan")}, "annotation 2 has no valid category_id: nan"),
    ],
)
def test_from_coco_json_fails_only_the_image_of_an_unknown_category(tmp_path, category, message):
    good, other = {"id": 1, "image_id": 7, "category_id": 90}, {"id": 3, "image_id": 8, "category_id": 13}
    read = from_coco_json(tmp_path, annotations=[good, {"id": 2, "image_id": 7} | category, other])
    assert read("y") == [1]
    with pytest.raises(ValueError, match=message):
        read("x")


def test_from_coco_json_reports_annotations_of_unknown_images(tmp_path, caplog):
    unknown = [{"id": i, "image_id": 70 + i, "category_id": 13} for i in range(4)]
    read = from_coco_json(tmp_path, annotations=[*instances()["annotations"], *unknown])
    assert read("x") == [1, 2]
    assert "4 annotations are ignored; annotation 0 belongs to image 70, which is not in" in caplog.text
    with pytest.raises(ValueError, match="no annotation belongs to an image; annotation 0 belongs to"):
        from_coco_json(tmp_path, annotations=unknown)


# --- source selected by the benchmark ---------------------------------------------------------------


def test_reader_uses_the_source_of_the_benchmark(tmp_path):
    write(tmp_path / "Annotations" / "x.xml", PERSON_AND_DOG)
    write(tmp_path / "a.json", json.dumps(instances()))
    (tmp_path / "SegmentationClass").mkdir()
    Image.fromarray(np.array([[0, 3]], np.uint8)).save(tmp_path / "SegmentationClass" / "x.png")
    split = {"x": [0], "y": []}
    expected = {"voc_xml": [2, 1], "file": [0], "masks": [2], "coco_json": [1, 2]}
    for source, found in expected.items():
        benchmark = Benchmark("b", CLASSES, labels=source, root=str(tmp_path), annotation_file="a.json")
        read = labels.reader(benchmark, split)
        assert read("x") == found
        assert pickle.loads(pickle.dumps(read))("x") == found
        assert labels.reader(benchmark, split, write(tmp_path / "own.txt", "x 1"))("x") == [1]


def test_reader_raises_if_the_split_has_no_valid_labels():
    with pytest.raises(ValueError, match="the split file contains no labels"):
        labels.reader(Benchmark("b", CLASSES), {"x": [], "y": []})
    with pytest.raises(ValueError, match="image x of the split file: class index 3 is out of range"):
        labels.reader(Benchmark("b", CLASSES), {"x": [3]})
    with pytest.raises(ValueError, match="image z is not listed in the split file"):
        labels.reader(Benchmark("b", CLASSES), {"x": [2]})("z")
