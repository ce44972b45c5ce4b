"""COCO instances files as data sets and annotation tools write them."""
import json

import pytest

from segmentation.coco import read_coco_json

LEAVES = ["oak", "maple", "birch"]


def image(image_id, file_name, **changes):
    return {"id": image_id, "file_name": file_name, "height": 5, "width": 7} | changes


def instances(**changes):
    return {
        "images": [image(7, "x.jpg"), image(8, "y.jpg")],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3},
            {"id": 2, "image_id": 7, "category_id": 1},
            {"id": 3, "image_id": 8, "category_id": 2},
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(LEAVES, start=1)],
    } | changes


@pytest.fixture
def read(tmp_path):
    def read(classes=3, category_ids=(), **changes):
        file = tmp_path / "a.json"
        file.write_text(json.dumps(instances(**changes)))
        return read_coco_json(file, classes, category_ids)

    return read


def labels(content):
    return {name: image.labels for name, image in content.images.items()}


def test_images_have_size_annotations_and_labels(read):
    images, problems = read()
    assert list(images) == ["x", "y"] and not problems
    assert images["x"] == ((5, 7), instances()["annotations"][:2], [0, 2], [])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_mark_is_ignored(tmp_path, encoding):
    (tmp_path / "a.json").write_text(json.dumps(instances()), encoding=encoding)
    assert labels(read_coco_json(tmp_path / "a.json", LEAVES)) == {"x": [0, 2], "y": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(instances())[:50], r"a\.json is not a COCO instances file: it is not valid JSON: .*"),
        ("", "it is not valid JSON"),
        ("\xff", "it is not UTF-8 text"),
        ("[" * 100_000, "its lists are nested too deeply"),
        ("[]", "expected an object with images, annotations and categories"),
        (json.dumps({"images": []}), "it has no annotations"),
        (json.dumps(instances(categories=None)), "its categories are None, expected a list"),
        (json.dumps(instances(annotations={"1": 2})), "its annotations are {'1': 2}, expected a list"),
        (json.dumps(instances(images=[])), "lists no images"),
        (json.dumps(instances(images=[3])), r"images\[0\] has no valid id: 3"),
        (json.dumps(instances(images=[{"file_name": "x.jpg"}])), r"images\[0\] has no valid id"),
        (json.dumps(instances(images=[{"id": 7}])), "image 7 has no valid file_name: None"),
        (json.dumps(instances(images=[image(7, "images/")])), "image 7 has no valid file_name: 'images/'"),
        (json.dumps(instances(images=[image(7, 12)])), "image 7 has no valid file_name: 12"),
        (json.dumps(instances(annotations=[None])), r"annotations\[0\] is not an object: None"),
        (json.dumps(instances(annotations=[{"id": 5}])), "annotation 5 has no valid image_id: None"),
        (json.dumps(instances(annotations=[{"image_id": []}])), r"annotations\[0\] has no valid image_id: "),
        (json.dumps(instances(categories=[{"name": "oak"}])), r"categories\[0\] has no valid id"),
        (json.dumps(instances(categories=[7])), r"categories\[0\] has no valid id: 7"),
    ],
)
def test_invalid_file_is_an_error(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        read_coco_json(tmp_path / "a.json", 3)


@pytest.mark.parametrize("file_name", ["a\nb.jpg", "x.jpg.png", "\ud800.jpg", "con.jpg"])
def test_file_name_that_is_not_an_image_name_is_an_error(read, file_name):
    with pytest.raises(ValueError, match="image 7: image name '"):
        read(images=[image(7, file_name)])


def test_deeply_nested_values_are_shown_short(tmp_path):
    nested = "[" * 900 + "]" * 900
    (tmp_path / "a.json").write_text(f'{{"images": [{nested}], "annotations": [], "categories": []}}')
    with pytest.raises(ValueError, match=r"images\[0\] has no valid id: \[{1,8}\.\.\.") as error:
        read_coco_json(tmp_path / "a.json", 3)
    assert len(str(error.value).removeprefix(str(tmp_path))) < 200


# --- ids --------------------------------------------------------------------------------------------


def test_ids_are_read_as_text_and_as_whole_floats(read):
    content = read(
        images=[image("7", "x.jpg"), image(8.0, "y.jpg"), image("u-1", "z.jpg")],
        annotations=[
            {"id": "1", "image_id": 7, "category_id": 3.0},
            {"id": 2, "image_id": "007", "category_id": "1"},
            {"id": 3, "image_id": "8", "category_id": 2},
            {"id": 4, "image_id": "u-1", "category_id": 2},
        ],
        categories=[{"id": "1"}, {"id": 2.0}, {"id": 3}],
    )
    assert labels(content) == {"x": [0, 2], "y": [1], "z": [1]}
    assert [item["category_id"] for item in content.images["x"].annotations] == [3, 1]


@pytest.mark.parametrize("second", [image(7, "x.jpg"), image(70, "x.jpg"), image(70, ".\\x.jpg", license=3)])
def test_repeated_image_is_merged(read, second):
    extra = {"id": 4, "image_id": second["id"], "category_id": 2}
    content = read(
        images=[*instances()["images"], second], annotations=[*instances()["annotations"], extra]
    )
    assert labels(content) == {"x": [0, 1, 2], "y": [1]}
    assert len(content.images["x"].annotations) == 3


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (image(7, "z.jpg"), "image id 7 is used for x.jpg and z.jpg: give each its own id"),
        (image(7, "val/x.jpg"), "image id 7 is used for x.jpg and val/x.jpg"),
        (image(70, "x.png"), "x.jpg and x.png have the same name: rename one"),
        (image(70, "x.jpg", width=8), r"x.jpg is listed with the sizes \(5, 7\) and \(5, 8\)"),
    ],
)
def test_different_images_are_not_merged(read, second, message):
    with pytest.raises(ValueError, match=message):
        read(images=[*instances()["images"], second])


