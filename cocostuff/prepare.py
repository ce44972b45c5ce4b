"""python -m cocostuff.prepare --root COCO: check a copy of COCO-Stuff val, make its masks, write its split.

Expects ROOT/JPEGImages/val2017 and the published masks of things and stuff, ROOT/stuffthingmaps/val2017,
which number the classes 0..181 and void 255. ROOT/SegmentationClassStuff/val2017 receives masks that number
them 0..170, which every other command reads. Making them can be interrupted and goes on where it stopped;
existing masks are compared, and never changed.

Writes to --out: val.txt, lines `name index index ...` with class indices 0..170, for the 4,172 images that
COCO-Stuff is evaluated on. The labels are the values of the masks, or those of a public split file
(--split_182, whose labels count 0..181), which then also says which images there are.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

from cocostuff import BENCHMARK, CATEGORY_IDS, CLASS_INDEX, CLASSES
from segmentation import prepare as shared
from segmentation.benchmark import IGNORE
from segmentation.labels import Split, mask_labels, read_split
from segmentation.masks import read_mask, write_mask

PUBLISHED = Path(__file__).with_name("val_ids.txt")  # the rule that selects these images is not documented
VALUES = 182  # of public masks and split files: official id - 1
TO_CLASS = np.full(256, IGNORE, np.uint8)
TO_CLASS[np.array(CATEGORY_IDS) - 1] = np.arange(len(CATEGORY_IDS))


def published_names() -> list[str]:
    """Return the 4,172 images of val2017 that COCO-Stuff is evaluated on, by ascending id."""
    return [f"{int(line):012d}" for line in PUBLISHED.read_text().split()]


def convert(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return a public mask with the class indices of this project.

    Args:
        mask: (H, W) uint8, official id - 1, that is 0..181; 255 is void.

    Returns:
        (H, W) uint8, 0..170, 255 where there is no class; and the values, ascending, that are neither void
        nor a class.
    """
    values = np.flatnonzero(np.bincount(mask.ravel())).tolist()
    return TO_CLASS[mask], [value for value in values if value != IGNORE and TO_CLASS[value] == IGNORE]


def convert_split(split: Split, file: Path) -> tuple[Split, list[shared.Problem]]:
    """Return a public split with the class indices of this project, and its labels that are no class."""
    problems = []
    converted: Split = {}
    for name, labels in split.items():
        converted[name] = [CLASS_INDEX[label + 1] for label in labels if label + 1 in CLASS_INDEX]
        for label in labels:
            if label + 1 not in CLASS_INDEX:
                sentence = f"{file}: image {name} has the label {label}, which is left out"
                problems.append(shared.Problem("unknown class", sentence))
    return converted, problems


def inspect(images: Path, source: Path | None, target: Path, decode: bool, name: str) -> shared.Inspection:
    """Return what an image and its public mask hold, and write the converted mask if it does not exist.

    Args:
        images: folder of the images.
        source: folder of the public masks; None: there is none.
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
            sentence = f"mask {file} holds the value {value}, which stands for no class: it becomes {IGNORE}"
            inspection.problems.append(shared.Problem("unknown class", sentence))
        inspection.labels = mask_labels(mask, False, len(CLASSES), file)
        if converted.is_file() and not np.array_equal(read_mask(converted), mask):
            raise ValueError(f"mask {converted} is not what {file} gives: delete it to have it made anew")
    if inspection.labels is not None and not converted.is_file():
        write_mask(converted, mask, BENCHMARK.palette)  # outside: a file that cannot be written ends the run
    return inspection


def prepare(args: argparse.Namespace) -> int:
    """Check the copy of COCO-Stuff, make its masks and write `val.txt`; return the exit code.

    Args:
        args: see `main`; without `stuffthingmaps` no masks are made, without `split_182` the images are the
            published ones, and their labels those of the masks.

    Raises:
        OSError, ValueError: the split file cannot be read, or nothing can be written.
    """
    problems: list[shared.Problem] = []
    split: Split = {}
    names = published_names()
    if args.split_182:
        split, problems = convert_split(read_split(args.split_182, VALUES), args.split_182)
        if split.keys() != set(names):
            print(f"{args.split_182} lists other images than the {len(names)} published ones")
        names = list(split)
    target = args.root / BENCHMARK.mask_dir
    look = partial(inspect, args.root / BENCHMARK.image_dir, args.stuffthingmaps, target, args.check_images)
    labels = shared.inspect_all(look, names, args.num_workers, "checking val", problems)
    if not args.split_182:
        split = {name: class_ids for name, class_ids in labels.items() if class_ids}
    if args.stuffthingmaps:
        print(f"masks of {len(CLASSES)} classes are in {target}")
    if missing := len(names) - len(split):
        print(f"{missing} images have no readable mask, or no class in it, and are left out of the list")
    shared.write_split(args.out / "val.txt", split)
    return shared.report(problems, args.out / "problems.txt")


def main(arguments: list[str] | None = None) -> int:
    """Parse flags, prepare; return the exit code (wrong usage exits with 2 at once)."""
    parser = shared.make_parser("cocostuff", __doc__)
    flag = parser.add_argument
    flag("--stuffthingmaps", type=Path, metavar="DIR",
         help="folder of the published masks, <image>.png (ROOT/stuffthingmaps/val2017)")
    flag("--split_182", type=Path, metavar="FILE",
         help="a public split file: its images and, after conversion, its labels are taken")
    args = parser.parse_args(arguments)
    if not (args.root / BENCHMARK.image_dir).is_dir():
        parser.error(f"--root {args.root} is no copy of COCO 2017: it has no {BENCHMARK.image_dir} folder")
    if args.split_182 and args.split_182.resolve() == (args.out / "val.txt").resolve():
        parser.error(f"--split_182 {args.split_182} is where the converted list goes: give it another name")
    source = args.stuffthingmaps or args.root / "stuffthingmaps" / "val2017"
    if not source.is_dir():
        if args.stuffthingmaps or not args.split_182:
            parser.error(f"there is no folder {source}: unpack the published masks there")
        print(f"no masks are made, which only evaluation needs: there is no folder {source}")
        source = None
    elif source.resolve() == (args.root / BENCHMARK.mask_dir).resolve():
        parser.error(f"--stuffthingmaps {source} is the folder of converted masks: give the published ones")
    args.stuffthingmaps = source
    return shared.run(parser, prepare, args)


if __name__ == "__main__":
    sys.exit(main())
