"""python -m coco14.prepare --root COCO: check a copy of COCO, write its splits, make its masks.

Expects ROOT/JPEGImages/{train2014,val2014} and either masks ROOT/SegmentationClass/<image>.png
(0 = background, class index + 1, 255 = ignore) or the instances JSON (--annotations), from which it makes
the masks. After an interruption, the same command makes the missing masks. Existing masks are not changed.

Writes to --out: {train,val}.txt, lines `name index index ...` with class indices 0..79. The labels come
from the values of the masks or from the JSON (--labels). The published lists of 2014 appear to come from
masks. The JSON also has classes that larger objects hide in those masks, so lists from it differ in sha256.

With --year 2017 it expects ROOT/JPEGImages/{train2017,val2017} and writes {train2017,val2017}.txt. Masks are
in ROOT/SegmentationClass/{train2017,val2017}, because the image names of 2017 do not contain the split. The
name of an instances JSON must end in its split (instances_val2017.json). If a JSON is given, the labels come
from it by default, as in the published lists.
"""
import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from coco14 import BENCHMARK, CATEGORY_IDS, CLASSES
from coco14.masks import OVERLAPS, Overlap, paint
from foundation.files import write_file
from foundation.jsonfile import read_json
from foundation.logs import log
from segmentation import prepare as shared
from segmentation.coco import CocoImage, read_coco_json
from segmentation.images import IMAGE_SUFFIXES
from segmentation.labels import mask_labels
from segmentation.masks import read_mask, write_mask

SPLITS = ("train", "val")
# Line count and sha256 of the lists that CLIP-ES distributes (github.com/linyq2117/CLIP-ES, coco14/*.txt).
PUBLISHED = {
    "train": (82081, "6e2c180d260cf870c3802ddca1bf32a2b5c6f1356a7498eca04fca4c7a484320"),
    "val": (40137, "a8877a8b90baea45e7d9cb59654532644e1f8f765c7fd0380c4507d7e78393bb"),
    "train2017": (117266,),  # images with an annotation
    "val2017": (4952,),
}


class Part(NamedTuple):
    """One split of COCO in one year, and the folders of its files."""

    split: str  # "train", "val"
    year: str  # "2014", "2017"

    def __str__(self) -> str:
        """Return the name of the split's list, without the year for 2014, as in the published lists."""
        return self.split if self.year == "2014" else self.folder

    @property
    def folder(self) -> str:
        """Folder of the images, such as train2014; the official annotation files have it in their names."""
        return f"{self.split}{self.year}"

    def masks(self, root: Path) -> Path:
        """Return the folder of the masks; the splits of 2014 share one folder."""
        folder = root / "SegmentationClass"
        return folder if self.year == "2014" else folder / self.folder

    def accepts_name(self, name: str) -> bool:
        """Return whether an image of the split can have this name; names of 2017 do not contain the split."""
        pattern = rf"COCO_{self.folder}_[\w.-]+" if self.year == "2014" else "[0-9]+"
        return re.fullmatch(pattern, name, re.ASCII) is not None


class Task(NamedTuple):
    """One image to inspect."""

    name: str
    size: tuple[int, int] | None = None  # (height, width) in the JSON; None if no JSON is given
    annotated: bool = False  # the JSON annotates objects correctly, so a mask must exist
    to_paint: CocoImage | None = None  # annotations to make the mask from; None makes no mask


def names_in(folder: Path, part: Part, suffixes: tuple[str, ...]) -> set[str]:
    """Return the image names of a split that have a file in `folder`; empty if the folder does not exist."""
    files = (file for file in folder.glob("*") if file.suffix in suffixes)
    return {file.stem for file in files if part.accepts_name(file.stem)}


def images_of(root: Path, part: Part) -> set[str]:
    """Return the names of the images of a split."""
    return names_in(root / "JPEGImages" / part.folder, part, IMAGE_SUFFIXES)


