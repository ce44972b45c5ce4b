"""COCO14: the benchmark's classes and prompts, painting of masks, and `prepare` on small copies."""
import hashlib
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle_codec

from coco14 import CATEGORY_IDS, CLASS_INDEX, prepare
from coco14.masks import OVERLAPS, paint, rasterize
from segmentation import labels
from segmentation.benchmark import load
from segmentation.coco import CocoImage

# pycocotools' arrays raise this warning under NumPy 2; callers cannot avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 8, 10
TRAIN = [f"COCO_train2014_{i:012d}" for i in (9, 25, 30, 100)]
VAL = ["COCO_val2014_000000000042"]
LABELS = {TRAIN[0]: [0, 16], TRAIN[1]: [79], TRAIN[2]: [], TRAIN[3]: [0]}  # TRAIN[2] has no object


def test_benchmark_has_the_published_classes_and_prompts():
    coco = load("coco14")
    assert (len(coco.classes), len(coco.backgrounds), coco.channels, coco.box_threshold) == (80, 23, 81, 0.7)
    assert coco.backgrounds == [b for b in load("voc12").backgrounds if b not in ("keyboard", "sign")]
    changed = {i for i, (a, b) in enumerate(zip(coco.classes, coco.prompts, strict=True)) if a != b}
    assert changed == {0, 14, 24, 25, 26, 27, 31, 35, 44, 56, 62, 65, 78}
    assert coco.prompts[31] == "sknowboard"


def test_category_ids_match_the_class_names():
    assert len(CATEGORY_IDS) == 80 == len(CLASS_INDEX)
    names = load("coco14").classes
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 27: "backpack", 44: "bottle", 90: "toothbrush"}
    assert {i: names[CLASS_INDEX[i]] for i in known} == known
    assert all(CLASS_INDEX[category] == index for index, category in enumerate(CATEGORY_IDS))


# --- painting ---------------------------------------------------------------------------------------


def box(left, top, right, bottom):
    """A polygon covering columns [left, right) and rows [top, bottom)."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(mask):
    """COCO's uncompressed RLE: column-major run lengths, beginning with zeros."""
    flat = mask.flatten(order="F").astype(int)
    ends = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def objects(*pairs):
    annotations = [{"id": i, "category_id": c, "segmentation": s} for i, (c, s) in enumerate(pairs)]
    return CocoImage((HEIGHT, WIDTH), annotations, [])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_run_lengths_are_painted_exactly(seed, height, width):
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), np.uint8)
    compressed = rle_codec.encode(np.asfortranarray(mask))
    compressed["counts"] = compressed["counts"].decode()  # as in JSON
    for shape in (run_lengths(mask), compressed):
        annotation = {"id": 1, "category_id": 90, "segmentation": shape, "area": int(mask.sum())}
        np.testing.assert_array_equal(paint(CocoImage((height, width), [annotation], [])), mask * 80)


def test_polygons_cover_their_pixels():
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[1:4, 2:6] = expected[5:7, 8:10] = 1
    image = objects((1, box(2, 1, 6, 4) + box(8, 5, 10, 7)))
    np.testing.assert_array_equal(paint(image), expected)


SQUARE = [0, 0, 4, 0, 4, 4, 0, 4]
PAIRS = [[0, 0], [4, 0], [4, 4], [0, 4]]
SQUARE_MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
SQUARE_MASK[:4, :4] = 1
RLE = run_lengths(SQUARE_MASK)
COMPRESSED = rle_codec.encode(np.asfortranarray(SQUARE_MASK))
LEFT, RIGHT = SQUARE_MASK.copy(), SQUARE_MASK.copy()
LEFT[:, 2:] = RIGHT[:, :2] = 0


