"""Write the drawn world as a data set in VOC layout: `python -m shapes.draw --root output/shapes`.

    JPEGImages/*.jpg  Annotations/*.xml  SegmentationClass/*.png  SegmentationClassAug/*.png
    ImageSets/Segmentation/{train,val,trainval}.txt   one name per line
    ImageSets/Captions/{train,val}.txt                name, tab, caption

The same arguments give the same bytes. Train and val never share an image, for any seeds.
"""
import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from lxml import etree
from lxml.builder import E
from PIL import Image
from tqdm import tqdm

from foundation.cli import Parser
from foundation.files import write_file
from foundation.logs import no_progress
from segmentation.benchmark import voc_palette
from segmentation.masks import write_mask
from shapes.world import CLASSES, DIFFICULT_BELOW, Drawn, Scene, draw, generator

MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
JPEG = {"quality": 95, "subsampling": 0}  # color at full resolution keeps object edges sharp


def annotation(name: str, scene: Scene) -> bytes:
    """Return the VOC XML of a scene. Box coordinates start at 1 and include both ends, as in VOC."""
    height, width = scene.mask.shape
    root = E.annotation(
        E.folder("shapes"),
        E.filename(f"{name}.jpg"),
        E.size(E.width(str(width)), E.height(str(height)), E.depth("3")),
        E.segmented("1"),
        *map(_object, scene.objects),
    )
    return etree.tostring(root, pretty_print=True)


def _object(drawn: Drawn) -> etree._Element:
    x0, y0, x1, y1 = drawn.box
    return E.object(
        E.name(CLASSES[drawn.label].name),
        E.difficult(str(int(drawn.visible < DIFFICULT_BELOW))),
        E.bndbox(E.xmin(str(x0 + 1)), E.ymin(str(y0 + 1)), E.xmax(str(x1)), E.ymax(str(y1))),
    )


def image_size(sides: tuple[int, int], seed: int, index: int, stream: str) -> tuple[int, int]:
    """Return the (H, W) of one image: both are uniform in the range `sides`, ends included."""
    # A jumped copy of the scene's generator makes sizes and contents independent.
    rng = np.random.Generator(generator(seed, index, stream).bit_generator.jumped())
    height, width = rng.integers(sides[0], sides[1] + 1, 2)
    return int(height), int(width)


def write(root: Path, train: int, val: int, sides: tuple[int, int] = (96, 160), seed: int = 0) -> None:
    """Draw `train` + `val` images into `root`; files of the same names are replaced.

    The split files are written last: if they exist, the data set is complete.

    Args:
        sides: shortest and longest image side in pixels.
    """
    for folder in ("JPEGImages", "Annotations", *MASK_FOLDERS):
        (root / folder).mkdir(parents=True, exist_ok=True)
    captions: dict[str, dict[str, str]] = {}  # split -> image name -> caption
    for split, count in (("train", train), ("val", val)):
        captions[split] = {}
        for index in tqdm(range(count), desc=split, disable=no_progress()):
            name = f"shapes_{split}_{index:06d}"
            scene = draw(seed, index, image_size(sides, seed, index, split), split)
            Image.fromarray(scene.image).save(root / "JPEGImages" / f"{name}.jpg", **JPEG)
            (root / "Annotations" / f"{name}.xml").write_bytes(annotation(name, scene))
            for folder in MASK_FOLDERS:
                write_mask(root / folder / f"{name}.png", scene.mask, voc_palette())
            captions[split][name] = scene.caption
    sets = root / "ImageSets"
    for split, texts in captions.items():
        _write_lines(sets / "Captions" / f"{split}.txt", (f"{name}\t{texts[name]}" for name in texts))
        _write_lines(sets / "Segmentation" / f"{split}.txt", texts)
    _write_lines(sets / "Segmentation" / "trainval.txt", sorted(captions["train"] | captions["val"]))


def _write_lines(file: Path, lines: Iterable[str]) -> None:
    write_file(file, "".join(f"{line}\n" for line in lines))


def _sides(text: str) -> tuple[int, int]:
    try:
        low, high = (int(side) for side in (text.split("-") * 2)[:2])
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of image sides (96-160) or one side (64)")
    return low, high


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("output/shapes"), help="folder to draw into")
    parser.add_argument("--train", type=int, default=200, help="images of the train split")
    parser.add_argument("--val", type=int, default=60, help="images of the val split")
    parser.add_argument("--size", type=_sides, default="96-160", help="range of both sides, such as 96-160")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the images")
    args = parser.parse_args()
    try:
        write(args.root, args.train, args.val, args.size, args.seed)
    except OSError as error:
        parser.error(str(error))
    print(f"drew {args.train} train and {args.val} val images in {args.root}")


if __name__ == "__main__":
    main()
