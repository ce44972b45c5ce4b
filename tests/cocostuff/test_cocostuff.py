"""COCO-Stuff: the benchmark's classes against the published lists, and `prepare` on small copies."""
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cocostuff import BENCHMARK, CATEGORY_IDS, CLASS_INDEX, UNUSED_IDS, prepare
from segmentation import labels
from segmentation.benchmark import load
from segmentation.masks import read_mask
from tests.conftest import golden

HEIGHT, WIDTH = 6, 8
NAMES = ["000000000139", "000000000632", "000000000724"]
STUFF = {NAMES[0]: [0, 181], NAMES[1]: [12, 91], NAMES[2]: [60]}  # official id - 1
LABELS = {NAMES[0]: [0, 170], NAMES[1]: [11, 80], NAMES[2]: [55]}


@pytest.fixture(scope="module")
def published():
    return golden("classes.json", "tagclip")


def test_classes_and_groups_match_the_published_lists(published):
    classes = published["coco_stuff"]
    stuff = load("cocostuff")
    assert stuff is BENCHMARK and stuff.channels == 171 and not stuff.has_background
    assert stuff.classes == stuff.tag_names == [entry["name"] for entry in classes]
    assert stuff.prompts == [entry["cam_name"] for entry in classes]
    assert stuff.groups == [entry["coarse"] for entry in classes]
    assert stuff.group_names == published["coco_stuff_coarse"]
    assert (stuff.backgrounds, stuff.box_threshold) == (["background"], 0.7)


def test_category_ids_match_the_published_lists(published):
    assert [entry["id"] for entry in published["coco_stuff"]] == CATEGORY_IDS
    assert sorted(UNUSED_IDS) == published["coco_stuff_removed_ids"]
    assert all(CLASS_INDEX[category] == index for index, category in enumerate(CATEGORY_IDS))
    groups = published["coco_stuff_182_to_27"]
    assert [groups[category - 1] for category in CATEGORY_IDS] == BENCHMARK.groups


def test_val_ids_match_the_published_list():
    ids = golden("cocostuff_val_ids", "tagclip")["ids"]
    assert [int(name) for name in prepare.published_names()] == ids.tolist()
    assert prepare.published_names()[:2] == NAMES[:2]


def test_convert_maps_all_256_values():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    mask, unknown = prepare.convert(values)
    assert mask.dtype == np.uint8 and mask.shape == (16, 16)
    for value, converted in zip(values.ravel().tolist(), mask.ravel().tolist(), strict=True):
        assert converted == CLASS_INDEX.get(value + 1, 255)
    assert unknown == [*sorted(i - 1 for i in UNUSED_IDS), *range(182, 255)]


# --- prepare ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A COCO-Stuff of three images; `.made` is the folder of the converted masks."""
    root = tmp_path / "COCO"
    images, source = root / "JPEGImages" / "val2017", root / "stuffthingmaps" / "val2017"
    for folder in (images, source):
        folder.mkdir(parents=True)
    for name, values in STUFF.items():
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / f"{name}.jpg")
        mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
        for row, value in enumerate(values):
            mask[row] = value
        Image.fromarray(mask).save(source / f"{name}.png")
    ids = tmp_path / "val_ids.txt"
    ids.write_text("".join(f"{int(name)}\n" for name in NAMES))
    monkeypatch.setattr(prepare, "PUBLISHED", ids)
    return SimpleNamespace(
        root=root, images=images, source=source, made=root / BENCHMARK.mask_dir, out=tmp_path / "lists"
    )


def run(copy, *flags, workers=1):
    arguments = ["--root", copy.root, "--out", copy.out, "--num_workers", workers, *flags]
    return prepare.main([str(argument) for argument in arguments])


def lines(table):
    return "".join(" ".join([name, *map(str, class_ids)]) + "\n" for name, class_ids in table.items())


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_complete_copy_gives_masks_and_list(copy, capsys):
    before = content(copy.source)
    assert run(copy) == 0
    assert (copy.out / "val.txt").read_text() == lines(LABELS)
    assert sorted(content(copy.made)) == [f"{name}.png" for name in NAMES]
    mask = read_mask(copy.made / f"{NAMES[0]}.png")
    assert mask[:2].tolist() == [[0] * WIDTH, [170] * WIDTH] and (mask[2:] == 255).all()
    assert content(copy.source) == before
    from_masks = labels.reader(replace(BENCHMARK, labels="masks", root=str(copy.root)), {})
    assert {name: from_masks(name) for name in NAMES} == labels.read_split(copy.out / "val.txt", 171)
    assert "no problems found" in capsys.readouterr().out


def test_second_run_makes_only_missing_masks(copy):
    run(copy)
    whole = content(copy.made)
    (copy.made / f"{NAMES[0]}.png").unlink()
    kept = copy.made / f"{NAMES[1]}.png"
    os.utime(kept, (1, 1))
    assert run(copy, workers=2) == 0
    assert kept.stat().st_mtime == 1
    assert content(copy.made) == whole