def read_instances(
    file: Path, year: str, problems: list[shared.Problem]
) -> tuple[Part, dict[str, CocoImage]]:
    """Return the split of an instances JSON, and its images by name; extend `problems`.

    Raises:
        FileNotFoundError, ValueError: see `read_coco_json`; or two images have the same name, or the file is
            not of a split of this year.
    """
    images, faults = read_coco_json(file, CLASSES, CATEGORY_IDS)
    paths: dict[str, str] = {}
    for path, image in images.items():
        name = path.split("/")[-1]
        if paths.setdefault(name, path) != path:
            both = f"{paths[name]} and {path}"
            raise ValueError(f"annotation file {file}: {both} have the same name: rename one")
        if image.size is None:
            image.problems.append("its height and width are missing or not valid")
        faults += [f"image {name}: {fault}" for fault in image.problems]
    problems += [shared.Problem("bad annotation", f"{file}: {fault}") for fault in faults]
    instances = {name: images[path] for name, path in paths.items()}
    for part in (Part(split, year) for split in SPLITS):
        matches = year == "2014" or file.stem.endswith(part.folder)
        if matches and instances and all(map(part.accepts_name, instances)):
            return part, instances
    if year == "2014":
        names = " or all ".join(f"COCO_{split}2014_..." for split in SPLITS)
        reason = f"its images are not all named {names}; for COCO 2017, give --year 2017"
    else:
        reason = "its name must end in train2017 or val2017, and its image names must be numbers"
    raise ValueError(f"annotation file {file} is not of COCO {year}: {reason}")


def may_paint(folder: Path, part: Part, overlap: Overlap, existing: bool) -> bool:
    """Return whether to make the missing masks of a split: not if the existing masks have another origin.

    `folder/painted_<split><year>.json` records the `overlap` of masks that this command makes.

    Args:
        existing: whether the folder contains masks of the split.

    Raises:
        ValueError: the existing masks were made with another `overlap`.
    """
    record = folder / f"painted_{part.folder}.json"
    if record.is_file():
        try:
            recorded = read_json(record).get("overlap")
        except ValueError as error:
            raise ValueError(f"{record} is damaged ({error}): delete it and the {part} masks") from None
        if recorded != overlap:
            raise ValueError(
                f"the {part} masks in {folder} were painted with --overlap {recorded}: "
                f"give the same --overlap, or delete the masks and {record.name}"
            )
    elif not existing:
        write_file(record, json.dumps({"overlap": overlap}))
    return record.is_file()


def inspect(root: Path, part: Part, overlap: Overlap, decode: bool, task: Task) -> shared.Inspection:
    """Make the mask of an image if `task.to_paint` is given; return its sizes, problems and mask labels."""
    inspection = shared.inspect_image(root / "JPEGImages" / part.folder, task.name, decode)
    same_size = inspection.sizes.get("image", task.size) == task.size
    if task.size:
        inspection.sizes = {"annotation": task.size, **inspection.sizes}
    file = part.masks(root) / f"{task.name}.png"
    if task.to_paint and same_size:  # a mask of another size is of no use; `inspect_all` reports the sizes
        with shared.collecting(inspection.problems, "annotation"):
            try:
                mask = paint(task.to_paint, overlap)
            except ValueError as error:
                raise ValueError(f"image {task.name}: {error}") from None
            write_mask(file, mask, BENCHMARK.palette)
    if file.is_file() or (task.annotated and not task.to_paint):
        with shared.collecting(inspection.problems, "mask"):
            mask = read_mask(file)
            inspection.sizes["mask"] = mask.shape
            inspection.labels = mask_labels(mask, True, len(CLASSES), file)
    return inspection


