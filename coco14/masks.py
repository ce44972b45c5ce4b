"""Index masks from COCO instance annotations.

COCO annotates objects, and objects overlap; an index mask has one class per pixel. It is not documented
which object gets a shared pixel in the published masks. By default, the smallest object gets it, so that no
larger object hides a smaller one.
"""
from typing import Any, Literal, get_args

import numpy as np
from pycocotools import mask as rle_codec

from coco14 import CLASS_INDEX
from segmentation.labels import CocoImage

Overlap = Literal["smallest", "first", "last"]
OVERLAPS = get_args(Overlap)


def rasterize(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return the pixels of an annotation (polygons, or run lengths of a crowd) as COCO's compressed RLE.

    Raises:
        ValueError: pycocotools cannot rasterize the annotation, or the size of its RLE is not `size`.
    """
    height, width = size
    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, list):
            # A polygon of fewer than three points has no area, but pycocotools reads two points as a box.
            polygons = [polygon for polygon in shape if len(polygon) >= 6]
            if not polygons:
                return rle_codec.encode(np.zeros(size, np.uint8, order="F"))
            return rle_codec.merge(rle_codec.frPyObjects(polygons, height, width))
        if tuple(shape["size"]) != (height, width):
            raise ValueError(f"its size is {shape['size']}, but the image is {[height, width]}")
        if isinstance(shape["counts"], list):
            if (pixels := sum(shape["counts"])) != height * width:
                raise ValueError(f"its run lengths cover {pixels} pixels, the image has {height * width}")
            return rle_codec.frPyObjects(shape, height, width)
        return shape
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"annotation {annotation.get('id')} cannot be rasterized: {error}") from None


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
