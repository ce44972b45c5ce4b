"""Stages 1 and 2: class probabilities of each patch, refined by the attention of earlier blocks.

Shapes: B images of one size, n = h * w patches, C names.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from clip.model import VisionTransformer
from pytorch_grad_cam.affinity import box_masks
from tagclip.config import TagSettings


class PatchLevel(NamedTuple):
    """The tower's output for every patch.

    Attributes:
        tokens: (B, 1 + n, E) projected, not normalized; class token first.
        attention: (B, n, n) float32, the average over blocks, and 0 for pairs of patches with too few votes.
        grid: (h, w).
    """

    tokens: Tensor
    attention: Tensor
    grid: tuple[int, int]


@torch.no_grad()
def patch_level(visual: VisionTransformer, images: Tensor, settings: TagSettings) -> PatchLevel:
    """Return the tower's output for every patch. In the last block every token attends only to itself.

    Without attention in the last block, patch tokens keep local information. The attention maps of blocks are
    added up during the pass and not stored.

    Args:
        images: (B, 3, H', W'), normalized, sides multiples of the patch.
    """
    layers = visual.layers
    averaged, voters = settings.averaged(layers), settings.voters(layers)
    tokens, grid = visual.embed(images, settings.position_rounding)
    length = tokens.shape[1]
    total = tokens.new_zeros(len(tokens), length - 1, length - 1, dtype=torch.float32)
    votes = torch.zeros_like(total, dtype=torch.uint8)
    for index in range(layers):
        mask = None
        if index == layers - 1:
            bias = max(settings.diagonal_bias, torch.finfo(tokens.dtype).min)
            mask = tokens.new_full((length, length), bias).fill_diagonal_(0)
        need_weights = index in averaged or index in voters
        tokens, attention = visual.block(index, tokens, mask, need_weights)
        if attention is None:
            continue
        related = attention[:, 1:, 1:]  # (B, n, n); rows sum to less than 1 without the class token
        if index in averaged:
            total += related
        if index in voters:
            mean = related.mean((1, 2), keepdim=True)
            votes += related > settings.vote_threshold * mean
        del attention, related  # frees the n x n maps before the next block
    total /= len(averaged)
    total[votes < settings.votes_needed(layers)] = 0
    return PatchLevel(visual.project(tokens).float(), total, grid)


def class_probabilities(tokens: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the softmax over names of the scaled cosine similarities.

    Args:
        tokens: (..., E) image features.
        text_features: (C, E) of unit length.
        logit_scale: scalar, logarithm of the scale, as CLIP stores it.

    Returns:
        (..., C) float32.
    """
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    return (logit_scale.float().exp() * tokens @ text_features.T).softmax(-1)


def min_max_normalize(maps: Tensor) -> Tensor:
    """Return maps (..., n, C), each scaled to [0, 1] over its n patches; a constant map becomes 0.

    No epsilon is added; `pytorch_grad_cam.methods.min_max_normalize` adds one. Both follow the publications.
    """
    maps = maps - maps.amin(-2, keepdim=True)
    highest = maps.amax(-2, keepdim=True)
    return maps / highest.masked_fill(highest == 0, 1)


def class_boxes(propagated: Tensor, grid: tuple[int, int], settings: TagSettings) -> Tensor:
    """Return the class boxes: for each name, the boxes around patches above the mean of its map.

    Args:
        propagated: (B, n, C), probabilities multiplied by the attention.
        grid: (h, w).

    Returns:
        (B, n, C) float32 of 0 and 1.
    """
    maps = min_max_normalize(propagated).mT.unflatten(-1, grid)  # (B, C, h, w)
    thresholds = settings.box_threshold * maps.mean((-2, -1))  # (B, C)
    return box_masks(maps, thresholds, settings.include_edge).flatten(-2).mT.float()


def refined_probabilities(
    coarse: Tensor, attention: Tensor, grid: tuple[int, int], settings: TagSettings
) -> Tensor:
    """Return A (box * P), the probabilities P after dual-masking attention refinement with attention A.

    Args:
        coarse: P (B, n, C), see `class_probabilities`.
        attention: A (B, n, n), see `patch_level`.
        grid: (h, w).

    Returns:
        (B, n, C) float32; not probabilities, because the rows of A do not sum to 1.
    """
    boxes = class_boxes(attention @ coarse, grid, settings)
    return attention @ (boxes * coarse)
