"""A plain TagCLIP that works like the reference implementation, for benchmarks only.

It computes one image, one class and one crop at a time. Every block computes the attention of all heads and
returns it, also for crops. The maps of an image are stored and stacked before the vote. Each name has its own
boxes and its own masked product with the attention. The scores are those of `tagclip.tag_images` in float32.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clip
from clip.model import CLIP, Block, VisionTransformer
from tagclip.config import TagSettings


@torch.no_grad()
def reference_tags(
    model: CLIP, image: Image.Image, text: Tensor, classes: int, settings: TagSettings
) -> np.ndarray:
    """Return the class scores of one image.

    Args:
        text: (C, E) features of the names, classes first.
        classes: number of names that are scored.
        settings: `include_edge` and `skip_empty_crops` must be off, as in the reference implementation.

    Returns:
        (K,) float32.
    """
    visual, patch = model.visual, model.visual.patch_size
    size = clip.target_size(image.height, image.width, patch)
    height, width = size[0] // patch, size[1] // patch
    pixels = clip.preprocess(image, size, model.config.mean, model.config.std)[None].to(model.device)
    length, layers = 1 + height * width, visual.layers
    diagonal = torch.full((length, length), settings.diagonal_bias, device=pixels.device).fill_diagonal_(0)
    tokens, maps = _encode(visual, pixels, [None] * (layers - 1) + [diagonal], settings)
    coarse = _probabilities(model, tokens[1:], text)  # (n, C)
    attention = torch.stack(maps)[:, 1:, 1:]  # (layers, n, n)
    means = attention.flatten(1).mean(1)[:, None, None]
    voters = settings.voters(layers)
    votes = (attention > settings.vote_threshold * means)[voters.start : voters.stop].sum(0)
    averaging = settings.averaged(layers)
    related = attention[averaging.start : averaging.stop].mean(0)
    related = related * (votes >= settings.votes_needed(layers))  # (n, n)
    first = related @ coarse
    refined = first.clone()  # (n, C)
    for name in range(len(text)):
        if first[:, name].max() > 0:
            values = _min_max_normalize(first[:, name]).reshape(height, width).cpu().numpy()
            mask = _boxes(values, settings.box_threshold)
            mask = torch.from_numpy(mask.ravel()).to(related.device)
            refined[:, name] = (related * mask) @ coarse[:, name]
    scores = refined[:, :classes].amax(0)  # (K,)
    threshold = refined.min() + settings.ratio * (refined.max() - refined.min())
    for key in (scores > threshold).nonzero().flatten().tolist():
        cells = (_min_max_normalize(refined[:, key]) > settings.cell_threshold).reshape(height, width)
        rows, columns = (cells.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        top, left, bottom, right = 0, 0, 0, 0
        if rows:
            top, bottom = rows[0], min(rows[-1] + 1, height - 1)
            left, right = columns[0], min(columns[-1] + 1, width - 1)
        if top >= bottom or left >= right:
            break
        crop = pixels[..., patch * top : patch * bottom, patch * left : patch * right]
        probability = _crop_probability(model, crop, cells[top:bottom, left:right], text, settings)[key]
        scores[key] = settings.local_weight * scores[key] + (1 - settings.local_weight) * probability
    return scores.cpu().numpy()


def _crop_probability(
    model: CLIP, crop: Tensor, cells: Tensor, text: Tensor, settings: TagSettings
) -> Tensor:
    """Return the probabilities (C,) of a crop whose class token attends only to the patches in `cells`."""
    side = settings.crop_size or model.config.image_resolution
    grid = side // model.visual.patch_size
    crop = F.interpolate(crop, (side, side), mode="bilinear", align_corners=False)
    rows, columns = (torch.arange(grid) * count // grid for count in cells.shape)
    mask = torch.zeros(1 + grid**2, 1 + grid**2, device=crop.device)
    mask[0, 1:] = settings.crop_bias * ~cells[rows][:, columns].flatten()
    tokens, _ = _encode(model.visual, crop, [mask] * model.visual.layers, settings)
    return _probabilities(model, tokens[:1], text)[0]


def _encode(
    visual: VisionTransformer, pixels: Tensor, masks: list[Tensor | None], settings: TagSettings
) -> tuple[Tensor, list[Tensor]]:
    """Return all tokens of one image, projected (L, E), and the attention map (L, L) of every block."""
    tokens, _ = visual.embed(pixels, settings.position_rounding)
    tokens, maps = tokens[0], []
    for block, mask in zip(visual.transformer.resblocks, masks, strict=True):
        tokens, attention = _block(block, tokens, mask)
        maps.append(attention)
    return visual.project(tokens), maps


def _block(block: Block, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the tokens (L, C) after a block, and its unmasked attention (L, L), averaged over heads."""
    attn, (length, width) = block.attn, tokens.shape
    packed = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)  # (L, 3C)
    query, key, value = (
        part.reshape(length, attn.heads, -1).transpose(0, 1) for part in packed.chunk(3, -1)
    )  # (heads, L, C / heads)
    scores = (query * query.shape[-1] ** -0.5) @ key.mT  # (heads, L, L)
    weights = attention = scores.softmax(-1)
    if mask is not None:
        weights = (scores + mask).softmax(-1)
    mixed = (weights @ value).transpose(0, 1).reshape(length, width)
    tokens = tokens + attn.out_proj(mixed)
    return tokens + block.mlp(block.ln_2(tokens)), attention.mean(0)


def _probabilities(model: CLIP, tokens: Tensor, text: Tensor) -> Tensor:
    """Return (m, C), the softmax over names, for tokens (m, E)."""
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    return (model.logit_scale.exp() * tokens @ text.T).softmax(-1)


def _min_max_normalize(values: Tensor) -> Tensor:
    """Return values (n,) scaled to [0, 1]; all 0 if they are equal."""
    values = values - values.min()
    return values / values.max() if values.max() > 0 else values


def _boxes(values: np.ndarray, threshold: float) -> np.ndarray:
    """Return boxes (h, w) of 0 and 1 around the parts of a map (h, w) above a multiple of its mean."""
    levels = (255 * values).astype(np.uint8)
    active = (levels > int(threshold * values.mean() * levels.max())).astype(np.uint8)
    contours, _ = cv2.findContours(active, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    mask = np.zeros(values.shape, np.float32)
    bottom, right = values.shape[0] - 1, values.shape[1] - 1
    for x, y, width, height in map(cv2.boundingRect, contours):
        mask[y : min(y + height, bottom), x : min(x + width, right)] = 1
    return mask
