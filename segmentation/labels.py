"""Image-level labels: the classes that an image contains.

A `LabelReader` reads the labels of an image from any source: image name -> class indices (0-based, without
background). Readers can be pickled for worker processes.
"""
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lxml import etree

from segmentation.benchmark import IGNORE, Benchmark
from segmentation.images import image_files
from segmentation.masks import read_mask
from segmentation.names import NAMES, check_listable, image_name, shortened

# Image name -> distinct class indices, in order of first appearance. Raises ValueError or OSError, with a
# message for the user, if the labels cannot be read.
LabelReader = Callable[[str], list[int]]

INTEGER = re.compile("-?[0-9]{1,9}")
Split = dict[str, list[int]]  # image name -> labels on its line (often empty), in the order of the file


def reader(benchmark: Benchmark, split: Split, labels_file: str | Path | None = None) -> LabelReader:
    """Return a reader of a benchmark's image-level labels.

    Args:
        benchmark: `benchmark.labels` is the type of the source.
        split: result of `read_split`; the source of labels if `benchmark.labels` is "file".
        labels_file: file with lines `name index index ...`, used instead of the benchmark's source.

    Raises:
        FileNotFoundError: the label file or annotation folder does not exist.
        ValueError: the source contains no labels, or class indices that the benchmark does not have.
    """
    num_classes = len(benchmark.classes)
    if labels_file:
        return from_file(labels_file, num_classes)
    if benchmark.labels == "voc_xml":
        folder = _existing(benchmark.path(benchmark.annotation_dir), "annotation")
        return partial(_voc_xml_labels, folder, benchmark.classes)
    if benchmark.labels == "masks":
        folder = _existing(benchmark.path(benchmark.mask_dir), "mask")
        return partial(_painted_labels, folder, benchmark.has_background, num_classes)
    if benchmark.labels == "coco_json":
        file = benchmark.path(benchmark.annotation_file)
        images = read_coco_json(file, num_classes, benchmark.category_ids)
        return partial(_look_up, {name: image.labels for name, image in images.items()}, str(file))
    if not any(split.values()):
        raise ValueError(
            f"the split file contains no labels, and benchmark {benchmark.name} has no other label source: "
            "add class indices to its lines (`name 3 17`), or give a file with such lines by --labels"
        )
    for name, labels in split.items():
        _check_range(labels, num_classes, f"image {name} of the split file")
    return partial(_look_up, split, "the split file")


def read_split(path: str | Path, num_classes: int | None = None) -> Split:
    """Return the content of a split or label file, with lines `name` or `name index index ...`.

    Empty lines, trailing blanks, CRLF line ends and a byte order mark are ignored. A class that appears twice
    on a line counts once.

    Args:
        path: the text file, UTF-8; for image names see `segmentation.names.image_name`.
        num_classes: indices must be in [0, num_classes); None: they must not be negative.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an image name is not valid or is listed twice, or a label is not a class index; the
            message names the line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"split or label file {path} does not exist")
    split: Split = {}
    for number, line in enumerate(_lines(path), start=1):
        text, *fields = line.split() or [""]
        if not text:
            continue
        where = f"{path} line {number}"
        if not all(INTEGER.fullmatch(field) for field in fields):
            found = shortened(line.strip())
            raise ValueError(f"{where}: expected `name index index ...`, got {found}; {NAMES}")
        try:
            name = image_name(text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if name in split:
            raise ValueError(f"{where}: image {name} was listed before")
        split[name] = list(dict.fromkeys(int(field) for field in fields))
        _check_range(split[name], num_classes, where)
    if not split:
        raise ValueError(f"{path} lists no images")
    return split


def split_of(
    benchmark: Benchmark, path: str | Path | None = None, image_root: str | Path | None = None
) -> Split:
    """Return the content of a split file, or all images of a folder without labels.

    Args:
        benchmark: its split file is used if `path` is not given.
        path: split file.
        image_root: image folder, used if there is no split file.

    Raises:
        FileNotFoundError, ValueError: see `read_split`. Without a split file: `image_root` contains no
            image, or an image whose name is not valid or contains a blank.
    """
    if image_root is not None and not Path(image_root).is_dir():
        raise FileNotFoundError(f"image folder {image_root} does not exist: give --image_root")
    if path:
        return read_split(path)
    if benchmark.split_file and not Path(benchmark.split_file).is_file():
        raise FileNotFoundError(
            f"{benchmark.split_file}, the split file of benchmark {benchmark.name}, does not exist: prepare "
            "the data (docs/data.md), or give --split_file"
        )
    if benchmark.split_file:
        return read_split(benchmark.split_file)
    if image_root is None:
        raise ValueError(f"benchmark {benchmark.name} has no split file: give --split_file")
    names = [Path(file).stem for file in image_files(str(image_root))]
    for name in names:
        try:
            check_listable(name)
        except ValueError as error:
            raise ValueError(f"image folder {image_root}: {error}") from None
    return {name: [] for name in names}


def from_file(path: str | Path, num_classes: int) -> LabelReader:
    """Return a reader of a file with lines `name index index ...`. `read_split` reads the file immediately.

    The reader returns an empty list for an image without labels, and raises ValueError for an image that is
    not listed.

    Raises:
        FileNotFoundError, ValueError: see `read_split`.
    """
    return partial(_look_up, read_split(path, num_classes), str(path))


def _lines(path: str | Path) -> list[str]:
    """Return the lines of a text file in UTF-8; ValueError names the line of the first other byte."""
    content = Path(path).read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line}: it is not a text file in UTF-8: convert it, or give another file"
        ) from None


def _look_up(table: Split, source: str, name: str) -> list[int]:
    if name not in table:
        raise ValueError(f"image {name} is not listed in {source}")
    return table[name]


def _check_range(labels: list[int], num_classes: int | None, where: str) -> None:
    for label in labels:
        if label < 0 or (num_classes is not None and label >= num_classes):
            allowed = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
            raise ValueError(f"{where}: class index {label} is out of range, expected {allowed}")


def _existing(folder: Path, kind: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{kind} folder {folder} does not exist")
    return folder


# --- PASCAL VOC annotations -------------------------------------------------------------------------


MAX_XML_BYTES = 2**24  # 16 MB; VOC annotations have a few kB


class VocAnnotation(NamedTuple):
    """Content of a VOC XML file, as far as this project uses it."""

    names: list[str]  # distinct class names of its objects, in order of first appearance
    size: tuple[int, int] | None  # declared (height, width); the image file can have another size


def read_voc_xml(file: str | Path) -> VocAnnotation:
    """Return the objects of a VOC annotation, including difficult and truncated ones.

    Entities are not resolved, no other file is read, and gzip is not unpacked (as libxml2 does for files),
    because annotations can come from untrusted sources.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a VOC annotation, or an object has no name.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"annotation {file} does not exist")
    if Path(file).stat().st_size > MAX_XML_BYTES:
        raise ValueError(f"annotation {file} has more than {MAX_XML_BYTES} bytes: it is not a VOC annotation")
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    try:
        root = etree.fromstring(Path(file).read_bytes(), parser)
    except (etree.XMLSyntaxError, ValueError, OSError) as error:
        raise ValueError(f"annotation {file} cannot be read: {error}") from None
    if root.tag != "annotation":
        raise ValueError(f"annotation {file} is not a VOC annotation: its root is <{root.tag}>")
    # Only direct children: the <part> elements of a person also have names ("head", "hand").
    names = [(item.findtext("name") or "").strip() for item in root.findall("object")]
    if "" in names:
        raise ValueError(f"annotation {file} has an object without a name")
    try:
        size = int(root.findtext("size/height")), int(root.findtext("size/width"))
    except (TypeError, ValueError):
        size = None
    return VocAnnotation(list(dict.fromkeys(names)), size)


