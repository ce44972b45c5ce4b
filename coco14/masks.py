"""Index masks from COCO instance annotations.

COCO annotates objects, which overlap; an index mask gives every pixel one class. `Overlap` says whose
a pixel is. Published masks do not document their convention, so ours is chosen: the smallest object keeps
the pixel, so that none vanishes under a larger one.
"""
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle_codec

from segmentation.labels import CocoImage

Overlap = Literal["smallest", "first", "last"]

# How to order (annotation position, pixel area) for painting, what is painted later covering the rest.
_ORDER: dict[Overlap, Callable[[tuple[int, int]], int]] = {
    "smallest": lambda item: -item[1],
    "first": lambda item: -item[0],
    "last": lambda item: item[0],
}
OVERLAPS = tuple(_ORDER)


def rasterise(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The pixels of one annotation (polygons, or the run lengths of a crowd) as COCO's compressed RLE.

    Raises:
        ValueError: no segmentation that COCO's rasteriser reads, or one of another size.
    """
    height, width = size
    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, list):
            # Fewer than three points enclose nothing, but pycocotools would read two as a box.
            polygons = [polygon for polygon in shape if len(polygon) >= 6]
            if not polygons:
                return rle_codec.encode(np.zeros(size, np.uint8, order="F"))
            return rle_codec.merge(rle_codec.frPyObjects(polygons, height, width))
        if tuple(shape["size"]) != (height, width):
            raise ValueError(f"its size {shape['size']} is not the image's")
        if isinstance(shape["counts"], list):
            if sum(shape["counts"]) != height * width:
                raise ValueError("its run lengths do not cover the image")
            return rle_codec.frPyObjects(shape, height, width)
        return shape
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"annotation {annotation.get('id')} cannot be rasterised: {error}") from None


def paint(image: CocoImage, indices: dict[int, int], overlap: Overlap = "smallest") -> np.ndarray:
    """Paint the objects of an image, crowds included.

    Args:
        image: size and annotations.
        indices: official category id -> class index.
        overlap: whose a pixel is that several objects cover: the "smallest" object's (by rasterised area;
            of equals, the later annotated), or that of the "first" or "last" annotated.

    Returns:
        (H, W) uint8: 0 = no object, class index + 1 elsewhere.

    Raises:
        ValueError: an annotation that cannot be rasterised.
    """
    shapes = [rasterise(annotation, image.size) for annotation in image.annotations]
    areas = [(position, int(rle_codec.area(shape))) for position, shape in enumerate(shapes)]
    mask = np.zeros(image.size, np.uint8)
    for position, _ in sorted(areas, key=_ORDER[overlap]):
        index = indices[image.annotations[position]["category_id"]]
        mask[rle_codec.decode(shapes[position]).astype(bool)] = index + 1
    return mask
