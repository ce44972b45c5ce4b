"""Index masks from COCO instance annotations.

COCO annotates objects, and objects overlap; an index mask has one class per pixel. It is not documented
which object gets a shared pixel in the published masks. By default, the smallest object gets it, so that no
larger object hides a smaller one.
"""
from collections.abc import Sequence
from reprlib import repr as shown  # short, also of deeply nested values
from typing import Any, Literal, get_args

import numpy as np
from pycocotools import mask as rle_codec

from coco14 import CLASS_INDEX
from segmentation.coco import CocoImage

Overlap = Literal["smallest", "first", "last"]
OVERLAPS = get_args(Overlap)

# Length of the polygons of an annotation, in pixels. pycocotools takes 0.3 s and 50 MB for this length.
MAX_OUTLINE = 1_000_000
REACH = 10  # a polygon may leave the image by this many times the longer side; farther points are errors
# Pixels. The official files contain slivers that touch no pixel center; their `area` is below this.
TINY_AREA = 25


def rasterize(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return the pixels of an annotation as COCO's compressed RLE.

    Besides COCO's polygons and run lengths, this reads variants that annotation tools write: polygons as
    point pairs, one polygon without the list around it, and lists of run lengths. pycocotools does not
    check its input: wrong run lengths make it crash, and distant points take gigabytes. So all input is
    checked first.

    Args:
        annotation: its `segmentation`, and, if there is one, its `area`.
        size: (height, width) of the image.

    Raises:
        ValueError: the segmentation is missing or damaged, is of another size than `size`, or covers no pixel
            although the annotated area is not tiny.
    """
    height, width = size
    shape = annotation.get("segmentation")
    try:
        if not shape:
            raise ValueError("it has no segmentation" + ", only a bounding box" * ("bbox" in annotation))
        parts = _parts(shape, size)
        # A polygon of fewer than three points has no area, but pycocotools reads two points as a box.
        polygons = [part for part in parts if isinstance(part, list) and len(part) >= 6]
        run_lengths = [part for part in parts if isinstance(part, dict)]
        if (length := _outline(polygons)) > MAX_OUTLINE:
            raise ValueError(f"its polygons are {length:.0f} pixels long, expected at most {MAX_OUTLINE}")
        rles = [
            rle
            for objects in (polygons, run_lengths)  # pycocotools takes objects of one type
            if objects
            for rle in rle_codec.frPyObjects(objects, height, width)
        ]
        rle = rle_codec.merge(rles)
        if not rles or not rle_codec.area(rle):
            area = annotation.get("area")
            is_tiny = isinstance(area, int | float) and 0 <= area < TINY_AREA
            in_image = run_lengths or any(_touches(polygon, size) for polygon in polygons)
            if not (is_tiny and in_image):
                raise ValueError("it covers no pixel of the image")
        return rle
    except ValueError as error:
        raise ValueError(f"annotation {shown(annotation.get('id'))} cannot be rasterized: {error}") from None


def _parts(shape: Any, size: tuple[int, int], depth: int = 0) -> list[list[float] | dict[str, Any]]:
    """Return the polygons [x, y, x, y, ...] and uncompressed run lengths of a segmentation."""
    if isinstance(shape, dict):
        return [_run_lengths(shape, size)]
    if not isinstance(shape, list) or depth > 3:
        raise ValueError(f"its segmentation contains {shown(shape)}, expected polygons or run lengths")
    if shape and not isinstance(shape[0], list | dict):
        return [_polygon(shape, size)]
    if all(_is_point(item) for item in shape):
        return [_polygon([value for point in shape for value in point], size)]
    return [part for item in shape for part in _parts(item, size, depth + 1)]


def _is_point(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and not isinstance(item[0], list | dict)


def _polygon(values: list, size: tuple[int, int]) -> list[float]:
    """Return a polygon that pycocotools can draw."""
    low, high = -REACH * max(size), (REACH + 1) * max(size)
    for value in values:
        if type(value) not in (int, float) or value != value:
            raise ValueError(f"its coordinate {shown(value)} is not a number")
        if not low <= value <= high:
            raise ValueError(f"its coordinate {shown(value)} is far outside the image, {size[0]} x {size[1]}")
    if len(values) % 2:
        raise ValueError(f"a polygon has {len(values)} numbers, expected pairs x, y")
    if len(values) >= 6 and min(values) >= 0 and max(values) <= 1 < max(size):
        raise ValueError("its coordinates are all between 0 and 1, expected pixels")
    return values


def _outline(polygons: list[list[float]]) -> float:
    """Return the length of polygons in pixels, or a bound of it that is at most `MAX_OUTLINE`."""
    bound = sum(len(values) * (max(values) - min(values)) for values in polygons)
    if bound <= MAX_OUTLINE:
        return bound  # as nearly always, and cheaper
    points = [np.array(values, float).reshape(-1, 2) for values in polygons]
    return sum(np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum() for xy in points)


def _touches(polygon: list[float], size: tuple[int, int]) -> bool:
    """Return whether the bounding box of a polygon meets the image."""
    sides = ((polygon[0::2], size[1]), (polygon[1::2], size[0]))
    return all(min(values) <= side and max(values) >= 0 for values, side in sides)


def _run_lengths(shape: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return run lengths as uncompressed RLE, which cover the image exactly."""
    if "size" not in shape or "counts" not in shape:
        raise ValueError("its segmentation has no size and counts")
    height, width = size
    declared, counts = shape["size"], shape["counts"]
    if not isinstance(declared, list | tuple) or list(declared) != [height, width]:
        raise ValueError(f"its size is {shown(declared)}, but the image is {[height, width]}")
    if isinstance(counts, str | bytes):
        counts = _decompress(counts)
    elif not isinstance(counts, list):
        raise ValueError(f"its counts are {shown(counts)}, expected run lengths")
    for count in counts:
        if type(count) is not int and not (isinstance(count, float) and count.is_integer()):
            raise ValueError(f"its run length {shown(count)} is not an integer")
        if count < 0:
            raise ValueError(f"its run length {shown(count)} is negative")
    if (pixels := sum(counts)) != height * width:
        raise ValueError(f"its run lengths cover {shown(pixels)} pixels, the image has {height * width}")
    return {"size": [height, width], "counts": [int(count) for count in counts]}


def _decompress(text: str | bytes) -> Sequence[int]:
    """Return the run lengths of COCO's compressed RLE.

    Each character has 5 bits of a number, lowest bits first, and a bit that is set if more characters follow.
    The last character has the sign. From the fourth run on, numbers are differences to the run two before.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text if isinstance(text, bytes) else map(ord, text):
        bits = code - ord("0")
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("its compressed run lengths are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("its compressed run lengths are cut short")
    return counts


def paint(image: CocoImage, overlap: Overlap = "smallest") -> np.ndarray:
    """Return the index mask of an image's objects, including crowds.

    Args:
        image: size and annotations.
        overlap: the object that gets a pixel where several overlap: "smallest" (by rasterized area; of equal
            areas, the later annotation), or the "first" or "last" annotation.

    Returns:
        (H, W) uint8: 0 where there is no object, else class index + 1.

    Raises:
        ValueError: an annotation cannot be rasterized.
    """
    objects = [(rasterize(annotation, image.size), annotation) for annotation in image.annotations]
    if overlap == "smallest":
        objects.sort(key=lambda item: -int(rle_codec.area(item[0])))
    elif overlap == "first":
        objects.reverse()
    mask = np.zeros(image.size, np.uint8)
    for rle, annotation in objects:  # later ones cover earlier ones
        mask[rle_codec.decode(rle).astype(bool)] = CLASS_INDEX[annotation["category_id"]] + 1
    return mask
