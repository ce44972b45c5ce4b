"""Write the drawn world as a data set in VOC layout: `python -m shapes.draw --root output/shapes`.

    JPEGImages/*.jpg  Annotations/*.xml  SegmentationClass/*.png  SegmentationClassAug/*.png
    ImageSets/Segmentation/{train,val,trainval}.txt   one id per line
    ImageSets/Captions/{train,val}.txt                id, tab, caption

The same arguments give the same bytes. Images of train and val never meet, whatever the seeds.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from lxml import etree
from PIL import Image
from tqdm import tqdm

from common.files import replacing
from segmentation.benchmark import voc_palette
from segmentation.masks import write_mask
from shapes.world import CLASSES, DIFFICULT_BELOW, Scene, draw, generator

SPLITS = ("train", "val")
JPEG = {"quality": 95, "subsampling": 0}  # full-resolution colour keeps object edges crisp


def annotation(name: str, scene: Scene) -> bytes:
    """The VOC XML of a scene. Boxes count pixels from 1, ends included, as VOC's do."""
    height, width = scene.mask.shape
    root = etree.Element("annotation")

    def add(parent, tag, text=None):
        child = etree.SubElement(parent, tag)
        child.text = None if text is None else str(text)
        return child

    add(root, "folder", "shapes")
    add(root, "filename", f"{name}.jpg")
    size = add(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        add(size, tag, value)
    add(root, "segmented", 1)
    for drawn in scene.objects:
        item = add(root, "object")
        add(item, "name", CLASSES[drawn.label].name)
        add(item, "difficult", int(drawn.visible < DIFFICULT_BELOW))
        box = add(item, "bndbox")
        x0, y0, x1, y1 = drawn.box
        for tag, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            add(box, tag, value)
    return etree.tostring(root, pretty_print=True)


def image_size(sides: tuple[int, int], seed: int, index: int, stream: str) -> tuple[int, int]:
    """(H, W) of one image, each drawn evenly from the range `sides`, ends included."""
    # A jumped copy of the scene's own random numbers, so that sizes and contents are independent.
    rng = np.random.Generator(generator(seed, index, stream).bit_generator.jumped())
    height, width = rng.integers(sides[0], sides[1] + 1, 2)
    return int(height), int(width)


def write(root: Path, train: int, val: int, sides: tuple[int, int] = (96, 160), seed: int = 0) -> None:
    """Draw `train` + `val` images into `root`, replacing files of the same names.

    The split files come last, each written whole, so that a data set with split files is complete.

    Args:
        sides: shortest and longest image side in pixels.
    """
    folders = {
        folder: root / folder
        for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug")
    }
    lists = {folder: root / "ImageSets" / folder for folder in ("Segmentation", "Captions")}
    for folder in (*folders.values(), *lists.values()):
        folder.mkdir(parents=True, exist_ok=True)
    palette = voc_palette()
    names: dict[str, list[str]] = {}
    captions: dict[str, list[str]] = {}
    for split, count in zip(SPLITS, (train, val), strict=True):
        names[split] = [f"shapes_{split}_{index:06d}" for index in range(count)]
        captions[split] = []
        for index, name in enumerate(tqdm(names[split], desc=split, disable=not sys.stderr.isatty())):
            scene = draw(seed, index, image_size(sides, seed, index, split), split)
            Image.fromarray(scene.image).save(folders["JPEGImages"] / f"{name}.jpg", **JPEG)
            (folders["Annotations"] / f"{name}.xml").write_bytes(annotation(name, scene))
            for folder in ("SegmentationClass", "SegmentationClassAug"):
                write_mask(folders[folder] / f"{name}.png", scene.mask, palette)
            captions[split].append(f"{name}\t{scene.caption}")
    for split in SPLITS:
        _write_lines(lists["Captions"] / f"{split}.txt", captions[split])
        _write_lines(lists["Segmentation"] / f"{split}.txt", names[split])
    _write_lines(lists["Segmentation"] / "trainval.txt", sorted(names["train"] + names["val"]))


def _write_lines(file: Path, lines: list[str]) -> None:
    with replacing(file) as stream:
        stream.write("".join(f"{line}\n" for line in lines).encode())


def _sides(text: str) -> tuple[int, int]:
    try:
        low, high = (int(side) for side in (text.split("-") * 2)[:2])
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of image sides such as 96-160, or one side")
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("output/shapes"), help="folder to draw into")
    parser.add_argument("--train", type=int, default=200, help="images of the train split")
    parser.add_argument("--val", type=int, default=60, help="images of the val split")
    parser.add_argument("--size", type=_sides, default=(96, 160), help="range of both sides, such as 96-160")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write(args.root, args.train, args.val, args.size, args.seed)
    except OSError as error:
        parser.error(str(error))
    print(f"drew {args.train} train and {args.val} val images in {args.root}")


if __name__ == "__main__":
    main()
