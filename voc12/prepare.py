"""python -m voc12.prepare --root VOCdevkit/VOC2012: check a copy of PASCAL VOC, write its splits.

Writes to --out: {train,val,trainval,train_aug}.txt, one image name a line, and beside each
`<split>_labels.txt`, lines `name index index ...` of the classes its XML names. The splits are derived
from the user's data: train, val and trainval are those of ImageSets/Segmentation; train_aug is every
image with a mask in SegmentationClassAug that is not in val.

With --year 2007 it writes 2007_{train,val,test}.txt instead: the lists of ImageSets/Main, lines
`name index index ...`. Train and val come in one archive and test in another, so one of them is enough.

Exit code 0: fine; 1: problems were found (all listed in OUT/problems.txt, those of 2007 in
OUT/2007_problems.txt; what can be written is); 2: wrong usage. A list that is not the published one (by
sha256; for 2007 by its length) is said, and is no problem.
"""
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from segmentation.images import find_image
from segmentation.labels import Split, class_indices, mask_labels, read_split, read_voc_xml
from segmentation.masks import read_mask
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
from voc12 import CLASSES

# Lines and sha256 of the lists that CLIP-ES distributes (github.com/linyq2117/CLIP-ES, voc12/*.txt).
PUBLISHED = {
    "train": (1464, "aa623bd2c8ce4443a8aaae51c524c0eb165e8e44caf6aa9e3ad33d7b75a3ef20"),
    "val": (1449, "cdc1326d12f69ce5153aa5da04a4d8783e146868d42d19f82f44e74b97ac907d"),
    "trainval": (2913, "f8dae64f9e08d8b06ef41286dcd4c516e7d98c8e6ec6d965bc6d29cb11a4de51"),
    "train_aug": (10582, "d1326bd532648d73bc4b1bd275434eba81930982dc7401a65a8cecb26c028e24"),
}
IMAGES_2007 = {"train": 2501, "val": 2510, "test": 4952}  # in the published lists


def read_splits(root: Path, problems: list[Problem]) -> dict[str, Split]:
    """The splits that the data gives, names only; what is missing for others is noted or printed."""
    splits = {}
    for name in ("train", "val", "trainval"):
        with noting(problems, "split"):
            splits[name] = _bare(read_split(root / "ImageSets" / "Segmentation" / f"{name}.txt"))
    masks = sorted(
        file.stem for file in (root / "SegmentationClassAug").glob("*.png") if not file.name.startswith(".")
    )
    if not masks:
        print(f"train_aug cannot be made: no masks in {root / 'SegmentationClassAug'}")
    elif "val" not in splits:
        print("train_aug cannot be made: which images are in val is unknown")
    else:
        splits["train_aug"] = _bare(name for name in masks if name not in splits["val"])
    return splits


def _bare(names: Iterable[str]) -> Split:
    return {name: [] for name in names}


def inspect(root: Path, decode: bool, item: tuple[str, list[str]]) -> Inspection:
    """Look at the image, annotation and masks of one image.

    Args:
        item: image name, and the folders that must hold its mask.
    """
    name, mask_dirs = item
    problems: list[Problem] = []
    sizes: dict[str, tuple[int, int]] = {}
    labels = None
    with noting(problems, "image"):
        sizes["image"] = image_size(find_image(root / "JPEGImages", name), decode)
    with noting(problems, "annotation"):
        file = root / "Annotations" / f"{name}.xml"
        annotation = read_voc_xml(file)
        if annotation.size:
            sizes["annotation"] = annotation.size
        labels = class_indices(annotation.names, CLASSES, file)
        if not labels:
            raise ValueError(f"annotation {file} names no object")
    for folder in mask_dirs:
        with noting(problems, "mask"):
            file = root / folder / f"{name}.png"
            mask = read_mask(file)
            sizes[folder] = mask.shape
            mask_labels(mask, True, len(CLASSES), file)
    return Inspection(labels, problems + differing_sizes(name, sizes))


def inspect_all(
    root: Path, mask_dirs: dict[str, list[str]], decode: bool, workers: int, problems: list[Problem]
) -> Split:
    """Look at every image, see `inspect`; returns the labels that could be read, and adds to `problems`."""
    labels: Split = {}
    look = partial(inspect, root, decode)
    for (name, _), found in each(look, sorted(mask_dirs.items()), workers, "checking"):
        problems += found.problems
        if found.labels is not None:
            labels[name] = found.labels
    return labels


def prepare(root: Path, out: Path, decode: bool = False, workers: int = 1) -> int:
    """Check the copy of VOC2012 in `root` and write splits and labels to `out`; returns the exit code."""
    problems: list[Problem] = []
    splits = read_splits(root, problems)
    mask_dirs: dict[str, list[str]] = {}
    for split, names in splits.items():
        folders = ["SegmentationClass"] if split != "train_aug" else []
        if "train_aug" in splits:  # train and val are evaluated on these masks
            folders.append("SegmentationClassAug")
        for name in names:
            known = mask_dirs.setdefault(name, [])
            known.extend(folder for folder in folders if folder not in known)

    labels = inspect_all(root, mask_dirs, decode, workers, problems)
    for split, names in splits.items():
        write_split(out / f"{split}.txt", names, PUBLISHED[split])
        known = {name: labels[name] for name in names if name in labels}
        write_split(out / f"{split}_labels.txt", known)
    return report(problems, out / "problems.txt")


def prepare_2007(root: Path, out: Path, decode: bool = False, workers: int = 1) -> int:
    """Check the copy of VOC2007 in `root` and write its lists to `out`; returns the exit code.

    Raises:
        FileNotFoundError: there is none of the lists it needs.
    """
    problems: list[Problem] = []
    splits: dict[str, Split] = {}
    folder = root / "ImageSets" / "Main"
    files = {split: folder / f"{split}.txt" for split in IMAGES_2007}
    if not any(file.is_file() for file in files.values()):
        missing = ", ".join(file.name for file in files.values())
        raise FileNotFoundError(f"{folder} has none of the lists {missing}")
    for split, file in files.items():
        if not file.is_file():
            print(f"2007_{split} is not made: there is no {file}")
            continue
        with noting(problems, "split"):
            splits[split] = read_split(file)
    mask_dirs = {name: [] for names in splits.values() for name in names}  # few have masks: none are checked
    labels = inspect_all(root, mask_dirs, decode, workers, problems)
    for split, names in splits.items():
        write_split(out / f"2007_{split}.txt", {name: labels[name] for name in names if name in labels})
        if len(names) != IMAGES_2007[split]:
            print(f"this is another list than the published one, which has {IMAGES_2007[split]} images")
    return report(problems, out / "2007_problems.txt")


def main(arguments: list[str] | None = None) -> int:
    """Parse flags, prepare; returns the exit code (wrong usage exits with 2 at once)."""
    parser = make_parser("voc12", __doc__)
    parser.add_argument("--year", choices=("2012", "2007"), default="2012", help="which VOC (%(default)s)")
    args = parser.parse_args(arguments)
    voc = f"VOC{args.year}"
    if not (args.root / "JPEGImages").is_dir():
        inner = next((hit for hit in (voc, f"VOCdevkit/{voc}") if (args.root / hit).is_dir()), None)
        hint = f"; is it {args.root / inner}?" if inner else ""
        parser.error(f"--root {args.root} is no copy of {voc}: it has no JPEGImages folder{hint}")
    run = prepare if args.year == "2012" else prepare_2007
    try:
        return run(args.root, args.out, args.check_images, args.num_workers)
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
