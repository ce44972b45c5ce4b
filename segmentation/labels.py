"""Image-level labels: which classes an image contains, whatever file says so.

Every source becomes one thing, a `LabelReader`: image name -> class indices (0-based, without
background). Readers can be pickled, so that worker processes may hold them.
"""
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lxml import etree

from segmentation.benchmark import IGNORE, Benchmark
from segmentation.images import image_files
from segmentation.masks import read_mask

# Image name -> distinct class indices, in order of first appearance; ValueError or OSError with a
# sentence for the user when they cannot be read.
LabelReader = Callable[[str], list[int]]

Split = dict[str, list[int]]  # image name -> labels on its line (often none), in the order of the file


def reader(benchmark: Benchmark, split: Split, labels_file: str | Path | None = None) -> LabelReader:
    """The labels of a benchmark's images from where the benchmark says they are.

    Args:
        benchmark: its `labels` picks the source.
        split: read by `read_split`; it is the source itself when `benchmark.labels` is "file".
        labels_file: lines `name index index ...` that take precedence over the benchmark's source.

    Raises:
        FileNotFoundError: the label file or annotation folder does not exist.
        ValueError: it holds no labels, or labels that the benchmark does not have.
    """
    count = len(benchmark.classes)
    if labels_file:
        return from_file(labels_file, count)
    if benchmark.labels == "voc_xml":
        return from_voc_xml(benchmark.path(benchmark.annotation_dir), benchmark.classes)
    if benchmark.labels == "masks":
        return from_masks(benchmark.path(benchmark.mask_dir), benchmark.has_background, count)
    if benchmark.labels == "coco_json":
        return from_coco_json(benchmark.path(benchmark.annotation_file), count, benchmark.category_ids)
    if not any(split.values()):
        raise ValueError(
            f"the split file gives no labels, and benchmark {benchmark.name} has no other source of them: "
            "write lines like `name 3 17`, or give a file of such lines with --labels"
        )
    for name, labels in split.items():
        _check_range(labels, count, f"image {name} of the split file")
    return partial(_look_up, split, "the split file")