@pytest.mark.parametrize(
    "shape",
    [
        [SQUARE],
        SQUARE,
        [float(value) for value in SQUARE],
        PAIRS,
        [PAIRS],
        [[PAIRS]],
        [[SQUARE]],
        [PAIRS, SQUARE],
        [SQUARE, [1, 1], [0, 0, 3, 3]],  # a point and a line add nothing
        [[0, 0, 2, 0, 2, 4, 0, 4], [[2, 0], [4, 0], [4, 4], [2, 4]]],
        RLE,
        [RLE],
        [run_lengths(LEFT), run_lengths(RIGHT)],
        [run_lengths(LEFT), [2, 0, 4, 0, 4, 4, 2, 4]],
        {"size": [8.0, 10.0], "counts": [float(count) for count in RLE["counts"]]},
        COMPRESSED,
        [{"size": [HEIGHT, WIDTH], "counts": COMPRESSED["counts"].decode()}],
    ],
)
def test_segmentations_of_other_tools_are_painted(shape):
    np.testing.assert_array_equal(paint(objects((1, shape))), SQUARE_MASK)


def test_objects_without_pixels_are_errors_unless_their_area_is_tiny():
    sliver = {"id": 1, "category_id": 1, "segmentation": [[6.65, 3.33, 6.65, 3.33, 7.68, 3.33]], "area": 0.0}
    assert not paint(CocoImage((HEIGHT, WIDTH), [sliver], [])).any()  # as in the official files
    assert paint(objects()).shape == (HEIGHT, WIDTH)
    for change in ({"area": 80}, {"area": None}, {"segmentation": [[1, 1, 5, 5]]}, {"segmentation": []}):
        with pytest.raises(ValueError, match=r"annotation 1 cannot be rasterized: it (covers|has) no "):
            paint(CocoImage((HEIGHT, WIDTH), [sliver | change], []))
    outside = [[20, 20, 30, 20, 30, 30]]
    with pytest.raises(ValueError, match="it covers no pixel of the image"):
        paint(CocoImage((HEIGHT, WIDTH), [sliver | {"segmentation": outside}], []))


