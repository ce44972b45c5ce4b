"""python -m coco14.prepare --root COCO: check a copy of COCO, write its splits, make its masks.

Expects ROOT/JPEGImages/{train2014,val2014} and either masks ROOT/SegmentationClass/<image>.png
(0 = background, class index + 1, 255 = ignore) or the instances JSON (--annotations), from which the
masks are then made. Making them can be interrupted and goes on where it stopped. Masks that were there
before are left as they are.

Writes to --out: {train,val}.txt, lines `name index index ...` with class indices 0..79. The labels come
from the values of the masks or from the JSON (--labels). The published lists of 2014 appear to come from
masks: labels of the JSON name classes that larger objects hide there, so expect another sha256.

With --year 2017 it expects ROOT/JPEGImages/{train2017,val2017}, keeps masks in
ROOT/SegmentationClass/{train2017,val2017}, since the names of images do not tell their split, and writes
{train2017,val2017}.txt. The name of an instances JSON must end in its split (instances_val2017.json), and
labels come from it where it is given: so do the published ones.

Exit code 0: fine; 1: problems were found (all listed in OUT/problems.txt, those of 2017 in
OUT/problems2017.txt; what can be written is); 2: wrong usage. A list that is not the published one (by
sha256; for 2017 by its length) is said, and is no problem.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from coco14 import BENCHMARK, CATEGORY_IDS, CLASS_INDEX, CLASSES
from coco14.masks import OVERLAPS, Overlap, paint
from common.files import replacing
from segmentation.images import IMAGE_SUFFIXES, find_image
from segmentation.labels import (
    CocoImage,
    CocoInstances,
    Split,
    coco_indices,
    coco_labels,
    mask_labels,
    read_coco_json,
)
from segmentation.masks import read_mask, write_mask
from segmentation.prepare import (
    Inspection,
    Problem,
    differing_sizes,
    each,
    image_size,
    make_parser,
    noting,
    report,
    write_split,
)

# Lines and sha256 of the lists that CLIP-ES distributes (github.com/linyq2117/CLIP-ES, coco14/*.txt).
PUBLISHED = {
    "train": (82081, "6e2c180d260cf870c3802ddca1bf32a2b5c6f1356a7498eca04fca4c7a484320"),
    "val": (40137, "a8877a8b90baea45e7d9cb59654532644e1f8f765c7fd0380c4507d7e78393bb"),
}
IMAGES_2017 = {"train": 117266, "val": 4952}  # in the published lists: images with an annotation


class Part(NamedTuple):
    """One split of COCO of one year, and where its files are."""

    split: str  # "train", "val"
    year: str  # "2014", "2017"

    def __str__(self) -> str:  # 2014 was here first: its lists go without a year
        return self.split if self.year == "2014" else self.folder

    @property
    def folder(self) -> str:
        """Of the images; official annotation files carry it in their names."""
        return f"{self.split}{self.year}"

    def masks(self, root: Path) -> Path:
        """The folder of its masks, which the splits of 2014 share."""
        folder = root / "SegmentationClass"
        return folder if self.year == "2014" else folder / self.folder

    def holds(self, name: str) -> bool:
        """Whether an image of the year's split can be called so; the names of 2017 tell no split."""
        return name.startswith(f"COCO_{self.folder}_") if self.year == "2014" else name.isdigit()


class Task(NamedTuple):
    """One image to look at."""

    name: str
    size: tuple[int, int] | None  # (height, width) according to the JSON, when there is one
    annotated: bool  # the JSON says that it holds objects, so a mask must be there


def stems(folder: Path, part: Part, suffixes: tuple[str, ...]) -> set[str]:
    """Names of the images of a split that have a file in a folder (none when there is no such folder)."""
    return {file.stem for file in folder.glob("*") if file.suffix in suffixes and part.holds(file.stem)}


def read_instances(file: Path, year: str) -> tuple[Part, CocoInstances]:
    """An instances JSON and the split it belongs to; ValueError when that is none of this year's."""
    instances = read_coco_json(file)
    coco_indices(instances, len(CLASSES), CATEGORY_IDS, file)
    for part in (Part(split, year) for split in PUBLISHED):
        named = year == "2014" or file.stem.endswith(part.folder)
        if named and instances.images and all(map(part.holds, instances.images)):
            return part, instances
    if year == "2014":
        names = " or all ".join(f"COCO_{split}2014_..." for split in PUBLISHED)
        why = f"its images are not all named {names} (--year 2017 takes those of 2017)"
    else:
        why = "its name must end in train2017 or val2017, and the names of its images be numbers"
    raise ValueError(f"annotation file {file} is not of COCO {year}: {why}")


# --- masks ------------------------------------------------------------------------------------------


def paint_file(folder: Path, overlap: Overlap, item: tuple[str, CocoImage]) -> list[Problem]:
    """Paint and write the mask of one image; returns the problems met."""
    name, image = item
    problems: list[Problem] = []
    with noting(problems, "annotation"):
        try:
            mask = paint(image, CLASS_INDEX, overlap)
        except ValueError as error:
            raise ValueError(f"image {name}: {error}") from None
        write_mask(folder / f"{name}.png", mask, BENCHMARK.palette)
    return problems


