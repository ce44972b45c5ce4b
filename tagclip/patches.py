"""Stages 1 and 2: what each patch shows, refined along the attention of the blocks before the last.

Shapes: B images of one size, n = h * w patches, C names.
"""

import math
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
    patches = tokens.shape[1] - 1
    total = tokens.new_zeros(len(tokens), patches, patches, dtype=torch.float32)
    votes = torch.zeros_like(total, dtype=torch.uint8)
    for index in range(layers):
        if index < layers - 1:
            tokens, attention = visual.block(index, tokens, maps=index in averaging or index in voters)
        else:
            tokens, attention = last_block(visual, tokens, settings.diagonal_bias)
        if attention is None:
            continue
        related = attention[:, 1:, 1:]  # (B, n, n), its rows sum to less than 1
        if index in averaging:
            total += related
        if index in voters:
            mean = related.mean((1, 2), keepdim=True)
            votes += related > settings.vote_threshold * mean
    total /= len(averaging)
    total[votes < settings.votes_needed(layers)] = 0
    return PatchLevel(visual.project(tokens).float(), total, grid)


def last_block(visual: VisionTransformer, tokens: Tensor, bias: float) -> tuple[Tensor, Tensor]:
    """The last block, its attention as `attend_to_self` has it; gives what `VisionTransformer.block` does."""
    block = visual.transformer.resblocks[-1]
    mixed, attention = attend_to_self(*block.attn.qkv(block.ln_1(tokens)), bias)
    tokens = tokens + block.attn.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, L, C)
    return tokens + block.mlp(block.ln_2(tokens)), attention


def attend_to_self(query: Tensor, key: Tensor, value: Tensor, bias: float) -> tuple[Tensor, Tensor]:
    """Attention with `bias` added to what other tokens say, and its map without.

    With A = softmax(S), e = exp(bias) and D = A_ii + e (1 - A_ii), the biased weights are A_ii / D and, off
    the diagonal, e A_ij / D, so A @ v and v say it all. No matrix of such weights is made: those of e^-100
    are denormal numbers, with which a CPU takes ten times as long for the block.

    Args:
        query, key, value: (B, heads, L, 64).
        bias: 0 or less.

    Returns:
        mixed values (B, heads, L, 64); the map (B, L, L) float32, see `clip.model.Attention.forward`.
    """
    batch, heads, length, width = query.shape
    scores = query.new_empty(batch, length, length)  # head by head, as `clip.model.attend_with_map` does
    weights = torch.empty_like(scores, dtype=torch.float32)
    attention = torch.zeros_like(weights)
    mixed = torch.empty_like(value)
    e = math.exp(bias)
    for head in range(heads):
        torch.bmm(query[:, head] * width**-0.5, key[:, head].mT, out=scores)
        torch.softmax(scores, -1, dtype=torch.float32, out=weights)
        attention.add_(weights)
        # A_ii in float64, from the row's largest weight: in float32 it may be 0 where it exceeds e.
        behind = scores.diagonal(dim1=-2, dim2=-1).double() - scores.amax(-1).double()  # (B, L)
        own = behind.exp() * weights.amax(-1)
        heard = (weights.to(value.dtype) @ value[:, head]).double()  # (B, L, 64)
        both = own[..., None] * (1 - e) * value[:, head] + e * heard
        mixed[:, head] = both / (own + e * (1 - own))[..., None]
    return mixed, attention.div_(heads)


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