def test_overlap_selects_the_object_of_a_pixel():
    image = objects((2, box(2, 2, 6, 6)), (1, box(0, 0, 8, 8)), (3, box(4, 4, 7, 7)))
    center = {overlap: paint(image, overlap)[5, 5] for overlap in OVERLAPS}
    assert center == {"smallest": 3, "first": 2, "last": 3}
    corner = {overlap: paint(image, overlap)[3, 3] for overlap in OVERLAPS}
    assert corner == {"smallest": 2, "first": 2, "last": 1}


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(4)))
def test_smallest_object_stays_visible_in_any_order(order):
    shapes = [(1, box(0, 0, 10, 8)), (2, box(0, 0, 8, 6)), (3, box(1, 1, 5, 4)), (4, box(2, 2, 4, 3))]
    painted = paint(objects(*(shapes[i] for i in order)))
    assert set(np.unique(painted)) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (None, "it has no segmentation$"),
        ([], "it has no segmentation"),
        ("polygon", "its segmentation contains 'polygon', expected polygons or run lengths"),
        ([SQUARE, None], "its segmentation contains None, expected polygons"),
        ([[[[[SQUARE]]]]], "expected polygons or run lengths"),
        ([[0, 0, 4, 4]], "it covers no pixel of the image"),
        ([0, 0, 4, 4], "it covers no pixel of the image"),
        ([[[0, 0], [4, 4]]], "it covers no pixel of the image"),
        ([[-9, -9, -5, -9, -5, -5]], "it covers no pixel of the image"),
        ([[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]], "its coordinates are all between 0 and 1, expected pixels"),
        ([[*SQUARE, 2]], "a polygon has 9 numbers, expected pairs x, y"),
        ([[[0, 0, 2], [4, 0, 2], [4, 4, 2]]], "a polygon has 3 numbers, expected pairs"),
        ([[float("nan"), *SQUARE[1:]]], "its coordinate nan is not a number"),
        ([[None, *SQUARE[1:]]], "its coordinate None is not a number"),
        ([["0", *SQUARE[1:]]], "its coordinate '0' is not a number"),
        ([[True, *SQUARE[1:]]], "its coordinate True is not a number"),
        ([{"x": 0, "y": 0}], "its segmentation has no size and counts"),
        ([[float("inf"), *SQUARE[1:]]], "its coordinate inf is far outside the image, 8 x 10"),
        ([[0, 0, 10**9, 0, 10**9, 10**9]], "its coordinate 1000000000 is far outside"),
        ([[0, 0, -(10**400), 0, 4, 4]], "its coordinate -10+\\.\\.\\.0+ is far outside"),
        ([[-90, -90, 100, 100] * 10_000], "pixels long, expected at most 1000000"),
        ({"size": [HEIGHT, WIDTH]}, "its segmentation has no size and counts"),
        ({"size": None, "counts": [80]}, "its size is None, but the image is"),
        ({"size": HEIGHT, "counts": [80]}, "its size is 8, but the image is"),
        ({"size": [[HEIGHT, WIDTH]], "counts": [80]}, "but the image is"),
        ({"size": [WIDTH, HEIGHT], "counts": [80]}, r"its size is \[10, 8\], but the image is \[8, 10\]"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, "its counts are None, expected run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": [-16, 16, 80]}, "its run length -16 is negative"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**33, 80]}, "its run lengths cover 8589934672 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [0, 1.5, 78.5]}, "its run length 1.5 is not an integer"),
        ({"size": [HEIGHT, WIDTH], "counts": [float("inf")]}, "its run length inf is not an integer"),
        ({"size": [HEIGHT, WIDTH], "counts": [0, "80"]}, "its run length '80' is not an integer"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, "its run lengths cover 0 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [80]}, "it covers no pixel of the image"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, "its run lengths cover 0 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "garbage!"}, "its compressed run lengths are damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": "\u20ac"}, "its compressed run lengths are damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": b"\xff\0"}, "its compressed run lengths are damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 99}, "its compressed run lengths are damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": "0o"}, "its compressed run lengths are cut short"),
        ({"size": [HEIGHT, WIDTH], "counts": "0ooooo3"}, "its run lengths cover"),
        ({"size": [3, 3], "counts": [9]}, r"its size is \[3, 3\], but the image is \[8, 10\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [3]}, "its run lengths cover 3 pixels, the image has 80"),
        ({"counts": [3]}, "its segmentation has no size and counts"),
        ([["a"] * 6], "its coordinate 'a' is not a number"),
        ([3], "a polygon has 1 numbers, expected pairs x, y"),
    ],
)
def test_bad_segmentation_is_an_error(shape, sentence):
    with pytest.raises(ValueError, match=f"^annotation 5 cannot be rasterized: .*{sentence}"):
        rasterize({"id": 5, "segmentation": shape}, (HEIGHT, WIDTH))


def test_missing_segmentation_is_an_error():
    with pytest.raises(ValueError, match="it has no segmentation, only a bounding box"):
        rasterize({"id": 5, "bbox": [0, 0, 4, 4], "iscrowd": 0}, (HEIGHT, WIDTH))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=9)
    | st.fixed_dictionaries({"size": st.just([HEIGHT, WIDTH]) | inner, "counts": inner}),
    max_leaves=20,
)


@settings(deadline=None, max_examples=200)
@given(JSON_VALUES)
def test_any_segmentation_is_rasterized_or_an_error(shape):
    try:
        mask = rle_codec.decode(rasterize({"id": 5, "segmentation": shape}, (HEIGHT, WIDTH)))
    except ValueError as error:
        assert str(error).startswith("annotation 5 cannot be rasterized: ")
    else:
        assert mask.shape == (HEIGHT, WIDTH) and mask.any()


@settings(deadline=None, max_examples=200)
@given(st.text("0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefghijklmno", max_size=12))
def test_any_compressed_run_lengths_are_read_or_an_error(counts):
    try:
        rasterize({"id": 5, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}, (HEIGHT, WIDTH))
    except ValueError as error:
        assert str(error).startswith("annotation 5 cannot be rasterized: ")


