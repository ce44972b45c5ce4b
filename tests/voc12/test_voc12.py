"""VOC12: the benchmark's classes and prompts, and `prepare` on small complete or damaged copies."""
import hashlib
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from segmentation import labels
from segmentation.benchmark import load
from voc12 import prepare

TRAIN, VAL, EXTRA = ["2007_000032", "2007_000039"], ["2007_000033"], ["2008_000002"]
HEIGHT, WIDTH = 6, 8
XML = """<annotation><size><width>8</width><height>6</height></size>
<object><name>person</name><part><name>head</name></part></object>
<object><name>dog</name><difficult>1</difficult><truncated>1</truncated></object></annotation>"""


def test_benchmark_has_the_published_classes_and_prompts():
    voc = load("voc12")
    assert (len(voc.classes), len(voc.backgrounds), voc.channels, voc.box_threshold) == (20, 25, 21, 0.4)
    assert voc.classes[14] == "person"
    assert voc.prompts[14] == "person with clothes,people,human"
    assert [a for a, b in zip(voc.classes, voc.prompts, strict=True) if a != b] == [
        "bird", "chair", "person", "tvmonitor",
    ]  # fmt: skip
    assert voc.templates == ["a clean origami {}."]


@pytest.fixture
def copy(tmp_path):
    """A complete copy of a VOC with four images; `.root` is its folder, `.out` the folder of the lists."""
    root = tmp_path / "VOC2012"
    images = ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug")
    for folder in (*images, "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    lists = {"train": TRAIN, "val": VAL, "trainval": sorted(TRAIN + VAL)}
    for split, names in lists.items():
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[1:3], mask[3] = 15, 255
    for name in TRAIN + VAL + EXTRA:
        Image.new("RGB", (WIDTH, HEIGHT), "red").save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(XML)
        Image.fromarray(mask).save(root / "SegmentationClassAug" / f"{name}.png")
        if name not in EXTRA:
            Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
    return SimpleNamespace(root=root, out=tmp_path / "lists")


def run(copy, *flags, workers=1):
    arguments = ["--root", str(copy.root), "--out", str(copy.out), "--num_workers", str(workers), *flags]
    return prepare.main(arguments)


def test_complete_copy_gives_all_lists_without_problems(copy, capsys):
    assert run(copy) == 0
    written = {file.stem: file.read_text() for file in copy.out.iterdir()}
    splits = {"train": TRAIN, "val": VAL, "trainval": sorted(TRAIN + VAL), "train_aug": sorted(TRAIN + EXTRA)}
    for split, names in splits.items():
        assert written.pop(split) == "".join(f"{name}\n" for name in names)
        assert written.pop(f"{split}_labels") == "".join(f"{name} 14 11\n" for name in names)
    assert not written
    printed = capsys.readouterr().out
    assert printed.count("sha256 DIFFERS from that of the published list") == 4
    assert "no problems found" in printed


def test_label_file_equals_the_annotations(copy):
    run(copy)
    voc = load("voc12")
    from_xml = labels.reader(replace(voc, root=str(copy.root)), {})
    from_file = labels.from_file(copy.out / "train_aug_labels.txt", len(voc.classes))
    assert all(from_xml(name) == from_file(name) for name in labels.read_split(copy.out / "train_aug.txt"))


def test_published_list_is_recognized(copy, capsys, monkeypatch):
    digest = hashlib.sha256("".join(f"{name}\n" for name in TRAIN).encode()).hexdigest()
    monkeypatch.setitem(prepare.PUBLISHED, "train", (2, digest))
    assert run(copy) == 0
    printed = capsys.readouterr().out
    assert "train.txt: 2 images; sha256 equals that of the published list" in printed
    assert "val.txt: 1 images; sha256 DIFFERS from that of the published list" in printed


def test_crlf_image_sets_give_the_same_list(copy):
    file = copy.root / "ImageSets/Segmentation/train.txt"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert run(copy) == 0
    assert (copy.out / "train.txt").read_bytes() == b"2007_000032\n2007_000039\n"


def test_num_workers_does_not_change_the_output(copy, capsys):
    (copy.root / "JPEGImages/2007_000039.jpg").write_bytes(b"")
    assert run(copy) == 1
    alone = {file.name: file.read_bytes() for file in copy.out.iterdir()}
    assert run(copy, workers=2) == 1
    assert {file.name: file.read_bytes() for file in copy.out.iterdir()} == alone


@pytest.mark.parametrize("emptied", [False, True])
def test_train_aug_is_skipped_without_augmented_masks(copy, capsys, emptied):
    shutil.rmtree(copy.root / "SegmentationClassAug")
    if emptied:
        (copy.root / "SegmentationClassAug").mkdir()
    assert run(copy) == 0
    assert "train_aug cannot be made: no masks in" in capsys.readouterr().err
    assert sorted(file.stem for file in copy.out.glob("*_labels.txt")) == [
        "train_labels", "trainval_labels", "val_labels",
    ]  # fmt: skip


def remove(file):
    file.unlink()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def paint(value, shape=(HEIGHT, WIDTH)):
    return lambda file: Image.fromarray(np.full(shape, value, np.uint8)).save(file)


def text(content):
    return lambda file: file.write_text(content)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("JPEGImages/2007_000039.jpg", remove, "missing image: 1\n    no image 2007_000039"),
        ("JPEGImages/2007_000039.jpg", text("no image"), "bad image: 1"),
        ("Annotations/2007_000039.xml", remove, "missing annotation: 1"),
        ("Annotations/2007_000039.xml", truncate, "bad annotation: 1"),
        ("Annotations/2007_000039.xml", text(XML.replace("dog", "wolf")), "contains the class 'wolf'"),
        ("Annotations/2007_000039.xml", text("<annotation/>"), "2007_000039.xml names no object"),
        (
            "Annotations/2007_000039.xml",
            text(XML.replace("<height>6", "<height>7")),
            "2007_000039: height x width differ: image 6 x 8, annotation 7 x 8, SegmentationClass 6 x 8",
        ),
        ("SegmentationClass/2007_000039.png", remove, "missing mask: 1"),
        ("SegmentationClass/2007_000039.png", truncate, "bad mask: 1"),
        ("SegmentationClass/2007_000039.png", paint(21), "has the value 21, which is not a class"),
        ("SegmentationClassAug/2008_000002.png", paint(0, (8, 6)), "SegmentationClassAug 8 x 6"),
        ("SegmentationClassAug/2007_000033.png", remove, "missing mask: 1"),
        ("ImageSets/Segmentation/val.txt", remove, "missing split: 1"),
        ("ImageSets/Segmentation/train.txt", text("a\na\n"), "train.txt line 2: image a was listed before"),
    ],
)
def test_single_fault_is_reported(copy, capsys, file, damage, message):
    damage(copy.root / file)
    assert run(copy) == 1
    out = capsys.readouterr().out
    assert message in out
    assert "1 problems, all listed in" in out
    assert len((copy.out / "problems.txt").read_text().splitlines()) == 1


