"""COCO instances files: images, annotations and categories, as data sets and annotation tools write them.

Tools differ in the names of image files, in the categories they declare, and in the types of ids. What has
one meaning is read. A file without it is refused. A fault of one annotation concerns its image only.
"""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from reprlib import repr as shown  # short, also of deeply nested values
from typing import Any, NamedTuple
from urllib.parse import unquote

from segmentation.class_names import find_class
from segmentation.names import image_name

MAX_PIXELS = 178_956_970  # of an image; Pillow refuses larger ones (DecompressionBombError)
SUFFIX = re.compile(r"\.(jpe?g|jfif|jp2|png|bmp|gif|tiff?|tga|webp|p[bgp]m|avif|heic)$", re.IGNORECASE)
PLACEHOLDERS = ("background", "ignore")  # labelme's categories _background_ and __ignore__ have no objects
LISTED = 5  # number of names in an error message

Id = int | str


class CocoImage(NamedTuple):
    """An image of an instances file."""

    size: tuple[int, int] | None  # (height, width); None if the file declares no valid size
    annotations: list[dict[str, Any]]  # in the order of the file, unchanged except that category ids are `Id`
    labels: list[int]  # classes of the annotations, including crowds, ascending
    problems: Sequence[str] = ()  # faults of annotations; if there are any, `labels` is incomplete


class CocoFile(NamedTuple):
    """Content of an instances file."""

    images: dict[str, CocoImage]  # path of the image file, with / between folders and without suffix -> image
    problems: list[str]  # annotations that belong to no image of the file


class _Category(NamedTuple):
    name: str  # empty if the file does not name it
    supercategory: Any


def read_coco_json(
    path: str | Path, classes: Sequence[str] | int, category_ids: Sequence[int] = ()
) -> CocoFile:
    """Return the images of a COCO instances file.

    Entries for the same image file are merged, also if their ids differ. Numbers in text or with a fraction
    of 0 count as integers.

    Args:
        path: the JSON file.
        classes: classes of the benchmark, or only their number.
        category_ids: the category id of each class. Empty: categories and classes are matched by name (see
            `find_class`), or, if only the number of classes is known, by ascending ids. Categories without
            annotations can be left out of the classes.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an instances file, an id has two meanings, or the categories do not match
            the classes.
    """
    where = f"annotation file {path}"
    content = _load(path)
    images, by_id = _read_images(where, content["images"])
    categories = _read_categories(where, content["categories"])
    problems: list[str] = []
    used: set[Id] = set()
    for number, item in enumerate(content["annotations"]):
        if not isinstance(item, dict):
            raise ValueError(f"{where}: annotations[{number}] is not an object: {shown(item)}")
        if (image_id := _id(item.get("image_id"))) is None:
            fault = f"has no valid image_id: {shown(item.get('image_id'))}"
            raise ValueError(f"{where}: {_label(item, number)} {fault}")
        if image_id not in by_id:
            fault = f"belongs to image {shown(image_id)}, which is not in the file"
            problems.append(f"{_label(item, number)} {fault}")
            continue
        image = by_id[image_id]
        image.annotations.append(item)
        category = _id(item.get("category_id"))
        if category in categories:
            item["category_id"] = category
            used.add(category)
        elif category is None:
            fault = f"has no valid category_id: {shown(item.get('category_id'))}"
            image.problems.append(f"{_label(item, number)} {fault}")
        else:
            image.problems.append(f"{_label(item, number)} has the unknown category {shown(category)}")
    class_of = _match(where, categories, used, classes, category_ids)
    for image in images.values():
        if not image.problems:
            image.labels.extend(sorted({class_of[item["category_id"]] for item in image.annotations}))
    return CocoFile(images, problems)


def _label(annotation: dict[str, Any], number: int) -> str:
    if (annotation_id := _id(annotation.get("id"))) is None:
        return f"annotations[{number}]"
    return f"annotation {shown(annotation_id)}"