# --- prepare ----------------------------------------------------------------------------------------


def instances(names, annotations):
    return {
        "images": [
            {"id": int(name[-12:]), "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
            for name in reversed(names)
        ],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations)],
        "categories": [{"id": i} for i in CATEGORY_IDS],
    }


@pytest.fixture
def copy(tmp_path):
    """A COCO of four train images and one val image, with annotations and without masks."""
    root = tmp_path / "COCO"
    for split, names in (("train", TRAIN), ("val", VAL)):
        (root / "JPEGImages" / f"{split}2014").mkdir(parents=True)
        for name in names:
            Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / f"{split}2014" / f"{name}.jpg")
    crowd = np.zeros((HEIGHT, WIDTH), np.uint8)
    crowd[4:] = 1
    annotations = [
        {"image_id": 9, "category_id": 18, "segmentation": box(1, 1, 5, 4)},
        {"image_id": 9, "category_id": 1, "segmentation": run_lengths(crowd), "iscrowd": 1},
        {"image_id": 25, "category_id": 90, "segmentation": box(0, 0, 3, 3)},
        {"image_id": 100, "category_id": 1, "segmentation": box(2, 2, 4, 4)},
        {"image_id": 100, "category_id": 1, "segmentation": box(5, 5, 7, 7)},
    ]
    train, val = tmp_path / "instances_train2014.json", tmp_path / "instances_val2014.json"
    train.write_text(json.dumps(instances(TRAIN, annotations)))
    val.write_text(
        json.dumps(instances(VAL, [{"image_id": 42, "category_id": 3, "segmentation": box(0, 0, 4, 4)}]))
    )
    return SimpleNamespace(
        root=root, out=tmp_path / "lists", train=train, val=val, masks=root / "SegmentationClass"
    )


def run(copy, *flags, workers=1):
    arguments = ["--root", copy.root, "--out", copy.out, "--num_workers", workers, *flags]
    return prepare.main([str(argument) for argument in arguments])


def lines(table):
    listed = {name: class_ids for name, class_ids in table.items() if class_ids}
    return "".join(" ".join([name, *map(str, class_ids)]) + "\n" for name, class_ids in listed.items())


def paint_all(copy):
    """Give the copy masks without the record of `prepare`, as if the user had downloaded them."""
    assert run(copy, "--annotations", copy.train, copy.val) == 0
    for record in copy.masks.glob("*.json"):
        record.unlink()


def test_annotations_give_masks_and_lists(copy, capsys):
    assert run(copy, "--annotations", copy.train, copy.val) == 0
    assert sorted(file.stem for file in copy.masks.glob("*.png")) == TRAIN + VAL
    assert (copy.out / "train.txt").read_text() == lines(LABELS)
    assert (copy.out / "val.txt").read_text() == f"{VAL[0]} 2\n"
    mask = Image.open(copy.masks / f"{TRAIN[0]}.png")
    assert mask.mode == "P"
    assert np.unique(mask).tolist() == [0, 1, 17]
    printed = capsys.readouterr().out
    assert "train: 4 masks made in" in printed
    assert "train: labels from the values of the masks" in printed
    assert "train.txt: 3 images; sha256 DIFFERS from that of the published list" in printed
    assert labels.read_split(copy.out / "train.txt", 80)[TRAIN[0]] == [0, 16]


def test_masks_alone_give_the_lists(copy, capsys):
    paint_all(copy)
    (copy.masks / f"{TRAIN[2]}.png").unlink()  # downloaded masks may leave out images without objects
    capsys.readouterr()
    assert run(copy) == 0
    assert (copy.out / "train.txt").read_text() == lines(LABELS)
    printed = "".join(capsys.readouterr())
    assert "train: 1 images have no readable mask and are left out" in printed
    assert "val: labels from the values of the masks" in printed


