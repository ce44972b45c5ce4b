"""Image-level labels: the classes that an image contains.

A `LabelReader` reads the labels of an image from any source: image name -> class indices (0-based, without
background). Readers can be pickled for worker processes.
"""
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lxml import etree

from foundation.logs import log
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.class_names import find_class
from segmentation.coco import one_line, read_coco_json
from segmentation.images import image_files
from segmentation.masks import CONVERTER, check_class_pixels, read_mask
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
        ValueError: the source contains no labels, or class indices that the benchmark does not have; or no
            mask of the split has a pixel of a class.
    """
    num_classes = len(benchmark.classes)
    if labels_file:
        return from_file(labels_file, num_classes)
    if benchmark.labels == "voc_xml":
        folder = _existing(benchmark.path(benchmark.annotation_dir), "annotation")
        return partial(_voc_xml_labels, folder, benchmark.classes)
    if benchmark.labels == "masks":
        folder = benchmark.path(benchmark.mask_dir)
        read = from_masks(folder, benchmark.has_background, num_classes)
        check_class_pixels(folder, list(split), benchmark)
        return read
    if benchmark.labels == "coco_json":
        file = benchmark.path(benchmark.annotation_file)
        return from_coco_json(file, benchmark.classes, benchmark.category_ids)
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


def from_masks(folder: str | Path, has_background: bool, num_classes: int) -> LabelReader:
    """Return a reader of the index masks `<name>.png` in a folder.

    The reader returns the class indices in a mask, ascending, see `mask_labels`. It raises FileNotFoundError
    or ValueError if the mask does not exist or is not an index mask.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    return partial(_painted_labels, _existing(Path(folder), "mask"), has_background, num_classes)


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

    Namespaces, the case of tags, elements around objects, and a root <annotations> around one annotation are
    ignored, because tools differ in them. Entities are not resolved, no other file is read, and gzip is not
    unpacked (as libxml2 does for files), because annotations can come from untrusted sources.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a VOC annotation, or an object does not have one name.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"annotation {file} does not exist")
    if Path(file).stat().st_size > MAX_XML_BYTES:
        raise ValueError(f"annotation {file} has more than {MAX_XML_BYTES} bytes: it is not a VOC annotation")
    try:
        root = _parse_xml(Path(file).read_bytes())
    except (etree.XMLSyntaxError, ValueError, OSError) as error:
        reason = " ".join(str(getattr(error, "msg", None) or error).split())  # libxml2 adds line breaks
        raise ValueError(f"annotation {file} cannot be read: {reason}") from None
    for element in root.iter("*"):
        if "}" in element.tag or not element.tag.islower():
            element.tag = etree.QName(element).localname.lower()
    if root.tag == "annotations" and len(root.findall("annotation")) == 1:
        root = root.find("annotation")
    if root.tag != "annotation":
        raise ValueError(
            f"annotation {file} is not a VOC annotation: its root is <{root.tag}>, expected <annotation>"
        )
    names = [_object_name(item, file) for item in root.iter("object")]
    try:
        size = int(root.findtext("size/height")), int(root.findtext("size/width"))
    except (TypeError, ValueError):
        size = None
    return VocAnnotation(list(dict.fromkeys(names)), size)


def _parse_xml(content: bytes) -> etree._Element:
    """Return the root of an XML document without comments and processing instructions.

    A document of UTF-8 is also read if it declares another encoding, which programs on Windows write.
    """
    content = content.lstrip(b"\xef\xbb\xbf \t\r\n")  # byte order mark, blanks
    options = {
        "resolve_entities": False, "no_network": True, "load_dtd": False,
        "remove_comments": True, "remove_pis": True,
    }  # fmt: skip
    try:
        return etree.fromstring(content, etree.XMLParser(**options))
    except etree.XMLSyntaxError as error:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            raise error from None
        return etree.fromstring(content, etree.XMLParser(encoding="utf-8", **options))


def _object_name(item: etree._Element, file: str | Path) -> str:
    # Only direct children: the <part> elements of a person also have names ("head", "hand").
    names = [(name.text or "").strip() for name in item.findall("name") if not len(name)]
    if not any(names):
        raise ValueError(f"annotation {file} has an object without a name")
    if len(names) > 1:
        raise ValueError(f"annotation {file} has an object with several names: {one_line(', '.join(names))}")
    return names[0]


def class_indices(names: Sequence[str], classes: Sequence[str], file: str | Path) -> list[int]:
    """Return the distinct indices of `names` in `classes`; see `find_class`.

    Raises:
        ValueError: a name is not in `classes`; the message names the annotation `file`.
    """
    indices = {}
    for name in names:
        if (index := find_class(name, classes)) is None:
            raise ValueError(
                f"annotation {file} contains the class {name!r}, which is not in the benchmark: correct the "
                "name, or add it to classes"
            )
        indices[index] = None
    return list(indices)


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
            f"expected 0 to {num_classes - 1 + has_background}, or {IGNORE}; {CONVERTER} converts masks "
            "with other values"
        )
    return [label for label in labels if label >= 0]


def _painted_labels(folder: Path, has_background: bool, num_classes: int, name: str) -> list[int]:
    file = folder / f"{name}.png"
    return mask_labels(read_mask(file), has_background, num_classes, file)


# --- COCO instances ---------------------------------------------------------------------------------


def from_coco_json(
    path: str | Path, classes: Sequence[str] | int, category_ids: Sequence[int] = ()
) -> LabelReader:
    """Return a reader of a COCO instances file; see `read_coco_json`, which reads the file immediately.

    The reader finds an image by the name of its file, with or without (some of) the folders in `file_name`.
    It returns an empty list for an image without annotations. It raises ValueError for an image that is not
    listed, that has an annotation without a known category, or whose name fits several files.

    Annotations that belong to no image of the file are logged as a warning.

    Raises:
        FileNotFoundError, ValueError: see `read_coco_json`; or no annotation belongs to an image of the file.
    """
    images, unused = read_coco_json(path, classes, category_ids)
    if unused and not any(image.annotations for image in images.values()):
        raise ValueError(f"annotation file {path}: no annotation belongs to an image; {unused[0]}")
    if unused:
        log.warning(
            "annotation file %s: %d annotations are ignored; %s%s",
            path, len(unused), "; ".join(unused[:3]), "; ..." if len(unused) > 3 else "",
        )  # fmt: skip
    table: dict[str, dict[str, list[int] | str]] = {}
    for file, image in images.items():
        labels = image.problems[0] if image.problems else image.labels
        table.setdefault(file.split("/")[-1], {})[file] = labels
    return partial(_coco_labels, table, str(path))


def _coco_labels(table: dict[str, dict[str, list[int] | str]], source: str, name: str) -> list[int]:
    """Return the labels of an image; `table`: name without folders -> path -> labels, or their fault."""
    files = table.get(name.split("/")[-1], {})
    matches = [name] if name in files else [file for file in files if file.endswith(f"/{name}")]
    if not matches:
        raise ValueError(f"image {name} is not listed in {source}")
    if len(matches) > 1:
        raise ValueError(
            f"image {name} can be {one_line(matches[0])} or {one_line(matches[1])} in {source}: put the "
            "folder before the name, or rename one"
        )
    labels = files[matches[0]]
    if isinstance(labels, str):
        raise ValueError(f"image {name} in {source}: {labels}")
    return labels