def _load(path: str | Path) -> dict[str, list]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    fault = f"annotation file {path} is not a COCO instances file"
    try:
        content = json.loads(Path(path).read_bytes())
    except UnicodeDecodeError:
        raise ValueError(f"{fault}: it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"{fault}: its lists are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{fault}: it is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{fault}: expected an object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise ValueError(f"{fault}: it has no {key}")
        if not isinstance(content[key], list):
            raise ValueError(f"{fault}: its {key} are {shown(content[key])}, expected a list")
    if not content["images"]:
        raise ValueError(f"annotation file {path} lists no images")
    return content


def _id(value: Any) -> Id | None:
    """Return an id or a side of an image; None if it is neither an integer nor text."""
    if type(value) is int:  # most common, so first
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        return int(value) if re.fullmatch("[0-9]{1,18}", value.strip()) else value.strip()
    return None


def _read_images(where: str, items: list) -> tuple[dict[str, CocoImage], dict[Id, CocoImage]]:
    """Return the images by path and by id."""
    images: dict[str, CocoImage] = {}
    files: dict[str, str] = {}  # path without suffix -> with suffix
    by_id: dict[Id, CocoImage] = {}
    names: dict[Id, str] = {}
    for number, item in enumerate(items):
        image_id = _id(item.get("id")) if isinstance(item, dict) else None
        if image_id is None:
            raise ValueError(f"{where}: images[{number}] has no valid id: {shown(item)}")
        file = _file(item.get("file_name"))
        if file is None:
            fault = f"image {shown(image_id)} has no valid file_name: {shown(item.get('file_name'))}"
            raise ValueError(f"{where}: {fault}; it is usually the last part of coco_url")
        name, size = SUFFIX.sub("", file), _size(item)
        try:  # the drive and the folders of another computer serve only to find the image
            image_name(re.sub("^[A-Za-z]:/", "", name))
        except ValueError as error:
            raise ValueError(f"{where}: image {shown(image_id)}: {error}") from None
        if name not in images:
            images[name], files[name] = CocoImage(size, [], [], []), file
        if files[name] != file:
            both = f"{one_line(files[name])} and {one_line(file)}"
            raise ValueError(f"{where}: {both} have the same name: rename one")
        if images[name].size != size:
            fault = f"is listed with the sizes {images[name].size} and {size}"
            raise ValueError(f"{where}: {one_line(file)} {fault}")
        if names.setdefault(image_id, name) != name:
            both = f"{one_line(files[names[image_id]])} and {one_line(file)}"
            raise ValueError(f"{where}: image id {shown(image_id)} is used for {both}: give each its own id")
        by_id[image_id] = images[name]
    return images, by_id


def _file(value: Any) -> str | None:
    """Return the path of an image file with / between folders, also of Windows and of URLs."""
    if not isinstance(value, str):
        return None
    text = value.strip().replace("\\", "/")
    if "://" in text:
        text = unquote(re.split("[?#]", text.split("://", 1)[1])[0])
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    return "/".join(parts) if parts and not text.endswith("/") else None


def _size(item: dict[str, Any]) -> tuple[int, int] | None:
    height, width = _id(item.get("height")), _id(item.get("width"))
    valid = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
    return (height, width) if valid and height * width <= MAX_PIXELS else None


def _read_categories(where: str, items: list) -> dict[Id, _Category]:
    categories: dict[Id, _Category] = {}
    for number, item in enumerate(items):
        category_id = _id(item.get("id")) if isinstance(item, dict) else None
        if category_id is None:
            raise ValueError(f"{where}: categories[{number}] has no valid id: {shown(item)}")
        name = item.get("name")
        name = str(name).strip() if isinstance(name, str | int) else ""
        known = categories.setdefault(category_id, _Category(name, item.get("supercategory")))
        if known.name != name:
            both = f"{one_line(known.name)} and {one_line(name)}"
            raise ValueError(f"{where}: category id {shown(category_id)} is used for {both}")
    return categories


def _match(
    where: str,
    categories: dict[Id, _Category],
    used: Collection[Id],
    classes: Sequence[str] | int,
    category_ids: Sequence[int],
) -> dict[Id, int]:
    """Return category id -> class index; see `read_coco_json`.

    Args:
        used: ids of the categories that have annotations.
    """
    num_classes = classes if isinstance(classes, int) else len(classes)
    mismatch = f"{where} declares {len(categories)} categories that do not match the {num_classes} classes"
    if category_ids:
        if len(category_ids) != num_classes:
            raise ValueError(f"category_ids has {len(category_ids)} ids, expected one for each class")
        class_of = {category: index for index, category in enumerate(category_ids)}
        if not class_of.keys() & categories.keys():
            raise ValueError(f"{mismatch}: none of them is in category_ids")
        if left_out := [category for category in categories if category in used and category not in class_of]:
            raise ValueError(f"{mismatch}: category_ids does not contain {_list(categories, left_out)}")
        return class_of
    if isinstance(classes, int):
        ids = sorted(categories, key=lambda category: (isinstance(category, str), category))
        if len(ids) != num_classes:
            ids = [category for category in ids if category in used or not _is_root(category, categories)]
        if len(ids) != num_classes:
            raise ValueError(f"{mismatch}: give category_ids, the id of each class")
        return {category: index for index, category in enumerate(ids)}
    found = {category: find_class(item.name, classes) for category, item in categories.items()}
    class_of = {category: index for category, index in found.items() if index is not None}
    unmatched = [category for category in categories if category not in class_of]
    missing = [name for index, name in enumerate(classes) if index not in class_of.values()]
    if missing or any(category in used for category in unmatched):
        raise ValueError(
            f"{mismatch} by name: rename them, or give category_ids, the id of each class. "
            f"Categories without a class: {_list(categories, unmatched)}; classes without a category: "
            f"{_cut(missing)}"
        )
    return class_of


def _is_root(category: Id, categories: dict[Id, _Category]) -> bool:
    """Return whether a category is the supercategory of others, as in files of Roboflow, or a placeholder."""
    name = categories[category].name
    above = any(item.supercategory == name for other, item in categories.items() if other != category)
    return (name != "" and above) or name.strip("_").casefold() in PLACEHOLDERS


def _list(categories: dict[Id, _Category], ids: Sequence[Id]) -> str:
    names = [one_line(categories[category].name) or "(no name)" for category in ids]
    return _cut([f"{name} (id {shown(category)})" for name, category in zip(names, ids, strict=True)])


def _cut(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(names[:LISTED]) or "none") + more


def one_line(text: str) -> str:
    """Return text of a file as it can be shown in a message."""
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:50]}...{line[-50:]}"