def test_labels_of_masks_leave_out_hidden_classes(copy, capsys):
    paint_all(copy)
    Image.fromarray(np.full((HEIGHT, WIDTH), 17, np.uint8)).save(copy.masks / f"{TRAIN[0]}.png")
    assert run(copy, "--annotations", copy.train) == 0
    assert (copy.out / "train.txt").read_text() == lines(LABELS | {TRAIN[0]: [16]})
    assert run(copy, "--annotations", copy.train, "--labels", "json") == 0
    assert (copy.out / "train.txt").read_text() == lines(LABELS)
    printed = "".join(capsys.readouterr())
    assert "train: labels from the instances JSON" in printed
    assert "val: list not made, because the split has no annotations" in printed


def test_published_list_is_recognized(copy, capsys, monkeypatch):
    monkeypatch.setitem(prepare.PUBLISHED, "train", (3, hashlib.sha256(lines(LABELS).encode()).hexdigest()))
    run(copy, "--annotations", copy.train)
    assert "train.txt: 3 images; sha256 equals that of the published list" in capsys.readouterr().out


def test_second_run_paints_only_missing_masks(copy, capsys):
    run(copy, "--annotations", copy.train)
    whole = {file.name: file.read_bytes() for file in copy.masks.glob("*.png")}
    (copy.masks / f"{TRAIN[0]}.png").unlink()
    kept = copy.masks / f"{TRAIN[1]}.png"
    os.utime(kept, (1, 1))
    capsys.readouterr()
    assert run(copy, "--annotations", copy.train, workers=2) == 0
    assert "train: 1 masks made in" in capsys.readouterr().out
    assert kept.stat().st_mtime == 1
    assert {file.name: file.read_bytes() for file in copy.masks.glob("*.png")} == whole


def test_another_overlap_is_an_error(copy, capsys):
    run(copy, "--annotations", copy.train, "--overlap", "first")
    with pytest.raises(SystemExit) as stop:
        run(copy, "--annotations", copy.train)
    assert stop.value.code == 2
    assert "were painted with --overlap first" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, "\xff"])
def test_damaged_record_of_the_overlap_is_an_error(copy, capsys, content):
    run(copy, "--annotations", copy.train)
    (record,) = copy.masks.glob("painted_*.json")
    record.write_text(content, encoding="latin1")
    with pytest.raises(SystemExit) as stop:
        run(copy, "--annotations", copy.train)
    assert stop.value.code == 2
    assert f"{record.name} is damaged" in capsys.readouterr().err


def test_masks_of_the_user_are_not_changed(copy, capsys):
    paint_all(copy)
    (copy.masks / f"{TRAIN[0]}.png").unlink()
    capsys.readouterr()
    assert run(copy, "--annotations", copy.train) == 1
    assert not (copy.masks / f"{TRAIN[0]}.png").exists()
    printed = "".join(capsys.readouterr())
    assert "has 3 masks of another origin: no mask is changed" in printed
    assert "missing mask: 1" in printed


def first_image(copy):
    return copy.root / "JPEGImages" / "train2014" / f"{TRAIN[0]}.jpg"


def damage_annotation(copy):
    content = json.loads(copy.train.read_text())
    content["annotations"][0]["segmentation"] = {"size": [1, 1], "counts": [1]}
    copy.train.write_text(json.dumps(content))


