"""Stages 1 and 2: what each patch shows, refined along the attention of the blocks before the last.

Shapes: B images of one size, n = h * w patches, C names.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from clip.model import VisionTransformer
from pytorch_grad_cam.affinity import box_masks
from tagclip.config import TagSettings


class PatchLevel(NamedTuple):
    """What the tower says of every patch.

    Attributes:
        tokens: (B, 1 + n, E) projected, not normalised; class token first.
        attention: (B, n, n) float32, averaged, and 0 where too few blocks voted.
        grid: (h, w).
    """

    tokens: Tensor
    attention: Tensor
    grid: tuple[int, int]


@torch.no_grad()
def patch_level(visual: VisionTransformer, images: Tensor, settings: TagSettings) -> PatchLevel:
    """One pass in which the last block has every token attend to itself alone, so that patches keep what is
    their own.

    Maps are summed and voted on as they come; none is kept.

    Args:
        images: (B, 3, H', W'), normalised, sides multiples of the patch.
    """
    layers = visual.layers
    averaging, voters = settings.averaging(layers), settings.voters(layers)
    tokens, grid = visual.embed(images, settings.position_rounding)
    length = tokens.shape[1]
    total = tokens.new_zeros(len(tokens), length - 1, length - 1, dtype=torch.float32)
    votes = torch.zeros_like(total, dtype=torch.uint8)
    for index in range(layers):
        mask = None
        if index == layers - 1:
            bias = max(settings.diagonal_bias, torch.finfo(tokens.dtype).min)
            mask = tokens.new_full((length, length), bias).fill_diagonal_(0)
        need_weights = index in averaging or index in voters
        tokens, attention = visual.block(index, tokens, mask, need_weights)
        if attention is None:
            continue
        related = attention[:, 1:, 1:]  # (B, n, n), its rows sum to less than 1
        if index in averaging:
            total += related
        if index in voters:
            mean = related.mean((1, 2), keepdim=True)
            votes += related > settings.vote_threshold * mean
        del attention, related  # n x n numbers that the next block has no room for on a large image
    total /= len(averaging)
    total[votes < settings.votes_needed(layers)] = 0
    return PatchLevel(visual.project(tokens).float(), total, grid)


def class_probabilities(tokens: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Softmax over names of the scaled cosine similarities.

    Args:
        tokens: (..., E) image features.
        text: (C, E) of unit length.
        logit_scale: its logarithm, as CLIP stores it.

    Returns:
        (..., C) float32.
    """
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    return (logit_scale.float().exp() * tokens @ text.T).softmax(-1)


def spread(maps: Tensor) -> Tensor:
    """(..., n, C) -> each map over its n patches from 0 to 1; a constant one is 0."""
    maps = maps - maps.amin(-2, keepdim=True)
    top = maps.amax(-2, keepdim=True)
    return maps / top.masked_fill(top == 0, 1)


def class_boxes(first: Tensor, grid: tuple[int, int], settings: TagSettings) -> Tensor:
    """The patches that speak for each name: boxes around those above the mean of its map.

    Args:
        first: (B, n, C), what plain propagation gives.

    Returns:
        (B, n, C) float32 of 0 and 1.
    """
    maps = spread(first).mT.unflatten(-1, grid)  # (B, C, h, w)
    thresholds = settings.box_threshold * maps.mean((-2, -1))  # (B, C)
    return box_masks(maps, thresholds, settings.cover_edge).flatten(-2).mT.float()


def refined_probabilities(
    coarse: Tensor, attention: Tensor, grid: tuple[int, int], settings: TagSettings
) -> Tensor:
    """Dual-masking attention refinement: patches take over what related patches within the boxes say.

    Args:
        coarse: (B, n, C), see `class_probabilities`.
        attention: (B, n, n), see `patch_level`.

    Returns:
        (B, n, C) float32; how much depends on the attention, rows of which are not normalised.
    """
    boxes = class_boxes(attention @ coarse, grid, settings)
    return attention @ (boxes * coarse)
