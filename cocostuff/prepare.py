"""python -m cocostuff.prepare --root COCO: check a copy of COCO-Stuff val, make its masks, write its split.

Expects ROOT/JPEGImages/val2017 and the published masks of things and stuff, ROOT/stuffthingmaps/val2017,
with class values 0..181 and 255 for void. It writes masks with class values 0..170, which all other commands
read, to ROOT/SegmentationClassStuff/val2017. After an interruption, the same command makes the missing masks.
Existing masks are compared with the published ones and never changed.

Writes to --out: val.txt, lines `name index index ...` with class indices 0..170, for the 4,172 images on
which COCO-Stuff is evaluated. The labels come from the masks. With --split_182, a published split file with
labels 0..181, both the images and the labels come from that file.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

from cocostuff import BENCHMARK, CATEGORY_IDS, CLASS_INDEX, CLASSES
from foundation.logs import log
from segmentation import prepare as shared
from segmentation.benchmark import IGNORE
from segmentation.labels import Split, mask_labels, read_split
from segmentation.masks import read_mask, write_mask

PUBLISHED = Path(__file__).with_name("val_ids.txt")  # how they were selected is not documented
VALUES = 182  # class values in published masks and split files: official id - 1
TO_CLASS = np.full(256, IGNORE, np.uint8)
TO_CLASS[np.array(CATEGORY_IDS) - 1] = np.arange(len(CATEGORY_IDS))


def published_names() -> list[str]:
    """Return the names of the 4,172 images of val2017 on which COCO-Stuff is evaluated, by ascending id."""
    return [f"{int(line):012d}" for line in PUBLISHED.read_text().split()]


def convert(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return a published mask with the class indices of this project, and its unknown values.

    Args:
        mask: (H, W) uint8, official id - 1, that is 0..181; 255 is void.

    Returns:
        (H, W) uint8, 0..170, and 255 for all other values; and, ascending, the values of `mask` that are
        neither void nor a class.
    """
    values = np.flatnonzero(np.bincount(mask.ravel())).tolist()
    return TO_CLASS[mask], [value for value in values if value != IGNORE and TO_CLASS[value] == IGNORE]


def convert_split(split: Split, file: Path) -> tuple[Split, list[shared.Problem]]:
    """Return a published split with the class indices of this project, and a problem per unknown label."""
    problems = []
    converted: Split = {}
    for name, labels in split.items():
        converted[name] = [CLASS_INDEX[label + 1] for label in labels if label + 1 in CLASS_INDEX]
        for label in labels:
            if label + 1 not in CLASS_INDEX:
                sentence = f"{file}: image {name} has the label {label}, which is not a class and is left out"
                problems.append(shared.Problem("unknown class", sentence))
    return converted, problems


def inspect(images: Path, source: Path | None, target: Path, decode: bool, name: str) -> shared.Inspection:
    """Inspect an image and its published mask, and write the converted mask if it does not exist.

    Args:
        images: folder of the images.
        source: folder of the published masks; None inspects the image only.
        target: folder of the converted masks.
    """
    inspection = shared.inspect_image(images, name, decode)
    if source is None:
        return inspection
    with shared.collecting(inspection.problems, "mask"):
        file, converted = source / f"{name}.png", target / f"{name}.png"
        mask, unknown = convert(read_mask(file))
        inspection.sizes["mask"] = mask.shape
        for value in unknown:
            sentence = f"mask {file} has the value {value}, which is not a class: it becomes {IGNORE}"
            inspection.problems.append(shared.Problem("unknown class", sentence))
        inspection.labels = mask_labels(mask, False, len(CLASSES), file)
        if converted.is_file() and not np.array_equal(read_mask(converted), mask):
            raise ValueError(
                f"converted mask {converted} does not match {file}: delete the converted mask to redo it"
            )
    if inspection.labels is not None and not converted.is_file():
        write_mask(converted, mask, BENCHMARK.palette)  # not a `Problem`: a failed write ends the run
    return inspection


def prepare(args: argparse.Namespace) -> int:
    """Check the copy of COCO-Stuff, make its masks and write `val.txt`; return the exit code.

    Args:
        args: see `main`. If `stuffthingmaps` is None, no masks are made. If `split_182` is None, the images
            are the published ones, and the labels come from the masks.

    Raises:
        OSError, ValueError: the split file cannot be read, or an output cannot be written.
    """
    problems: list[shared.Problem] = []
    split: Split = {}
    names = published_names()
    if args.split_182:
        split, problems = convert_split(read_split(args.split_182, VALUES), args.split_182)
        if split.keys() != set(names):
            log.warning("%s lists other images than the %d published ones", args.split_182, len(names))
        names = list(split)
    target = args.root / BENCHMARK.mask_dir
    images, source = args.root / BENCHMARK.image_dir, args.stuffthingmaps
    inspect_name = partial(inspect, images, source, target, args.check_images)
    labels = shared.inspect_all(inspect_name, names, args.num_workers, "checking val", problems)
    if not args.split_182:
        split = {name: class_ids for name, class_ids in labels.items() if class_ids}
    if args.stuffthingmaps:
        print(f"masks of {len(CLASSES)} classes are in {target}")
    if missing := len(names) - len(split):
        log.warning("%d images have no readable mask, or a mask without classes, and are left out", missing)
    shared.write_split(args.out / "val.txt", split)
    return shared.report(problems, args.out / "problems.txt")


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags, prepare the data, return the exit code; wrong usage exits with code 2."""
    parser = shared.make_parser("cocostuff", __doc__)
    flag = parser.add_argument
    flag("--stuffthingmaps", type=Path, metavar="DIR",
         help="folder of the published masks, <image>.png (ROOT/stuffthingmaps/val2017)")
    flag("--split_182", type=Path, metavar="FILE",
         help="published split file with labels 0..181: source of the images and, converted, of the labels")
    args = parser.parse_args(arguments)
    if not (args.root / BENCHMARK.image_dir).is_dir():
        parser.error(f"--root {args.root} is not a copy of COCO 2017: it has no {BENCHMARK.image_dir} folder")
    if args.split_182 and args.split_182.resolve() == (args.out / "val.txt").resolve():
        parser.error(f"--split_182 {args.split_182} is also the output file: rename it or change --out")
    source = args.stuffthingmaps or args.root / "stuffthingmaps" / "val2017"
    if not source.is_dir():
        if args.stuffthingmaps or not args.split_182:
            parser.error(f"there is no folder {source}: unpack the published masks there")
        log.warning("no masks are made (only evaluation needs them): there is no folder %s", source)
        source = None
    elif source.resolve() == (args.root / BENCHMARK.mask_dir).resolve():
        parser.error(f"--stuffthingmaps {source} contains the converted masks: give the published ones")
    args.stuffthingmaps = source
    return shared.run(parser, prepare, args)


if __name__ == "__main__":
    sys.exit(main())