def mask_of(value, shape=(HEIGHT, WIDTH)):
    def write(copy):
        paint_all(copy)
        Image.fromarray(np.full(shape, value, np.uint8)).save(copy.masks / f"{TRAIN[0]}.png")

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda copy: first_image(copy).unlink(), "missing image: 1"),
        (lambda copy: first_image(copy).write_bytes(b"no"), "bad image: 1"),
        (damage_annotation, f"image {TRAIN[0]}: annotation 0 cannot be rasterized: its size is [1, 1]"),
        (mask_of(81), "has the value 81, which is not a class: expected 0 to 80, or 255"),
        (mask_of(1, (5, 5)), "differ: annotation 8 x 10, image 8 x 10, mask 5 x 5"),
    ],
)
def test_single_fault_is_reported(copy, capsys, damage, message):
    damage(copy)
    assert run(copy, "--annotations", copy.train) == 1
    assert message in capsys.readouterr().out
    assert TRAIN[0] in (copy.out / "problems.txt").read_text()
    assert labels.read_split(copy.out / "train.txt")[TRAIN[1]] == [79]


def edit(copy, key, change):
    """Change the list `key` of the train annotations."""
    content = json.loads(copy.train.read_text())
    change(content[key])
    copy.train.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 99}, f"image {TRAIN[0]}: annotation 0 has the unknown category 99"),
        ({"category_id": None}, f"image {TRAIN[0]}: annotation 0 has no valid category_id: None"),
        ({"segmentation": []}, f"image {TRAIN[0]}: annotation 0 cannot be rasterized: it has no"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "zz"}}, "compressed run lengths are damaged"),
    ],
)
@pytest.mark.parametrize("labels_from", ("masks", "json"))
def test_fault_of_an_annotation_is_reported_and_other_images_are_done(
    copy, capsys, change, message, labels_from
):
    edit(copy, "annotations", lambda annotations: annotations[0].update(change))
    for _ in range(2):  # the second run reports it, too
        assert run(copy, "--annotations", copy.train, "--labels", labels_from) == 1
        assert message in (copy.out / "problems.txt").read_text()
        assert "1 problems" in capsys.readouterr().out
    assert not (copy.masks / f"{TRAIN[0]}.png").exists()
    assert sorted(file.stem for file in copy.masks.glob("*.png")) == TRAIN[1:]
    listed = labels.read_split(copy.out / "train.txt")
    assert listed.items() >= {TRAIN[1]: [79], TRAIN[3]: [0]}.items()
    assert "segmentation" in change or TRAIN[0] not in listed  # its labels are incomplete


def test_annotation_of_an_unknown_image_is_reported(copy, capsys):
    unknown = {"id": 77, "image_id": 12345, "category_id": 1, "segmentation": box(0, 0, 4, 4)}
    edit(copy, "annotations", lambda annotations: annotations.append(unknown))
    assert run(copy, "--annotations", copy.train) == 1
    assert "annotation 77 belongs to image 12345, which is not in the file" in capsys.readouterr().out
    assert (copy.out / "train.txt").read_text() == lines(LABELS)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": None}, f"image {TRAIN[0]}: its height and width are missing or not valid"),
        ({"height": 10**9}, f"image {TRAIN[0]}: its height and width are missing or not valid"),
        ({"height": WIDTH, "width": HEIGHT}, "differ: annotation 10 x 8, image 8 x 10"),
    ],
)
def test_wrong_image_size_is_reported_and_no_mask_is_made(copy, capsys, size, message):
    edit(copy, "images", lambda images: images[-1].update(size))  # the images are in reverse order
    assert run(copy, "--annotations", copy.train) == 1
    assert message in capsys.readouterr().out
    assert sorted(file.stem for file in copy.masks.glob("*.png")) == TRAIN[1:]


def test_image_names_of_other_systems_are_read(copy):
    def change(images):
        for image, prefix in zip(images, ("C:\\coco\\", "train2014/", "http://host/", ""), strict=True):
            image["file_name"] = prefix + image["file_name"]

    edit(copy, "images", change)
    assert run(copy, "--annotations", copy.train) == 0
    assert (copy.out / "train.txt").read_text() == lines(LABELS)