def read_split(path: str | Path, classes_count: int | None = None) -> Split:
    """Read a split or label file: a line for each image, `name` or `name index index ...`.

    Blank lines, trailing blanks, CRLF line ends and a byte order mark are let pass; a class named
    twice on a line counts once.

    Args:
        path: the text file, UTF-8; image names hold no blanks and no file suffix.
        classes_count: when given, indices must lie in [0, classes_count).

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line: an image for the second time, or labels that are no class indices.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"split or label file {path} does not exist")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
    split: Split = {}
    for number, line in enumerate(lines, start=1):
        name, *fields = line.split() or [""]
        if not name:
            continue
        where = f"{path} line {number}"
        if name in split:
            raise ValueError(f"{where}: image {name} was listed before")
        if not all(field.isascii() and field.removeprefix("-").isdigit() for field in fields):
            raise ValueError(f"{where}: expected `name index index ...`, got {line.strip()[:80]!r}")
        labels = list(dict.fromkeys(int(field) for field in fields))
        _check_range(labels, classes_count, where)
        split[name] = labels
    if not split:
        raise ValueError(f"{path} lists no images")
    return split


def split_of(benchmark: Benchmark, path: str | Path | None = None) -> Split:
    """The split file at `path`, else the benchmark's own.

    Raises:
        FileNotFoundError, ValueError: as `read_split`, or the benchmark has none.
    """
    if path:
        return read_split(path)
    if not benchmark.split_file:
        raise ValueError(f"benchmark {benchmark.name} has no split file of its own: give --split_file")
    if not Path(benchmark.split_file).is_file():
        raise FileNotFoundError(
            f"{benchmark.split_file}, the split file of benchmark {benchmark.name}, does not exist: prepare "
            "the data (docs/data.md), or give --split_file"
        )
    return read_split(benchmark.split_file)


def split_or_folder(benchmark: Benchmark, path: str | Path | None, image_root: str | Path) -> Split:
    """As `split_of`; but where neither `path` nor the benchmark names a split file, all images of a folder.

    Raises:
        FileNotFoundError, ValueError: also where there is no such folder, it holds no images, or one whose
            name no split file could hold.
    """
    if not Path(image_root).is_dir():
        raise FileNotFoundError(f"image folder {image_root} does not exist: give --image_root")
    if path or benchmark.split_file:
        return split_of(benchmark, path)
    names = [Path(file).stem for file in image_files(str(image_root))]
    for name in names:
        if len(name.split()) != 1:
            raise ValueError(f"image {name!r} in {image_root} has a blank in its name: rename it")
    return {name: [] for name in names}


def from_file(path: str | Path, classes_count: int) -> LabelReader:
    """Labels from lines `name index index ...`; raises as `read_split`, at once.

    An image that is not listed is a ValueError when asked for; one listed without labels has none.
    """
    return partial(_look_up, read_split(path, classes_count), str(path))


def _look_up(table: Split, source: str, name: str) -> list[int]:
    if name not in table:
        raise ValueError(f"image {name} is not listed in {source}")
    return table[name]


def _check_range(labels: list[int], classes_count: int | None, where: str) -> None:
    for label in labels:
        if label < 0 or (classes_count is not None and label >= classes_count):
            allowed = "0 or more" if classes_count is None else f"0 to {classes_count - 1}"
            raise ValueError(f"{where}: class index {label} is out of range, expected {allowed}")


# --- PASCAL VOC annotations -------------------------------------------------------------------------


class VocAnnotation(NamedTuple):
    """What this project reads of a VOC XML file."""

    names: list[str]  # distinct class names of its objects, in order of first appearance
    size: tuple[int, int] | None  # (height, width) as written there, which need not be the image's


def read_voc_xml(file: str | Path) -> VocAnnotation:
    """Read a VOC annotation. Every object counts, also difficult and truncated ones.

    Entities are not resolved and nothing is fetched: annotations may come from strangers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a VOC annotation, or an object without a name.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"annotation {file} does not exist")
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    try:
        root = etree.parse(str(file), parser).getroot()
    except (etree.XMLSyntaxError, OSError) as error:
        raise ValueError(f"annotation {file} cannot be read: {error}") from None
    if root.tag != "annotation":
        raise ValueError(f"annotation {file} is not a VOC annotation: its root is <{root.tag}>")
    # Direct children only: the <part>s of a person carry names of their own ("head", "hand").
    names = [(item.findtext("name") or "").strip() for item in root.findall("object")]
    if "" in names:
        raise ValueError(f"annotation {file} has an object without a name")
    try:
        size = int(root.findtext("size/height")), int(root.findtext("size/width"))
    except (TypeError, ValueError):
        size = None
    return VocAnnotation(list(dict.fromkeys(names)), size)


def class_indices(names: Sequence[str], classes: Sequence[str], file: str | Path) -> list[int]:
    """The indices of `names` in `classes`; ValueError naming `file` for a name that is not there."""
    for name in names:
        if name not in classes:
            raise ValueError(f"annotation {file} names the class {name!r}, which the benchmark does not have")
    return [classes.index(name) for name in names]


def from_voc_xml(folder: str | Path, classes: Sequence[str]) -> LabelReader:
    """Labels from `folder/<name>.xml`, see `read_voc_xml`.

    Raises:
        FileNotFoundError: no such folder.
    """
    return partial(_voc_xml_labels, _existing_folder(folder, "annotation"), list(classes))


def _voc_xml_labels(folder: Path, classes: list[str], name: str) -> list[int]:
    file = folder / f"{name}.xml"
    return class_indices(read_voc_xml(file).names, classes, file)


def _existing_folder(folder: str | Path, what: str) -> Path:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{what} folder {folder} does not exist")
    return Path(folder)


# --- index masks ------------------------------------------------------------------------------------


