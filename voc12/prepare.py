"""python -m voc12.prepare --root VOCdevkit/VOC2012: check a copy of PASCAL VOC 2012, write its splits.

Writes to --out: {train,val,trainval,train_aug}.txt, one image name a line, and beside each
`<split>_labels.txt`, lines `name index index ...` of the classes its XML names. The splits are derived
from the user's data: train, val and trainval are those of ImageSets/Segmentation; train_aug is every
image with a mask in SegmentationClassAug that is not in val.

Exit code 0: fine; 1: problems were found (all listed in OUT/problems.txt; what can be written is);
2: wrong usage. A list whose sha256 is not the published one is said, and is no problem.
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

    labels: Split = {}
    look = partial(inspect, root, decode)
    for (name, _), found in each(look, sorted(mask_dirs.items()), workers, "checking"):
        problems += found.problems
        if found.labels is not None:
            labels[name] = found.labels
    for split, names in splits.items():
        write_split(out / f"{split}.txt", names, PUBLISHED[split])
        known = {name: labels[name] for name in names if name in labels}
        write_split(out / f"{split}_labels.txt", known)
    return report(problems, out / "problems.txt")


def main(arguments: list[str] | None = None) -> int:
    """Parse flags, prepare; returns the exit code (wrong usage exits with 2 at once)."""
    parser = make_parser("voc12", __doc__)
    args = parser.parse_args(arguments)
    if not (args.root / "JPEGImages").is_dir():
        inner = next((hit for hit in ("VOC2012", "VOCdevkit/VOC2012") if (args.root / hit).is_dir()), None)
        hint = f"; is it {args.root / inner}?" if inner else ""
        parser.error(f"--root {args.root} is no copy of VOC2012: it has no JPEGImages folder{hint}")
    try:
        return prepare(args.root, args.out, args.check_images, args.num_workers)
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
