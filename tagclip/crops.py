"""Stage 3, class-wise reidentification: classify the image region of each candidate class again."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip.model import VisionTransformer
from tagclip.config import TagSettings
from tagclip.patches import min_max_normalize


class Crop(NamedTuple):
    """The image region of a candidate class.

    Attributes:
        class_id: class index.
        box: (top, left, bottom, right) in patches, ends exclusive.
        cells: (bottom - top, right - left) bool, True for patches of the class.
    """

    class_id: int
    box: tuple[int, int, int, int]
    cells: np.ndarray


def candidate_threshold(refined: Tensor, ratio: float) -> Tensor:
    """Return the score above which a class is cropped, from the range of all scores in `refined` (n, C)."""
    low, high = refined.aminmax()
    return low + ratio * (high - low)


def candidates(refined: Tensor, num_classes: int, ratio: float) -> list[int]:
    """Return the indices of the classes to crop, ascending.

    Args:
        refined: (n, C); the first `num_classes` of the C names are classes, the others backgrounds.
        ratio: see `TagSettings`.
    """
    above = refined[:, :num_classes].amax(0) > candidate_threshold(refined, ratio)
    return above.nonzero().flatten().tolist()


def crops(
    refined: Tensor, grid: tuple[int, int], class_ids: Sequence[int], settings: TagSettings
) -> list[Crop]:
    """Return the crops of the candidates of an image, in the order of `class_ids`.

    An empty crop ends the list, as in the reference implementation, unless `settings.skip_empty_crops`.

    Args:
        refined: (n, C), n = h * w patches.
        grid: (h, w).
        class_ids: the candidates.
    """
    cells = min_max_normalize(refined[:, list(class_ids)]) > settings.cell_threshold  # (n, K)
    height, width = grid
    most = (height, width) if settings.include_edge else (height - 1, width - 1)
    cropped = []
    for class_id, map_cells in zip(class_ids, cells.T.reshape(-1, height, width).cpu().numpy(), strict=True):
        top, bottom = _extent(map_cells.any(1), most[0])
        left, right = _extent(map_cells.any(0), most[1])
        if top < bottom and left < right:
            box = top, left, bottom, right
            cropped.append(Crop(class_id, box, map_cells[top:bottom, left:right]))
        elif not settings.skip_empty_crops:
            break
    return cropped


def _extent(line: np.ndarray, most: int) -> tuple[int, int]:
    """Return the range [start, end) of the True values of `line`, with `end` at most `most`."""
    indices = np.flatnonzero(line)
    return (int(indices[0]), min(int(indices[-1]) + 1, most)) if len(indices) else (0, 0)


def cut(image: Tensor, crop: Crop, patch: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the pixels of a crop, resized for the tower, and the patches of the class in it.

    Args:
        image: (3, H', W'), normalized.
        patch: side of a patch in pixels.
        size: side of the result in pixels, a multiple of `patch`.

    Returns:
        (3, size, size), resized bilinearly without antialiasing; and ((size / patch)^2,) bool, True for
        patches of the class.
    """
    top, left, bottom, right = crop.box
    pixels = image[None, :, top * patch : bottom * patch, left * patch : right * patch]
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)[0]
    grid = size // patch
    # Integer arithmetic is exact; F.interpolate's nearest mode multiplies by a rounded factor.
    rows, columns = (np.arange(grid) * side // grid for side in crop.cells.shape)
    return pixels, torch.from_numpy(crop.cells[np.ix_(rows, columns)].ravel())


@torch.no_grad()
def class_tokens(visual: VisionTransformer, pixels: Tensor, cells: Tensor, settings: TagSettings) -> Tensor:
    """Return the class tokens of crops. Each class token attends only to the patches of its class.

    Args:
        pixels: (M, 3, size, size), see `cut`.
        cells: (M, n) bool.

    Returns:
        (M, E) float32, not normalized.
    """
    tokens, _ = visual.embed(pixels, settings.position_rounding)
    batch, length, _ = tokens.shape
    mask = tokens.new_zeros(batch, 1, length, length)
    bias = max(settings.crop_bias, torch.finfo(tokens.dtype).min)
    mask[:, 0, 0, 1:].masked_fill_(~cells.to(mask.device), bias)
    *_, (tokens, _) = visual.blocks(tokens, mask=mask)
    return visual.project(tokens[:, 0]).float()