def paint_split(
    folder: Path, part: Part, instances: CocoInstances, overlap: Overlap, workers: int
) -> list[Problem]:
    """Make the masks of a split that are not there yet, unless the user brought masks of their own.

    `folder/painted_<split><year>.json` tells our masks from those, and with which `overlap` they were
    painted.
    """
    record = folder / f"painted_{part.folder}.json"
    present = stems(folder, part, (".png",))
    if present and not record.is_file():
        print(f"{part}: {folder} holds {len(present)} masks that were not made here: left as they are")
        return []
    if record.is_file():
        before = json.loads(record.read_text()).get("overlap")
        if before != overlap:
            raise ValueError(
                f"the {part} masks in {folder} were painted with --overlap {before}: "
                f"give that again, or delete them and {record.name}"
            )
    else:
        with replacing(record) as stream:
            stream.write(json.dumps({"overlap": overlap}).encode())
    missing = [(name, image) for name, image in instances.images.items() if name not in present]
    problems: list[Problem] = []
    draw = partial(paint_file, folder, overlap)
    for _, found in each(draw, missing, workers, f"painting {part}"):
        problems += found
    print(f"{part}: {len(missing)} masks made in {folder}, {len(present)} were there")
    return problems


# --- splits -----------------------------------------------------------------------------------------


def inspect(root: Path, part: Part, decode: bool, task: Task) -> Inspection:
    """Look at an image and its mask; the labels are those of the mask, None without one."""
    problems: list[Problem] = []
    sizes = {"annotation": task.size} if task.size else {}
    labels = None
    with noting(problems, "image"):
        sizes["image"] = image_size(find_image(root / "JPEGImages" / part.folder, task.name), decode)
    file = part.masks(root) / f"{task.name}.png"
    if task.annotated or file.is_file():
        with noting(problems, "mask"):
            mask = read_mask(file)
            sizes["mask"] = mask.shape
            labels = mask_labels(mask, True, len(CLASSES), file)
    return Inspection(labels, problems + differing_sizes(task.name, sizes))


def prepare_split(part: Part, args: argparse.Namespace, instances: CocoInstances | None) -> list[Problem]:
    """Paint if asked, check, and write `out/<split>.txt`; returns the problems met.

    Args:
        args: see `main`.
        instances: the split's annotations, when given.
    """
    folder = part.masks(args.root)
    problems: list[Problem] = []
    if instances:
        problems += paint_split(folder, part, instances, args.overlap, args.num_workers)
    masks = stems(folder, part, (".png",))
    usual = "masks" if masks and not (instances and part.year == "2017") else "json"
    route = args.labels or usual
    if (route == "masks" and not masks) or (route == "json" and not instances):
        print(f"{part}: not made, as there are no {'masks' if route == 'masks' else 'annotations'} of it")
        return problems

    if instances:
        images = instances.images.items()
        tasks = [Task(name, image.size, bool(image.annotations and masks)) for name, image in images]
    else:
        images = stems(args.root / "JPEGImages" / part.folder, part, IMAGE_SUFFIXES)
        tasks = [Task(name, None, False) for name in images | masks]
    tasks.sort()  # by name, that is by image id
    labels: Split = {}
    without_mask = 0
    look = partial(inspect, args.root, part, args.check_images)
    for task, found in each(look, tasks, args.num_workers, f"checking {part}"):
        problems += found.problems
        without_mask += found.labels is None
        if route == "masks" and found.labels:
            labels[task.name] = found.labels
    if route == "json":
        every = {task.name: coco_labels(instances.images[task.name], CLASS_INDEX) for task in tasks}
        labels = {name: present for name, present in every.items() if present}
    elif without_mask:
        print(f"{part}: {without_mask} images have no readable mask and are left out")
    print(f"{part}: labels from {'the values of the masks' if route == 'masks' else 'the instances JSON'}")
    write_split(args.out / f"{part}.txt", labels, PUBLISHED[part.split] if part.year == "2014" else None)
    if part.year == "2017" and len(labels) != IMAGES_2017[part.split]:
        print(f"this is another list than the published one, which has {IMAGES_2017[part.split]} images")
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Parse flags, prepare both splits; returns the exit code (wrong usage exits with 2 at once)."""
    parser = make_parser("coco14", __doc__)
    parser.add_argument("--year", choices=("2014", "2017"), default="2014", help="which COCO (%(default)s)")
    parser.add_argument(
        "--annotations", type=Path, nargs="+", default=[], metavar="JSON",
        help="instances_train2014.json and/or instances_val2014.json: make masks, check against them",
    )  # fmt: skip
    parser.add_argument(
        "--labels", choices=("masks", "json"),
        help="where labels come from (2014: masks if there are any; 2017: the JSON if it is given)",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", choices=OVERLAPS, default=OVERLAPS[0],
        help="whose a pixel is that several objects cover, when masks are made (%(default)s)",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if not (args.root / "JPEGImages").is_dir():
        parser.error(f"--root {args.root} is no copy of COCO {args.year}: it has no JPEGImages folder")
    if args.labels == "json" and not args.annotations:
        parser.error("--labels json needs --annotations")
    parts = [Part(split, args.year) for split in PUBLISHED]
    if not args.annotations and not any(part.masks(args.root).is_dir() for part in parts):
        wanted = " or ".join(dict.fromkeys(str(part.masks(Path())) for part in parts))
        parser.error(f"--root {args.root} has no {wanted} folder: give --annotations to make it")

    problems: list[Problem] = []
    done = set()
    try:
        for file in args.annotations:  # one at a time: each takes gigabytes
            part, instances = read_instances(file, args.year)
            if part in done:
                raise ValueError(f"annotation file {file}: the {part} split was given before")
            images = stems(args.root / "JPEGImages" / part.folder, part, IMAGE_SUFFIXES)
            if images and not images & instances.images.keys():
                raise ValueError(f"annotation file {file} names no image of {part.folder}: is it its own?")
            problems += prepare_split(part, args, instances)
            done.add(part)
            del instances
        for part in parts:
            if part not in done:
                problems += prepare_split(part, args, None)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    name = "problems.txt" if args.year == "2014" else f"problems{args.year}.txt"
    return report(problems, args.out / name)


if __name__ == "__main__":
    sys.exit(main())
