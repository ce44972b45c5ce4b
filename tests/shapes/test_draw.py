"""The drawn data set: VOC layout that this project's readers accept, and the same bytes each time."""
import argparse
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from lxml import etree

from segmentation.images import read_rgb
from segmentation.labels import read_split, reader
from segmentation.masks import read_mask
from shapes import BENCHMARK
from shapes.draw import _sides, image_size, write
from shapes.world import draw


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write(root, train=6, val=3, sides=(30, 61), seed=4)
    return root


def files(root):
    paths = sorted(file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): file.read_bytes() for file in paths}


def test_data_set_has_the_voc_layout(world):
    sets = world / "ImageSets" / "Segmentation"
    train, val = list(read_split(sets / "train.txt")), list(read_split(sets / "val.txt"))
    assert (len(train), len(val)) == (6, 3)
    assert not set(train) & set(val)
    assert list(read_split(sets / "trainval.txt")) == sorted(train + val)
    for split, names in (("train", train), ("val", val)):
        lines = (world / "ImageSets" / "Captions" / f"{split}.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == names
        assert all(line.split("\t")[1] for line in lines)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug"):
        assert sorted(file.stem for file in (world / folder).iterdir()) == sorted(train + val)


def test_files_match_the_scene(world):
    labels = reader(replace(BENCHMARK, root=str(world)), {})
    for split in ("train", "val"):
        for index in range(3):
            name = f"shapes_{split}_{index:06d}"
            scene = draw(4, index, image_size((30, 61), 4, index, split), split)
            image = read_rgb(world / "JPEGImages" / f"{name}.jpg")
            assert image.shape == scene.image.shape
            assert np.abs(image.astype(int) - scene.image).mean() < 6, "the JPEG is close to the drawn image"
            for folder in ("SegmentationClass", "SegmentationClassAug"):
                assert (read_mask(world / folder / f"{name}.png") == scene.mask).all()
            assert labels(name) == scene.labels
            size = etree.parse(world / "Annotations" / f"{name}.xml").find("size")
            assert (int(size.findtext("height")), int(size.findtext("width"))) == scene.mask.shape
            for item in etree.parse(world / "Annotations" / f"{name}.xml").iterfind("object"):
                x0, y0, x1, y1 = (int(value.text) for value in item.find("bndbox"))
                k = BENCHMARK.classes.index(item.findtext("name"))
                assert (scene.mask[y0 - 1 : y1, x0 - 1 : x1] == k + 1).any()


def test_same_seed_gives_same_bytes_and_seeds_share_no_image(world, tmp_path):
    command = [sys.executable, "-m", "shapes.draw", "--train", "6", "--val", "3", "--size", "30-61"]
    subprocess.run([*command, "--seed", "4", "--root", str(tmp_path / "a")], check=True, capture_output=True)
    assert files(tmp_path / "a") == files(world)
    write(tmp_path / "b", train=6, val=3, sides=(30, 61), seed=5)
    first, second = ({file.read_bytes() for file in root.rglob("*.jpg")} for root in (world, tmp_path / "b"))
    assert not first & second


def test_sizes_vary_and_stay_in_range():
    sizes = [image_size((96, 160), 0, index, "train") for index in range(50)]
    assert all(96 <= side <= 160 for size in sizes for side in size)
    assert len(set(sizes)) > 40
    assert image_size((64, 64), 0, 0, "val") == (64, 64)


@pytest.mark.parametrize(("text", "sides"), [("96-160", (96, 160)), ("64", (64, 64))])
def test_size_flag_is_a_range_or_one_side(text, sides):
    assert _sides(text) == sides


@pytest.mark.parametrize("text", ["", "0", "9-3", "a-b", "96x160"])
def test_invalid_size_flag_is_an_error(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a range of image sides"):
        _sides(text)