def mask_labels(mask: np.ndarray, has_background: bool, classes_count: int, file: str | Path) -> list[int]:
    """The classes painted in an index mask.

    Args:
        mask: (H, W) uint8. With a background class 0 is background and k + 1 is class k, without
            one k is class k; 255 is neither.
        file: where it came from, for the error.

    Returns:
        Class indices, ascending.

    Raises:
        ValueError: a value that stands for no class.
    """
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=IGNORE + 1))
    labels = [int(value) - has_background for value in values if value != IGNORE]
    if labels and labels[-1] >= classes_count:
        raise ValueError(
            f"mask {file} holds the value {labels[-1] + has_background}, which stands for no class: "
            f"expected 0 to {classes_count - 1 + has_background}, or {IGNORE}"
        )
    return [label for label in labels if label >= 0]


def from_masks(folder: str | Path, has_background: bool, classes_count: int) -> LabelReader:
    """Labels from the values of `folder/<name>.png`, see `mask_labels`.

    Raises:
        FileNotFoundError: no such folder.
    """
    return partial(_painted_labels, _existing_folder(folder, "mask"), has_background, classes_count)


def _painted_labels(folder: Path, has_background: bool, classes_count: int, name: str) -> list[int]:
    file = folder / f"{name}.png"
    return mask_labels(read_mask(file), has_background, classes_count, file)


# --- COCO instances ---------------------------------------------------------------------------------


class CocoImage(NamedTuple):
    """An image of an instances file."""

    size: tuple[int, int]  # (height, width)
    annotations: list[dict[str, Any]]  # as they stand in the file, in its order


class CocoInstances(NamedTuple):
    """An instances file; every annotation is of a category that it declares."""

    images: dict[str, CocoImage]  # by image name: the file name without folder and suffix
    category_ids: list[int]  # all the file declares, ascending


def read_coco_json(path: str | Path) -> CocoInstances:
    """Read a COCO instances file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an instances file, or cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    try:
        content = json.loads(Path(path).read_bytes())
        images = {}
        for item in content["images"]:
            size = int(item["height"]), int(item["width"])
            images[item["id"]] = (Path(item["file_name"]).stem, CocoImage(size, []))
        category_ids = sorted(int(item["id"]) for item in content["categories"])
        for item in content["annotations"]:
            if item["category_id"] not in category_ids:
                raise ValueError(f"annotation {item['id']} is of the unknown category {item['category_id']}")
            images[item["image_id"]][1].annotations.append(item)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"annotation file {path} is not a COCO instances file ({type(error).__name__}: {error})"
        ) from None
    return CocoInstances(dict(images.values()), category_ids)


def coco_indices(
    instances: CocoInstances, classes_count: int, category_ids: Sequence[int], path: str | Path
) -> dict[int, int]:
    """The table official category id -> class index.

    Args:
        category_ids: the official id of each class; empty: the classes are the categories of the
            file in ascending order of their ids.

    Raises:
        ValueError: the file declares other categories than the benchmark has classes.
    """
    ids = list(category_ids) or instances.category_ids
    if len(ids) != classes_count or not set(instances.category_ids) <= set(ids):
        raise ValueError(
            f"annotation file {path} declares {len(instances.category_ids)} categories that do not match "
            f"the {classes_count} classes of the benchmark"
        )
    return {category: index for index, category in enumerate(ids)}


def coco_labels(image: CocoImage, indices: dict[int, int]) -> list[int]:
    """The classes annotated in an image, crowds included, ascending; `indices` from `coco_indices`."""
    return sorted({indices[annotation["category_id"]] for annotation in image.annotations})


def from_coco_json(path: str | Path, classes_count: int, category_ids: Sequence[int] = ()) -> LabelReader:
    """Labels from a COCO instances file, which is read once, here.

    Args:
        path: the JSON file.
        category_ids: see `coco_indices`.

    Raises:
        FileNotFoundError, ValueError: as `read_coco_json` and `coco_indices`.
    """
    instances = read_coco_json(path)
    indices = coco_indices(instances, classes_count, category_ids, path)
    table = {name: coco_labels(image, indices) for name, image in instances.images.items()}
    return partial(_look_up, table, str(path))