def test_existing_masks_are_compared_and_not_changed(copy, capsys):
    copy.made.mkdir(parents=True)
    mine = copy.made / f"{NAMES[1]}.png"
    Image.new("L", (WIDTH, HEIGHT), 3).save(mine)
    before = mine.read_bytes()
    assert run(copy) == 1
    assert mine.read_bytes() == before
    assert f"converted mask {mine} does not match" in capsys.readouterr().out
    mine.unlink()
    assert run(copy) == 0


def test_published_split_file_is_converted(copy, tmp_path, capsys):
    public = tmp_path / "public.txt"
    public.write_text(lines({NAMES[2]: [181, 60], NAMES[0]: [0]}))
    assert run(copy, "--split_182", public) == 0
    assert (copy.out / "val.txt").read_text() == lines({NAMES[2]: [170, 55], NAMES[0]: [0]})
    assert sorted(content(copy.made)) == [f"{NAMES[0]}.png", f"{NAMES[2]}.png"]
    assert "public.txt lists other images than the 3 published ones" in capsys.readouterr().err


def test_published_split_file_requires_no_masks(copy, tmp_path, capsys):
    for file in copy.source.iterdir():
        file.unlink()
    copy.source.rmdir()
    public = tmp_path / "public.txt"
    public.write_text(lines(STUFF))
    assert run(copy, "--split_182", public) == 0
    assert (copy.out / "val.txt").read_text() == lines(LABELS)
    assert not copy.made.exists()
    printed = "".join(capsys.readouterr())
    assert "no masks are made" in printed and "lists other images" not in printed


def test_unused_label_of_the_split_file_is_reported(copy, tmp_path, capsys):
    public = tmp_path / "public.txt"
    public.write_text(lines(STUFF | {NAMES[0]: [11, 0]}))
    assert run(copy, "--split_182", public) == 1
    assert (copy.out / "val.txt").read_text() == lines(LABELS | {NAMES[0]: [0]})
    printed = "".join(capsys.readouterr())
    assert f"image {NAMES[0]} has the label 11, which is not a class and is left out" in printed


def paint(value, shape=(HEIGHT, WIDTH)):
    return lambda file: Image.fromarray(np.full(shape, value, np.uint8)).save(file)


def cut(file):
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    ("file", "damage", "message", "left_out"),
    [
        ("JPEGImages/val2017/{}.jpg", Path.unlink, "missing image: 1", False),
        ("JPEGImages/val2017/{}.jpg", cut, "bad image: 1", False),
        ("stuffthingmaps/val2017/{}.png", Path.unlink, "missing mask: 1", True),
        ("stuffthingmaps/val2017/{}.png", cut, "bad mask: 1", True),
        ("stuffthingmaps/val2017/{}.png", paint(44), "has the value 44, which is not a class", True),
        ("stuffthingmaps/val2017/{}.png", paint(182), "has the value 182, which is not a class", True),
        ("stuffthingmaps/val2017/{}.png", paint(12, (5, 5)), "differ: image 6 x 8, mask 5 x 5", False),
    ],
)
def test_single_fault_is_reported(copy, capsys, file, damage, message, left_out):
    damage(copy.root / file.format(NAMES[1]))
    for _ in range(2):  # the masks exist at the second run
        assert run(copy) == 1
        out = "".join(capsys.readouterr())
        assert message in out and "1 problems, all listed in" in out
        assert NAMES[1] in (copy.out / "problems.txt").read_text()
        listed = labels.read_split(copy.out / "val.txt")
        assert (NAMES[1] not in listed) == left_out == ("1 images have no readable mask" in out)
        assert listed[NAMES[0]] == LABELS[NAMES[0]]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--root", "{root}/none"], "has no JPEGImages/val2017 folder"),
        (["--stuffthingmaps", "{root}/none"], "there is no folder .*none: unpack the published masks"),
        (["--stuffthingmaps", "{made}"], "contains the converted masks"),
        (["--split_182", "{root}/none.txt"], r"none\.txt does not exist"),
        (["--split_182", "{root}/high.txt"], "class index 182 is out of range, expected 0 to 181"),
        (["--out", "{root}/high.txt/x"], r"high\.txt"),
        (["--out", "{root}", "--split_182", "{root}/val.txt"], "is also the output file: rename it or"),
    ],
)
def test_wrong_usage_exits_with_code_2(copy, capsys, flags, sentence):
    (copy.root / "high.txt").write_text(f"{NAMES[0]} 182\n")
    copy.made.mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        run(copy, *(flag.format(root=copy.root, made=copy.made) for flag in flags))
    assert stop.value.code == 2
    assert re.search(sentence, capsys.readouterr().err.splitlines()[-1])


def test_missing_masks_are_an_error_without_a_split_file(copy, capsys):
    copy.source.rename(copy.root / "elsewhere")
    with pytest.raises(SystemExit):
        run(copy)
    assert "unpack the published masks there" in capsys.readouterr().err
    assert run(copy, "--stuffthingmaps", copy.root / "elsewhere") == 0
    assert (copy.out / "val.txt").read_text() == lines(LABELS)