def class_indices(names: Sequence[str], classes: Sequence[str], file: str | Path) -> list[int]:
    """Return the indices of `names` in `classes`.

    Raises:
        ValueError: a name is not in `classes`; the message names the annotation `file`.
    """
    for name in names:
        if name not in classes:
            raise ValueError(f"annotation {file} contains the class {name!r}, which is not in the benchmark")
    return [classes.index(name) for name in names]


def _voc_xml_labels(folder: Path, classes: list[str], name: str) -> list[int]:
    file = folder / f"{name}.xml"
    return class_indices(read_voc_xml(file).names, classes, file)


# --- index masks ------------------------------------------------------------------------------------


def mask_labels(mask: np.ndarray, has_background: bool, num_classes: int, file: str | Path) -> list[int]:
    """Return the class indices in an index mask, ascending.

    Args:
        mask: (H, W) uint8; 255 is ignored. With a background class, 0 is background and k + 1 is class k;
            without one, k is class k.
        file: file of the mask, shown in errors.

    Raises:
        ValueError: a value is not a class.
    """
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=IGNORE + 1))
    labels = [int(value) - has_background for value in values if value != IGNORE]
    if labels and labels[-1] >= num_classes:
        raise ValueError(
            f"mask {file} has the value {labels[-1] + has_background}, which is not a class: "
            f"expected 0 to {num_classes - 1 + has_background}, or {IGNORE}"
        )
    return [label for label in labels if label >= 0]


def _painted_labels(folder: Path, has_background: bool, num_classes: int, name: str) -> list[int]:
    file = folder / f"{name}.png"
    return mask_labels(read_mask(file), has_background, num_classes, file)


# --- COCO instances ---------------------------------------------------------------------------------


class CocoImage(NamedTuple):
    """An image of an instances file."""

    size: tuple[int, int]  # (height, width)
    annotations: list[dict[str, Any]]  # unchanged, in the order of the file
    labels: list[int]  # classes of the annotations, including crowds, ascending


def read_coco_json(
    path: str | Path, num_classes: int, category_ids: Sequence[int] = ()
) -> dict[str, CocoImage]:
    """Return the images of a COCO instances file: name (file name without folder and suffix) -> image.

    Args:
        path: the JSON file.
        num_classes: number of classes of the benchmark.
        category_ids: the category id of each class; empty: the classes are the categories of the file, in
            ascending order of ids.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an instances file or is truncated, or its categories do not match the
            classes.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    try:
        content = json.loads(Path(path).read_bytes())
        images = {}
        for item in content["images"]:
            size = int(item["height"]), int(item["width"])
            images[item["id"]] = (Path(item["file_name"]).stem, CocoImage(size, [], []))
        declared = sorted(int(item["id"]) for item in content["categories"])
        for item in content["annotations"]:
            if item["category_id"] not in declared:
                raise ValueError(f"annotation {item['id']} has the unknown category {item['category_id']}")
            images[item["image_id"]][1].annotations.append(item)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"annotation file {path} is not a COCO instances file ({type(error).__name__}: {error})"
        ) from None
    ids = list(category_ids) or declared
    if len(ids) != num_classes or not set(declared) <= set(ids):
        raise ValueError(
            f"annotation file {path} declares {len(declared)} categories that do not match the {num_classes} "
            "classes of the benchmark"
        )
    for _, image in images.values():
        image.labels.extend(sorted({ids.index(item["category_id"]) for item in image.annotations}))
    return dict(images.values())
