"""Text-driven softmax Grad-CAM on a frozen CLIP (Lin et al., CVPR 2023, section 3.1).

The score of a label is its probability after a softmax over the labels of the image and a list of
background prompts, computed from the *mean patch feature* of the last block. Its gradient with
respect to that block's ln_1 output, averaged over the patches, weighs the channels of the CAM. All
labels of all images of a batch are done at once; blocks before the last run once, without gradient.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.model import CLIP, VisionTransformer
from pytorch_grad_cam.last_block import LastBlock
from pytorch_grad_cam.methods import METHODS, activation_map

AVERAGED_BLOCKS = 8  # whose attention makes the affinity: the last 8; CLIP-ES includes the very last


@dataclass
class TextCAMs:
    """CAMs of a batch of images of equal size; h x w is the patch grid, n = h * w.

    Attributes:
        cams: (B, K, h, w) float32 in [0, 1].
        raw: (B, K, h, w) float32, before the ReLU.
        probabilities: (B, K + M) float32: labels, then backgrounds.
        attention: (B, n, n) float32, mean over heads and the averaged blocks, patches only; None
            for a ResNet tower, which has no attention between places.
    """

    cams: Tensor
    raw: Tensor
    probabilities: Tensor
    attention: Tensor | None


@dataclass
class Encoded:
    """Tokens (B, 1 + n, C) before the last block, the summed attention maps (B, 1 + n, 1 + n) of
    those averaged blocks that ran already (None if none did) with their number, and the grid."""

    tokens: Tensor
    attention: Tensor | None
    maps: int
    grid: tuple[int, int]


@torch.no_grad()
def encode(
    visual: VisionTransformer,
    images: Tensor,
    averaged: int = AVERAGED_BLOCKS,
    position_rounding: str = "always",
) -> Encoded:
    """Run all blocks but the last.

    Args:
        images: (B, 3, H', W'), see `clip.preprocess`.
        averaged: blocks, counted from the end and with the very last, whose attention is averaged.
        position_rounding: see `clip.positions`.
    """
    tokens, grid = visual.embed(images, position_rounding)
    first = min(max(0, visual.layers - averaged), visual.layers - 1)
    fused = visual.blocks(tokens, stop=first)
    for tokens, _ in fused:
        pass
    total, mapped = None, visual.blocks(tokens, first, -1, maps=True)
    for tokens, attention in mapped:
        total = attention if total is None else total.add_(attention)
    return Encoded(tokens, total, visual.layers - 1 - first, grid)


def text_cams(
    model: CLIP,
    images: Tensor,
    text: Tensor,
    backgrounds: Tensor,
    present: Tensor | None = None,
    method: str = "gradcam",
    averaged: int = AVERAGED_BLOCKS,
    leave_out_last: bool = False,
    position_rounding: str = "always",
) -> TextCAMs:
    """CAMs of the given labels of a batch of images of equal size.

    Args:
        images: (B, 3, H', W'), see `clip.preprocess`.
        text: (B, K, E) features of each image's labels, unit length; rows past an image's last
            label are padding.
        backgrounds: (M, E) features of the background prompts.
        present: (B, K) bool, False at padding; None when there is none. Padding gets zero CAMs.
        method: see `pytorch_grad_cam.methods.METHODS`. "gradcam" takes the mean gradient in closed
            form; the others need the whole gradient, by automatic differentiation.
        averaged: blocks, counted from the end, whose attention is averaged.
        leave_out_last: average without the very last of them, which counts all the same: public code
            has `[-8:-1]`, 7 blocks.
        position_rounding: see `clip.positions`.

    Raises:
        ValueError: unknown method, or no block is left to average.
    """
    if method not in METHODS:
        raise ValueError(f"CAM method must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(model.visual, VisionTransformer):
        with torch.no_grad():
            features = model.visual.stages(images)  # (B, C, h, w)
        gradients, probabilities = feature_gradients(
            model, features, text, backgrounds, present, position_rounding
        )
        raw = METHODS[method](features.float()[:, None], gradients)
        return TextCAMs(activation_map(raw), raw, probabilities, None)
    if leave_out_last and min(averaged, model.visual.layers) < 2:
        raise ValueError("without the last block none is left to average: it takes 2 blocks or more")
    encoded = encode(model.visual, images, averaged, position_rounding)
    if method == "gradcam":
        activations, weights, probabilities, last_map = mean_gradients(
            model, encoded.tokens, text, backgrounds, present
        )
        raw = (weights @ activations.mT).unflatten(-1, encoded.grid)  # (B, K, h, w)
    else:
        activations, gradients, probabilities, last_map = full_gradients(
            model, encoded.tokens, encoded.grid, text, backgrounds, present
        )
        raw = METHODS[method](activations[:, None], gradients)
    total, maps = encoded.attention, encoded.maps
    if not leave_out_last:
        total, maps = last_map if total is None else total.add_(last_map), maps + 1
    attention = total[:, 1:, 1:] / maps
    return TextCAMs(activation_map(raw), raw, probabilities, attention)


@torch.no_grad()
def mean_gradients(
    model: CLIP, tokens: Tensor, text: Tensor, backgrounds: Tensor, present: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Channel weights of Grad-CAM in closed form, see `LastBlock`.

    Args:
        tokens: (B, 1 + n, C) before the last block.

    Returns:
        activations (B, n, C), weights (B, K, C), probabilities (B, K + M) and the last block's
        attention (B, 1 + n, 1 + n), all float32.
    """
    last = LastBlock(model.visual, tokens)
    labels = text.shape[1]
    candidates = _candidates(text, backgrounds)
    length = last.pooled.norm(dim=-1, keepdim=True)  # (B, 1)
    feature = last.pooled / length
    probabilities = _logits(model, feature, candidates, labels, present).softmax(-1)
    # d logit_k - sum_j p_j d logit_j, along the text features, then through the normalisation. The
    # difference is taken between numbers, not between vectors, which at p_k near 1 are almost equal.
    shares = torch.eye(candidates.shape[1], device=candidates.device)[:labels] - probabilities[:, None]
    directions = shares @ candidates  # (B, K, K + M) @ (B, K + M, E)
    directions = directions - (directions @ feature[:, :, None]) * feature[:, None]
    directions = directions * (model.logit_scale.exp() / length)[:, None]
    # The gradient is linear in the direction: unit length keeps it inside half precision's range,
    # and multiplying the probability last keeps improbable labels from vanishing there.
    norms = directions.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    weights = last.mean_gradient(directions / norms) * norms * probabilities[:, :labels, None]
    return last.normed, weights, probabilities, last.attention


