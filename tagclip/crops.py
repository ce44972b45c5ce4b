"""Stage 3, class-wise reidentification: what a class seems to be on is cropped and looked at once more."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip.model import VisionTransformer
from tagclip.config import TagSettings
from tagclip.patches import spread


class Crop(NamedTuple):
    """Where an image seems to show a class.

    Attributes:
        key: class index.
        box: (top, left, bottom, right) in patches, ends exclusive.
        cells: (bottom - top, right - left) bool, the patches of the class.
    """

    key: int
    box: tuple[int, int, int, int]
    cells: np.ndarray


def candidate_threshold(refined: Tensor, ratio: float) -> Tensor:
    """What a class must score to be looked at again; in the range it is taken from backgrounds count, too.

    Args:
        refined: (n, C) of one image.
        ratio: see `TagSettings`.
    """
    low, high = refined.aminmax()
    return low + ratio * (high - low)


def candidates(refined: Tensor, classes: int, ratio: float) -> list[int]:
    """The classes, ascending, that are looked at again: the first `classes` names are those."""
    found = refined[:, :classes].amax(0) > candidate_threshold(refined, ratio)
    return found.nonzero().flatten().tolist()


def crops(refined: Tensor, grid: tuple[int, int], keys: Sequence[int], settings: TagSettings) -> list[Crop]:
    """The crops of an image's candidates, in their order.

    The first empty one ends the list, see `TagSettings.skip_empty_crops`.

    Args:
        refined: (n, C).
        keys: the candidates.
    """
    cells = spread(refined[:, list(keys)]) > settings.cell_threshold  # (n, K)
    height, width = grid
    most = (height, width) if settings.cover_edge else (height - 1, width - 1)
    found = []
    for key, map_cells in zip(keys, cells.T.reshape(-1, height, width).cpu().numpy(), strict=True):
        (top, bottom), (left, right) = (
            _extent(map_cells.any(axis), end) for axis, end in ((1, most[0]), (0, most[1]))
        )
        if top < bottom and left < right:
            box = top, left, bottom, right
            found.append(Crop(key, box, map_cells[top:bottom, left:right]))
        elif not settings.skip_empty_crops:
            break
    return found


def _extent(line: np.ndarray, most: int) -> tuple[int, int]:
    """First and, exclusive, last True of a line, no further than `most`."""
    places = np.flatnonzero(line)
    return (int(places[0]), min(int(places[-1]) + 1, most)) if len(places) else (0, 0)


def cut(image: Tensor, crop: Crop, patch: int, size: int) -> tuple[Tensor, Tensor]:
    """A crop as the tower sees it.

    Args:
        image: (3, H', W'), normalised.
        patch: side of a patch.
        size: side of the crop, a multiple of `patch`.

    Returns:
        (3, size, size), bilinear without antialiasing, and which of its patches are of the class,
        (size / patch squared,) bool.
    """
    top, left, bottom, right = crop.box
    pixels = image[None, :, top * patch : bottom * patch, left * patch : right * patch]
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)[0]
    grid = size // patch
    # By whole numbers: F.interpolate's nearest multiplies by a rounded factor.
    rows, columns = (np.arange(grid) * side // grid for side in crop.cells.shape)
    return pixels, torch.from_numpy(crop.cells[np.ix_(rows, columns)].ravel())


@torch.no_grad()
def class_tokens(visual: VisionTransformer, pixels: Tensor, cells: Tensor, settings: TagSettings) -> Tensor:
    """The class tokens of crops, which see nothing but the patches of the class.

    Args:
        pixels: (M, 3, size, size), see `cut`.
        cells: (M, n) bool.

    Returns:
        (M, E) float32, not normalised.
    """
    tokens, _ = visual.embed(pixels, settings.position_rounding)
    batch, length, _ = tokens.shape
    mask = tokens.new_zeros(batch, 1, length, length)
    bias = max(settings.crop_bias, torch.finfo(tokens.dtype).min)
    mask[:, 0, 0, 1:].masked_fill_(~cells.to(mask.device), bias)
    *_, (tokens, _) = visual.blocks(tokens, mask=mask)
    return visual.project(tokens[:, 0]).float()