def test_label_file_leaves_out_images_without_annotation(copy):
    (copy.root / "Annotations/2007_000039.xml").unlink()
    run(copy)
    assert (copy.out / "train.txt").read_text() == "2007_000032\n2007_000039\n"
    assert (copy.out / "train_labels.txt").read_text() == "2007_000032 14 11\n"


def test_check_images_decodes_all_pixels(copy, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(copy.root / "JPEGImages/2007_000039.jpg", quality=100)
    (copy.root / "JPEGImages/2007_000039.jpg").open("rb+").truncate(700)  # only the header is whole
    assert run(copy) == 0
    assert run(copy, "--check_images") == 1
    assert "bad image: 1" in capsys.readouterr().out
    Image.new("RGB", (WIDTH, HEIGHT)).save(copy.root / "JPEGImages/2007_000039.jpg")
    assert run(copy, "--check_images") == 0
    assert not (copy.out / "problems.txt").exists()


def test_problems_of_one_kind_are_counted(copy, capsys):
    for name in TRAIN + VAL + EXTRA:
        (copy.root / "JPEGImages" / f"{name}.jpg").unlink()
    assert run(copy) == 1
    assert "missing image: 4" in (printed := capsys.readouterr().out)
    assert "... and 1 more" in printed
    assert len((copy.out / "problems.txt").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--root", "{root}/none"], "has no JPEGImages folder"),
        (["--root", "{root}/.."], "has no JPEGImages folder; did you mean --root .*VOC2012"),
        (["--root", "{root}", "--num_workers", "0"], "--num_workers: expected a whole number, 1 or more"),
        ([], "--root"),
        (["--root", "{root}", "--out", "{root}/Annotations/2007_000032.xml/x"], "2007_000032.xml"),
    ],
)
def test_wrong_usage_exits_with_code_2(copy, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        prepare.main([flag.format(root=copy.root) for flag in flags])
    assert stop.value.code == 2
    assert re.search(sentence, capsys.readouterr().err.splitlines()[-1])


# --- VOC 2007 ---------------------------------------------------------------------------------------

LISTS_2007 = {"train": ["000012", "000017"], "val": ["000005"], "test": ["000001", "000002"]}


@pytest.fixture
def copy_2007(tmp_path):
    """A complete copy of a VOC2007 with five images and no masks."""
    root = tmp_path / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, names in LISTS_2007.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            Image.new("RGB", (WIDTH, HEIGHT), "red").save(root / "JPEGImages" / f"{name}.jpg")
            (root / "Annotations" / f"{name}.xml").write_text(XML)
    names = ("car", "person", "car", "aeroplane")
    objects = "".join(f"<object><name>{name}</name></object>" for name in names)
    (root / "Annotations/000001.xml").write_text(f"<annotation>{objects}</annotation>")
    (root / "ImageSets/Main/car_test.txt").write_text("000001  1\n000002 -1\n")
    return SimpleNamespace(root=root, out=tmp_path / "lists")


def test_2007_lists_contain_the_labels(copy_2007, capsys):
    assert run(copy_2007, "--year", "2007", workers=2) == 0
    written = {file.name: file.read_text() for file in copy_2007.out.iterdir()}
    assert written == {
        "2007_train.txt": "000012 14 11\n000017 14 11\n",
        "2007_val.txt": "000005 14 11\n",
        "2007_test.txt": "000001 6 14 0\n000002 14 11\n",
    }
    printed = capsys.readouterr().out
    assert "2007_test.txt: 2 images; differs from the published list, which has 4952 images" in printed


def test_2007_requires_only_one_archive(copy_2007, capsys, monkeypatch):
    monkeypatch.setitem(prepare.PUBLISHED, "2007_test", (2,))
    for split in ("train", "val"):
        (copy_2007.root / "ImageSets/Main" / f"{split}.txt").unlink()
    assert run(copy_2007, "--year", "2007") == 0
    assert [file.name for file in copy_2007.out.iterdir()] == ["2007_test.txt"]
    printed = "".join(capsys.readouterr())
    assert "2007_train is not made: " in printed and "Main/train.txt does not exist" in printed
    assert "another list" not in printed
    (copy_2007.root / "ImageSets/Main/test.txt").unlink()
    with pytest.raises(SystemExit) as stop:
        run(copy_2007, "--year", "2007")
    assert stop.value.code == 2
    assert "has no train.txt, val.txt or test.txt: check --root" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("JPEGImages/000002.jpg", remove, "missing image: 1"),
        ("Annotations/000002.xml", remove, "missing annotation: 1"),
        ("Annotations/000002.xml", text(XML.replace("dog", "wolf")), "contains the class 'wolf'"),
        ("ImageSets/Main/val.txt", text("000005\n000005\n"), "image 000005 was listed before"),
    ],
)
def test_single_fault_is_reported_for_2007(copy_2007, capsys, file, damage, message):
    copy_2007.out.mkdir()
    (copy_2007.out / "problems.txt").write_text("of 2012\n")
    damage(copy_2007.root / file)
    assert run(copy_2007, "--year", "2007") == 1
    assert message in capsys.readouterr().out
    assert len((copy_2007.out / "2007_problems.txt").read_text().splitlines()) == 1
    assert (copy_2007.out / "problems.txt").read_text() == "of 2012\n"
    listed = labels.read_split(copy_2007.out / "2007_test.txt")
    assert ("000002" in listed) == ("Annotations" not in file) and "000001" in listed


def test_2007_error_suggests_the_inner_folder(copy_2007, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--root", str(copy_2007.root.parent), "--year", "2007"])
    assert re.search("is not a copy of VOC2007: .*; did you mean --root .*VOC2007", capsys.readouterr().err)


@pytest.mark.parametrize("name", [b"2008_000002 (1)", b"caf\xe9", b"x.jpg"])
def test_masks_whose_names_a_list_cannot_contain_are_problems(copy, capsys, name):
    name = os.fsdecode(name)
    shutil.copy(copy.root / "SegmentationClassAug" / f"{EXTRA[0]}.png",
                copy.root / "SegmentationClassAug" / f"{name}.png")
    assert run(copy) == 1
    assert "bad name: 1\n    image name " in capsys.readouterr().out
    assert "bad name: image name" in (copy.out / "problems.txt").read_text()
    assert labels.read_split(copy.out / "train_aug.txt").keys() == {*TRAIN, *EXTRA}