def test_mask_without_image_is_reported(copy, capsys):
    paint_all(copy)
    (copy.root / f"JPEGImages/train2014/{TRAIN[1]}.jpg").unlink()
    assert run(copy) == 1
    assert "missing image: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--root", "{root}/none"], "has no JPEGImages folder"),
        ([], "has no SegmentationClass folder: give --annotations to make the masks"),
        (["--labels", "json"], "--labels json needs --annotations"),
        (["--annotations", "{root}/none.json"], r"none\.json does not exist"),
        (["--annotations", "{train}", "{train}"], "the train split was given before; give it once"),
        (["--annotations", "{root}/2017.json"], "is not of COCO 2014"),
        (["--annotations", "{root}/few.json"], "1 categories that do not match the 80 classes"),
        (["--overlap", "none"], "invalid choice"),
        (["--annotations", "{root}/twice.json"], r"a/COCO_\S+ and b/COCO_\S+ have the same name: rename one"),
        (["--annotations", "{root}/blank.json"], "is not of COCO 2014"),
    ],
)
def test_wrong_usage_exits_with_code_2(copy, capsys, flags, sentence):
    (copy.root / "2017.json").write_text(json.dumps(instances(["000000000009"], [])))
    few = instances(TRAIN, []) | {"categories": [{"id": 12}]}
    (copy.root / "few.json").write_text(json.dumps(few))
    twice = instances([TRAIN[0]], [])
    twice["images"] = [twice["images"][0] | {"id": i, "file_name": f"{i}/{TRAIN[0]}.jpg"} for i in "ab"]
    (copy.root / "twice.json").write_text(json.dumps(twice))
    blank = instances([TRAIN[0]], [])
    blank["images"][0]["file_name"] = f"{TRAIN[0]} 1.jpg"
    (copy.root / "blank.json").write_text(json.dumps(blank))
    with pytest.raises(SystemExit) as stop:
        run(copy, *(flag.format(root=copy.root, train=copy.train) for flag in flags))
    assert stop.value.code == 2
    assert re.search(sentence, capsys.readouterr().err.splitlines()[-1])


# --- COCO 2017 --------------------------------------------------------------------------------------

TRAIN_2017 = ["000000000009", "000000000025", "000000000030"]
VAL_2017 = ["000000000139"]


@pytest.fixture
def copy_2017(tmp_path):
    """A COCO 2017 of three train images, one without an object, and one val image."""
    root = tmp_path / "COCO"
    for split, names in (("train2017", TRAIN_2017), ("val2017", VAL_2017)):
        (root / "JPEGImages" / split).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / split / f"{name}.jpg")
    annotations = [
        {"image_id": 9, "category_id": 18, "segmentation": box(0, 0, 5, 4)},
        {"image_id": 9, "category_id": 1, "segmentation": box(0, 0, 5, 4)},  # hides the dog
        {"image_id": 30, "category_id": 90, "segmentation": box(0, 0, 3, 3)},
    ]
    train, val = tmp_path / "instances_train2017.json", tmp_path / "instances_val2017.json"
    train.write_text(json.dumps(instances(TRAIN_2017, annotations)))
    val.write_text(json.dumps(instances(VAL_2017, [annotations[0] | {"image_id": 139, "category_id": 3}])))
    return SimpleNamespace(
        root=root, out=tmp_path / "lists", train=train, val=val, masks=root / "SegmentationClass"
    )


def test_2017_annotations_give_masks_and_lists(copy_2017, capsys, monkeypatch):
    monkeypatch.setitem(prepare.PUBLISHED, "val2017", (1,))
    assert run(copy_2017, "--year", "2017", "--annotations", copy_2017.train, copy_2017.val) == 0
    written = {file.name: file.read_text() for file in copy_2017.out.iterdir()}
    assert written == {
        "train2017.txt": "000000000009 0 16\n000000000030 79\n",  # hidden classes are listed
        "val2017.txt": "000000000139 2\n",
    }
    assert sorted(file.stem for file in (copy_2017.masks / "train2017").glob("*.png")) == TRAIN_2017
    mask = np.asarray(Image.open(copy_2017.masks / "val2017" / f"{VAL_2017[0]}.png"))
    assert (mask[:4, :5] == 3).all() and mask.sum() == 3 * 20
    printed = capsys.readouterr().out
    assert "train2017: labels from the instances JSON" in printed
    assert printed.count("differs from the published list") == 1 and "has 117266 images" in printed