def prepare_split(
    part: Part, args: argparse.Namespace, instances: dict[str, CocoImage] | None
) -> list[shared.Problem]:
    """Make the masks if annotations are given, check all files, write the list; return the problems."""
    folder = part.masks(args.root)
    existing = names_in(folder, part, (".png",))
    if args.labels:
        from_masks = args.labels == "masks"
    else:
        from_masks = part.year == "2014" if instances else bool(existing)
    if not instances and not (from_masks and existing):
        source = "masks" if from_masks else "annotations"
        log.warning("%s: list not made, because the split has no %s", part, source)
        return []

    if instances:
        painting = may_paint(folder, part, args.overlap, bool(existing))
        usable = {name for name, image in instances.items() if not image.problems}
        missing = usable - existing if painting else set()
        tasks = [
            Task(
                name,
                image.size,
                annotated=name in usable and bool(image.annotations),
                to_paint=image if name in missing else None,
            )
            for name, image in instances.items()
        ]
    else:
        tasks = [Task(name) for name in images_of(args.root, part) | existing]
    tasks.sort()  # by name, that is by image id
    problems: list[shared.Problem] = []
    inspect_task = partial(inspect, args.root, part, args.overlap, args.check_images)
    labels = shared.inspect_all(inspect_task, tasks, args.num_workers, f"checking {part}", problems)
    if instances and painting:
        made = sum(labels[name] is not None for name in missing)
        print(f"{part}: {made} masks made in {folder}, {len(existing)} existed before")
    elif instances:
        log.warning("%s: %s has %d masks of another origin: no mask is changed", part, folder, len(existing))
    if not from_masks:
        labels = {task.name: instances[task.name].labels for task in tasks}
    elif without_mask := sum(class_ids is None for class_ids in labels.values()):
        log.warning("%s: %d images have no readable mask and are left out", part, without_mask)
    print(f"{part}: labels from {'the values of the masks' if from_masks else 'the instances JSON'}")
    labeled = {name: class_ids for name, class_ids in labels.items() if class_ids}
    shared.write_split(args.out / f"{part}.txt", labeled, *PUBLISHED[str(part)])
    return problems


def prepare(args: argparse.Namespace) -> int:
    """Prepare both splits and return the exit code; `args`: see `main`."""
    problems: list[shared.Problem] = []
    done = set()
    for file in args.annotations:  # one at a time: each needs gigabytes of memory
        part, instances = read_instances(file, args.year, problems)
        if part in done:
            raise ValueError(f"--annotations {file}: the {part} split was given before; give it once")
        images = images_of(args.root, part)
        if images and not images & instances.keys():
            hint = f"give instances_{part.folder}.json"
            raise ValueError(f"--annotations {file} lists no image of {part.folder}: {hint}")
        problems += prepare_split(part, args, instances)
        done.add(part)
        del instances
    for split in SPLITS:
        if Part(split, args.year) not in done:
            problems += prepare_split(Part(split, args.year), args, None)
    name = "problems.txt" if args.year == "2014" else f"problems{args.year}.txt"
    return shared.report(problems, args.out / name)


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags, prepare the data, return the exit code; wrong usage exits with code 2."""
    parser = shared.make_parser("coco14", __doc__)
    flag = parser.add_argument
    flag("--year", choices=("2014", "2017"), default="2014", help="year of COCO (%(default)s)")
    flag("--annotations", type=Path, nargs="+", default=[], metavar="JSON",
         help="instances_train2014.json and/or instances_val2014.json: source of masks and expected sizes")
    flag("--labels", choices=("masks", "json"),
         help="source of the labels (2014: the masks; 2017: the JSON if it is given, else the masks)")
    flag("--overlap", choices=OVERLAPS, default=OVERLAPS[0],
         help="object that gets a pixel where several overlap, when masks are made (%(default)s)")
    args = parser.parse_args(arguments)
    if not (args.root / "JPEGImages").is_dir():
        parser.error(f"--root {args.root} is not a copy of COCO {args.year}: it has no JPEGImages folder")
    if args.labels == "json" and not args.annotations:
        parser.error("--labels json needs --annotations")
    folders = dict.fromkeys(Part(split, args.year).masks(args.root) for split in SPLITS)
    if not args.annotations and not any(folder.is_dir() for folder in folders):
        names = " or ".join(str(folder.relative_to(args.root)) for folder in folders)
        parser.error(f"--root {args.root} has no {names} folder: give --annotations to make the masks")
    return shared.run(parser, prepare, args)


if __name__ == "__main__":
    sys.exit(main())