def full_gradients(
    model: CLIP,
    tokens: Tensor,
    grid: tuple[int, int],
    text: Tensor,
    backgrounds: Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole gradient of each label's probability with respect to the last block's ln_1 output,
    by automatic differentiation.

    Returns:
        activations (B, C, h, w), gradients (B, K, C, h, w), probabilities (B, K + M) and the last
        block's attention (B, 1 + n, 1 + n), all float32.
    """
    visual = model.visual
    with torch.no_grad():
        normed = visual.transformer.resblocks[-1].ln_1(tokens)  # (B, L, C)
    with torch.enable_grad():
        normed.requires_grad_()
        output, attention = visual.block(-1, tokens, maps=True, normed=normed)
        pooled = visual.ln_post(output[:, 1:].float()).mean(1) @ visual.proj.float()  # (B, E)
        gradients, probabilities = _softmax_gradients(model, pooled, normed, text, backgrounds, present)
    gradients = gradients[:, :, 1:].mT.unflatten(-1, grid)  # (B, K, C, h, w)
    activations = normed.detach()[:, 1:].float().mT.unflatten(-1, grid)  # (B, C, h, w)
    return activations, gradients, probabilities, attention.detach()


def feature_gradients(
    model: CLIP,
    features: Tensor,
    text: Tensor,
    backgrounds: Tensor,
    present: Tensor | None = None,
    position_rounding: str = "always",
) -> tuple[Tensor, Tensor]:
    """The same for a ResNet tower, with respect to its last stage.

    Args:
        features: (B, C, h, w), see `ModifiedResNet.stages`.

    Returns:
        gradients (B, K, C, h, w) and probabilities (B, K + M), float32.
    """
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        pooled = model.visual.attnpool(features, position_rounding).float()
        return _softmax_gradients(model, pooled, features, text, backgrounds, present)


def _softmax_gradients(
    model: CLIP,
    pooled: Tensor,
    activations: Tensor,
    text: Tensor,
    backgrounds: Tensor,
    present: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """d p_k / d activations for all labels k in one batched vector-Jacobian product.

    Differentiated is logit_k minus the probability-weighted mean logit; the factor p_k follows in
    float32, so that improbable labels do not underflow in half precision.

    Returns:
        (B, K, *activations.shape[1:]) and probabilities (B, K + M), float32.
    """
    labels = text.shape[1]
    feature = F.normalize(pooled, dim=-1)
    logits = _logits(model, feature, _candidates(text, backgrounds), labels, present)
    probabilities = logits.detach().softmax(-1)
    finite = logits.masked_fill(logits.isinf(), 0)
    targets = finite[:, :labels] - (probabilities * finite).sum(-1, keepdim=True)  # (B, K)
    unit = torch.eye(labels, device=targets.device)[:, None].expand(-1, len(targets), -1)  # (K, B, K)
    (gradients,) = torch.autograd.grad(targets, activations, unit, is_grads_batched=True)
    gradients = gradients.transpose(0, 1).float()  # (B, K, ...)
    chances = probabilities[:, :labels].reshape(*gradients.shape[:2], *[1] * (gradients.dim() - 2))
    return gradients * chances, probabilities


def _candidates(text: Tensor, backgrounds: Tensor) -> Tensor:
    """(B, K, E) and (M, E) -> (B, K + M, E) float32."""
    return torch.cat([text, backgrounds.expand(len(text), -1, -1)], 1).float()


def _logits(model: CLIP, feature: Tensor, candidates: Tensor, labels: int, present: Tensor | None) -> Tensor:
    """Scaled cosine similarities (B, K + M); -inf at padded labels."""
    logits = model.logit_scale.exp() * (candidates @ feature[:, :, None])[..., 0]
    if present is None:
        return logits
    padded = F.pad(~present, (0, logits.shape[1] - labels))
    return logits.masked_fill(padded, float("-inf"))