def test_repeated_annotation_ids_keep_all_annotations(read):
    annotations = [item | {"id": 1} for item in instances()["annotations"]]
    assert labels(read(annotations=annotations)) == {"x": [0, 2], "y": [1]}


@pytest.mark.parametrize(
    "size",
    [{"height": None}, {"width": 0}, {"width": -7}, {"width": "wide"}, {"height": 2.5}, {"height": [5]},
     {"height": float("nan")}, {"height": 10**5, "width": 10**5}],
)  # fmt: skip
def test_image_without_valid_size_has_labels(read, size):
    content = read(images=[image(7, "x.jpg", **size), image(8, "y.jpg", height="5", width=7.0)])
    assert (content.images["x"].size, content.images["x"].labels) == (None, [0, 2])
    assert content.images["y"].size == (5, 7)


# --- categories -------------------------------------------------------------------------------------


def categories(**ids):
    return [{"id": i, "name": name} for name, i in ids.items()]


@pytest.mark.parametrize(
    "declared",
    [
        categories(maple=1, oak=2, birch=3),
        [{"id": 2, "name": " Oak "}, {"id": 1, "name": "MAPLE"}, {"id": 3, "name": "birch"}],
        [*categories(maple=1, oak=2, birch=3, leaves=0), {"id": 9, "name": "thing"}],
        categories(maple=1, oak=2, birch=3, Birch=4),  # another spelling, or a file merged from two
        [*categories(maple=1, oak=2), *categories(birch=3), *categories(birch=5), *categories(maple=1)],
    ],
)
def test_categories_are_matched_by_name(read, declared):
    assert labels(read(LEAVES, categories=declared)) == {"x": [1, 2], "y": [0]}


@pytest.mark.parametrize(
    ("declared", "listed"),
    [
        (
            categories(maples=1, oak=2, birch=3),
            r"without a class: maples \(id 1\); classes without a category: maple$",
        ),
        (categories(maple=1, oak=2, pine=3), r"without a class: pine \(id 3\); .*: birch$"),
        ([{"id": 1}, {"id": 2}, {"id": 3}], r"without a class: \(no name\) \(id 1\), .*: oak, maple, birch$"),
        (
            categories(maple=1, oak=2, birch=3) + categories(a=4, b=5, c=6, d=7, e=8, f=9),
            r"by name: rename them, or give category_ids.* and 1 more; classes without a category: none$",
        ),
    ],
)
def test_names_that_do_not_match_are_an_error(read, declared, listed):
    annotations = [{"id": 1, "image_id": 7, "category_id": item["id"]} for item in declared]
    with pytest.raises(ValueError, match=listed):
        read(LEAVES, categories=declared, annotations=annotations)


def test_category_ids_have_priority_over_names(read):
    assert labels(read(LEAVES, [2, 1, 3])) == {"x": [1, 2], "y": [0]}
    assert labels(read([*LEAVES, "pine"], [2, 1, 3, 4])) == {"x": [1, 2], "y": [0]}


ROOT = {"id": 0, "name": "leaves", "supercategory": "none"}
ROBOFLOW = [ROOT, *({**item, "supercategory": "leaves"} for item in categories(oak=1, maple=2, birch=3))]
LABELME = categories(__ignore__=-1, _background_=0, oak=1, maple=2, birch=3)


@pytest.mark.parametrize("declared", [ROBOFLOW, LABELME])
@pytest.mark.parametrize(("classes", "ids"), [(3, ()), (3, (1, 2, 3)), (LEAVES, ()), (LEAVES, (1, 2, 3))])
def test_category_without_annotations_is_left_out(read, declared, classes, ids):
    assert labels(read(classes, ids, categories=declared)) == {"x": [0, 2], "y": [1]}


@pytest.mark.parametrize(
    ("classes", "ids", "message"),
    [
        (3, (), "4 categories that do not match the 3 classes: give category_ids, the id of each class"),
        (3, (1, 2, 3), r"4 categories that do not .*: category_ids does not contain leaves \(id 0\)"),
        (LEAVES, (), r"Categories without a class: leaves \(id 0\); classes without a category: none"),
    ],
)
def test_category_with_annotations_is_not_left_out(read, classes, ids, message):
    annotations = [*instances()["annotations"], {"id": 9, "image_id": 8, "category_id": 0}]
    with pytest.raises(ValueError, match=message):
        read(classes, ids, categories=ROBOFLOW, annotations=annotations)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((), "2 categories that do not match the 3 classes: give category_ids"),
        ((11, 12, 13), "2 categories that do not match the 3 classes: none of them is in category_ids"),
        ((1, 2), "category_ids has 2 ids, expected one for each class"),
    ],
)
def test_wrong_number_of_categories_is_an_error(read, ids, message):
    with pytest.raises(ValueError, match=message):
        read(3, ids, categories=categories(oak=1, maple=2), annotations=[])


def test_unused_real_category_is_not_left_out_by_number(read):
    """The classes could be any three of the four."""
    with pytest.raises(ValueError, match="4 categories that do not match the 3 classes: give category_ids"):
        read(3, categories=categories(pine=0, oak=1, maple=2, birch=3))


def test_category_id_of_two_names_is_an_error(read):
    with pytest.raises(ValueError, match="category id 1 is used for oak and pine"):
        read(categories=[*instances()["categories"], {"id": 1, "name": "pine"}])
    assert labels(read(categories=[*instances()["categories"], {"id": 1, "name": "oak "}]))["x"] == [0, 2]