def test_2017_resumes_and_does_not_change_2014(copy_2017, copy):
    assert copy.root == copy_2017.root and copy.out == copy_2017.out
    assert run(copy, "--annotations", copy.train, copy.val) == 0
    lists = {file: file.read_bytes() for file in copy.out.iterdir()}
    masks = {file: file.read_bytes() for file in copy.masks.glob("*.png")}
    flags = ("--year", "2017", "--annotations", copy_2017.val)
    assert run(copy_2017, *flags) == 0
    made = copy.masks / "val2017" / f"{VAL_2017[0]}.png"
    whole = made.read_bytes()
    made.unlink()
    assert run(copy_2017, *flags) == 0 and made.read_bytes() == whole
    assert not (copy.out / "train2017.txt").exists()
    assert run(copy) == 0  # 2014 ignores the files of 2017
    assert {file: file.read_bytes() for file in lists} == lists
    assert {file: file.read_bytes() for file in copy.masks.glob("*.png")} == masks


def test_2017_annotations_of_another_split_are_an_error(copy_2017, capsys):
    """Image names of 2017 do not contain the split, so images are looked up before masks are painted."""
    wrong = copy_2017.root / "of_train2017.json"
    wrong.write_bytes(copy_2017.val.read_bytes())
    with pytest.raises(SystemExit):
        run(copy_2017, "--year", "2017", "--annotations", wrong)
    message = "of_train2017.json lists no image of train2017: give instances_train2017.json"
    assert message in capsys.readouterr().err
    assert not (copy_2017.masks / "train2017").exists()


def test_2017_masks_give_labels(copy_2017, capsys):
    run(copy_2017, "--year", "2017", "--annotations", copy_2017.train)
    assert run(copy_2017, "--year", "2017", "--annotations", copy_2017.train, "--labels", "masks") == 0
    assert (copy_2017.out / "train2017.txt").read_text() == "000000000009 0\n000000000030 79\n"
    assert run(copy_2017, "--year", "2017") == 0  # no JSON: labels from the masks
    assert (copy_2017.out / "train2017.txt").read_text() == "000000000009 0\n000000000030 79\n"
    (copy_2017.root / "JPEGImages/train2017/000000000030.jpg").unlink()
    (copy_2017.out / "problems.txt").write_text("of 2014\n")
    assert run(copy_2017, "--year", "2017") == 1
    assert "000000000030" in (copy_2017.out / "problems2017.txt").read_text()
    assert (copy_2017.out / "problems.txt").read_text() == "of 2014\n"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--year", "2017"], "has no SegmentationClass/train2017 or SegmentationClass/val2017 folder"),
        (["--year", "2017", "--annotations", "{root}/mine.json"], "must end in train2017 or val2017"),
        (["--year", "2017", "--annotations", "{root}/val2017.json"], "its image names must be numbers"),
        (["--annotations", "{val}"], "is not of COCO 2014: .*; for COCO 2017, give --year 2017"),
        (["--year", "2017", "--annotations", "{val}", "{val}"], "the val2017 split was given before"),
    ],
)
def test_wrong_usage_with_2017_exits_with_code_2(copy_2017, capsys, flags, sentence):
    (copy_2017.root / "mine.json").write_text(copy_2017.val.read_text())
    (copy_2017.root / "val2017.json").write_text(json.dumps(instances(VAL, [])))
    copy_2017.masks.mkdir()  # of 2014
    with pytest.raises(SystemExit) as stop:
        run(copy_2017, *(flag.format(root=copy_2017.root, val=copy_2017.val) for flag in flags))
    assert stop.value.code == 2
    assert re.search(sentence, capsys.readouterr().err.splitlines()[-1])
