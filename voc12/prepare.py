"""python -m voc12.prepare --root VOCdevkit/VOC2012: check a copy of PASCAL VOC, write its splits.

Writes to --out: {train,val,trainval,train_aug}.txt with one image name per line, and for each of them
<split>_labels.txt with lines `name index index ...`: the classes in the XML file of the image. The splits
are derived from your data: train, val and trainval are the lists of ImageSets/Segmentation; train_aug
contains every image that has a mask in SegmentationClassAug and is not in val.

With --year 2007 it writes 2007_{train,val,test}.txt instead: the lists of ImageSets/Main, with lines
`name index index ...`. VOC 2007 publishes train and val in one archive and test in another. One archive is
enough: missing lists are skipped.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

from foundation.logs import log
from segmentation import prepare as shared
from segmentation.labels import class_indices, mask_labels, read_split, read_voc_xml
from segmentation.masks import read_mask
from voc12 import CLASSES

# Line count and sha256 of the lists that CLIP-ES distributes (github.com/linyq2117/CLIP-ES, voc12/*.txt).
PUBLISHED = {
    "train": (1464, "aa623bd2c8ce4443a8aaae51c524c0eb165e8e44caf6aa9e3ad33d7b75a3ef20"),
    "val": (1449, "cdc1326d12f69ce5153aa5da04a4d8783e146868d42d19f82f44e74b97ac907d"),
    "trainval": (2913, "f8dae64f9e08d8b06ef41286dcd4c516e7d98c8e6ec6d965bc6d29cb11a4de51"),
    "train_aug": (10582, "d1326bd532648d73bc4b1bd275434eba81930982dc7401a65a8cecb26c028e24"),
    "2007_train": (2501,),  # for VOC 2007, only the number of lines is compared
    "2007_val": (2510,),
    "2007_test": (4952,),
}


def read_splits(root: Path, problems: list[shared.Problem]) -> dict[str, list[str]]:
    """Return split -> image names of VOC2012; print a line if train_aug cannot be made."""
    lists = root / "ImageSets" / "Segmentation"
    splits = read_lists({split: lists / f"{split}.txt" for split in ("train", "val", "trainval")}, problems)
    folder = root / "SegmentationClassAug"
    names = sorted(file.stem for file in folder.glob("*.png") if not file.name.startswith("."))
    if not names:
        log.warning("train_aug cannot be made: no masks in %s", folder)
    elif "val" not in splits:
        log.warning("train_aug cannot be made: the list of val could not be read")
    else:
        val = set(splits["val"])
        splits["train_aug"] = [name for name in names if name not in val]
    return splits


def read_splits_2007(root: Path, problems: list[shared.Problem]) -> dict[str, list[str]]:
    """Return split -> image names, for the lists of VOC2007 that exist.

    Raises:
        FileNotFoundError: no list exists.
    """
    lists = root / "ImageSets" / "Main"
    files = {f"2007_{split}": lists / f"{split}.txt" for split in ("train", "val", "test")}
    missing = {split: file for split, file in files.items() if not file.is_file()}
    if missing == files:
        raise FileNotFoundError(f"{lists} has no train.txt, val.txt or test.txt: check --root")
    for split, file in missing.items():
        log.warning("%s is not made: %s does not exist", split, file)
    return read_lists({split: file for split, file in files.items() if split not in missing}, problems)


def read_lists(files: dict[str, Path], problems: list[shared.Problem]) -> dict[str, list[str]]:
    """Return split -> image names, for the files that can be read; add the others to `problems`."""
    splits = {}
    for split, file in files.items():
        with shared.collecting(problems, "split"):
            splits[split] = list(read_split(file))
    return splits


def mask_folders(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return image name -> folders that must contain its mask, for VOC2012.

    Images of train and val have a mask in SegmentationClass. If train_aug can be made, all images also have
    one in SegmentationClassAug: val is evaluated on those masks, too.
    """
    segmented = {name for split in splits if split != "train_aug" for name in splits[split]}
    augmented = ["SegmentationClassAug"] if "train_aug" in splits else []
    names = segmented.union(splits.get("train_aug", ()))
    return {name: ["SegmentationClass"] * (name in segmented) + augmented for name in names}


def inspect(root: Path, decode: bool, item: tuple[str, list[str]]) -> shared.Inspection:
    """Return the sizes, labels and problems of one image, read from its image, annotation and mask files.

    Args:
        item: image name, and the folders that must contain its mask.
    """
    name, folders = item
    inspection = shared.inspect_image(root / "JPEGImages", name, decode)
    with shared.collecting(inspection.problems, "annotation"):
        file = root / "Annotations" / f"{name}.xml"
        annotation = read_voc_xml(file)
        if annotation.size:
            inspection.sizes["annotation"] = annotation.size
        inspection.labels = class_indices(annotation.names, CLASSES, file)
        if not inspection.labels:
            raise ValueError(f"annotation {file} names no object")
    for folder in folders:
        with shared.collecting(inspection.problems, "mask"):
            file = root / folder / f"{name}.png"
            mask = read_mask(file)
            inspection.sizes[folder] = mask.shape
            mask_labels(mask, True, len(CLASSES), file)
    return inspection


def prepare(args: argparse.Namespace) -> int:
    """Check the copy of VOC, write its lists and return the exit code; `args`: see `main`.

    Raises:
        FileNotFoundError: the copy of VOC2007 has no list.
    """
    problems: list[shared.Problem] = []
    is_2012 = args.year == "2012"
    if is_2012:
        splits = read_splits(args.root, problems)
        folders = mask_folders(splits)
    else:
        splits = read_splits_2007(args.root, problems)
        folders = {name: [] for names in splits.values() for name in names}  # no masks: few images have one
    inspect_item = partial(inspect, args.root, args.check_images)
    labels = shared.inspect_all(inspect_item, sorted(folders.items()), args.num_workers, "checking", problems)
    for split, names in splits.items():
        labeled = {name: labels[name] for name in names if labels[name] is not None}
        listed = dict.fromkeys(names, ()) if is_2012 else labeled
        shared.write_split(args.out / f"{split}.txt", listed, *PUBLISHED[split])
        if is_2012:
            shared.write_split(args.out / f"{split}_labels.txt", labeled)
    return shared.report(problems, args.out / ("problems.txt" if is_2012 else "2007_problems.txt"))


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags, prepare the data, return the exit code; wrong usage exits with code 2."""
    parser = shared.make_parser("voc12", __doc__)
    parser.add_argument("--year", choices=("2012", "2007"), default="2012", help="year of VOC (%(default)s)")
    args = parser.parse_args(arguments)
    voc = f"VOC{args.year}"
    if not (args.root / "JPEGImages").is_dir():
        inner = [args.root / path for path in (voc, f"VOCdevkit/{voc}") if (args.root / path).is_dir()]
        hint = f"; did you mean --root {inner[0]}?" if inner else ""
        parser.error(f"--root {args.root} is not a copy of {voc}: it has no JPEGImages folder{hint}")
    return shared.run(parser, prepare, args)


if __name__ == "__main__":
    sys.exit(main())
