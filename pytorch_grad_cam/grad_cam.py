"""Text-driven softmax Grad-CAM on a frozen CLIP (Lin et al., CVPR 2023, section 3.1).

The score of a label is its probability p_k after a softmax over the labels of the image and a list of
background prompts, computed from the *mean patch feature* f of the last block:

    p = softmax(tau T f / |f|)          T: text features (K + M, E); tau: CLIP's logit scale
    dp_k = p_k (e_k - p) . dlogits      e_k: unit vector of label k

The gradient of p_k with respect to the ln_1 output of the last block, averaged over the patches, is the
weight of each channel in the CAM. All labels of a batch are computed at once. The blocks before the last run
once, without gradients.

Shapes: B images of equal size, K labels, M background prompts, n = h * w patches. Text features have length E
and norm 1. `valid` (B, K) bool is False at padding; None means no padding. Results are float32.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.model import CLIP, VisionTransformer
from pytorch_grad_cam import last_block
from pytorch_grad_cam.methods import METHODS, activation_map

AFFINITY_LAYERS = 8  # CLIP-ES averages the attention of the last 8 blocks


@dataclass
class TextCAMs:
    """CAMs of a batch of images."""

    cams: Tensor  # (B, K, h, w) in [0, 1]
    raw: Tensor  # (B, K, h, w), before the ReLU
    probabilities: Tensor  # (B, K + M), labels, then backgrounds
    affinity: Tensor | None  # (B, n, n) over patches, see `text_cams`; None for a ResNet without `affinity`


@dataclass
class Encoded:
    """Result of all blocks except the last."""

    tokens: Tensor  # (B, 1 + n, C)
    attention: Tensor | None  # (B, 1 + n, 1 + n), sum over `num_maps` blocks; None if num_maps is 0
    num_maps: int
    grid: tuple[int, int]  # (h, w)


def text_cams(
    model: CLIP,
    images: Tensor,
    text_features: Tensor,
    background_features: Tensor,
    valid: Tensor | None = None,
    method: str = "gradcam",
    affinity_layers: int = AFFINITY_LAYERS,
    exclude_last_layer: bool = False,
    position_rounding: str = "always",
    affinity: Callable[[Tensor], Tensor] | None = None,
) -> TextCAMs:
    """Return CAMs of the labels of a batch of images of equal size.

    Args:
        images: (B, 3, H', W'), see `clip.preprocess`.
        text_features: (B, K, E) of each image's labels.
        background_features: (M, E) of the background prompts.
        valid: (B, K) bool or None; the CAMs of padding are 0.
        method: a name in `pytorch_grad_cam.methods.METHODS`. "gradcam" computes the mean gradient in closed
            form; the others need the gradient at each patch, computed by automatic differentiation.
        affinity_layers: number of last blocks whose attention is averaged.
        exclude_last_layer: exclude the last block from this average. The reference implementation of CLS-SEG
            averages `[-8:-1]`, 7 blocks.
        position_rounding: see `clip.positions`.
        affinity: function that maps `images` to an affinity (B, n, n), which replaces the averaged attention.

    Raises:
        ValueError: the method is unknown, no block remains to average, or `affinity` returns an invalid
            matrix, see `check_affinity`.
    """
    if method not in METHODS:
        raise ValueError(f"CAM method must be one of {', '.join(METHODS)}, got {method!r}")
    visual, candidates = model.visual, (text_features, background_features, valid)
    if isinstance(visual, VisionTransformer):
        if affinity is not None:
            affinity_layers = 0
        elif exclude_last_layer and min(affinity_layers, visual.layers) < 2:
            raise ValueError(
                f"with exclude_last_layer and affinity_layers {affinity_layers} no block remains to average: "
                "set affinity_layers to 2 or more"
            )
        encoded = encode(visual, images, affinity_layers, position_rounding)
        if method == "gradcam":
            activations, weights, probabilities, last = mean_gradients(model, encoded.tokens, *candidates)
            raw = (weights @ activations.mT).unflatten(-1, encoded.grid)  # (B, K, h, w)
        else:
            activations, gradients, probabilities, last = full_gradients(
                model, encoded.tokens, encoded.grid, *candidates
            )
            raw = METHODS[method](activations[:, None], gradients)
        matrix, num_maps = encoded.attention, encoded.num_maps
        if not exclude_last_layer:
            matrix, num_maps = last if matrix is None else matrix.add_(last), num_maps + 1
        if affinity is None:
            matrix = matrix[:, 1:, 1:] / num_maps
    else:
        with torch.no_grad():
            features = visual.stages(images)  # (B, C, h, w)
        gradients, probabilities = feature_gradients(model, features, *candidates, position_rounding)
        raw, matrix = METHODS[method](features.float()[:, None], gradients), None
    if affinity is not None:
        with torch.no_grad():
            matrix = affinity(images)
        check_affinity(matrix, len(images), raw.shape[-2:])
    return TextCAMs(activation_map(raw), raw, probabilities, matrix)


def check_affinity(matrix: Tensor, batch: int, grid: tuple[int, int]) -> None:
    """Raise ValueError unless an affinity is (B, n, n), finite and non-negative, for n = h * w patches."""
    if not isinstance(matrix, Tensor):
        raise ValueError(f"affinity must return a torch tensor, got {type(matrix).__name__}")
    n = grid[0] * grid[1]
    if matrix.shape != (batch, n, n):
        raise ValueError(
            f"affinity returned shape {tuple(matrix.shape)}, expected {(batch, n, n)}: one row and column "
            f"for each of the {grid[0]} x {grid[1]} patches"
        )
    if not ((matrix >= 0) & (matrix < torch.inf)).all():
        raise ValueError("affinity returned values that are negative or not finite: return values >= 0")


@torch.no_grad()
def encode(
    visual: VisionTransformer,
    images: Tensor,
    affinity_layers: int = AFFINITY_LAYERS,
    position_rounding: str = "always",
) -> Encoded:
    """Return the result of all blocks except the last, see `text_cams`.

    Blocks whose attention is not averaged use fused attention.
    """
    tokens, grid = visual.embed(images, position_rounding)
    first = min(max(0, visual.layers - affinity_layers), visual.layers - 1)
    total = None
    for index in range(visual.layers - 1):
        tokens, attention = visual.block(index, tokens, need_weights=index >= first)
        if attention is not None:
            total = attention if total is None else total.add_(attention)
    return Encoded(tokens, total, visual.layers - 1 - first, grid)


@torch.no_grad()
def mean_gradients(
    model: CLIP,
    tokens: Tensor,
    text_features: Tensor,
    background_features: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the channel weights of Grad-CAM for tokens (B, 1 + n, C), in closed form, see `last_block`.

    Returns:
        activations (B, n, C), weights (B, K, C), probabilities (B, K + M) and the last block's attention
        (B, 1 + n, 1 + n).
    """
    saved = last_block.forward(model.visual, tokens)
    num_labels = text_features.shape[1]
    length = saved.feature.norm(dim=-1, keepdim=True)  # (B, 1), |f|
    feature = saved.feature / length
    logits, candidates = _logits(model, feature, text_features, background_features, valid)
    probabilities = logits.softmax(-1)
    # d log p_k / df: gradient with respect to f / |f|, then the chain rule for f. e_k - p is computed before
    # the product with T: for p_k near 1, the difference of two weighted sums of text features is inaccurate.
    dlogits = torch.eye(candidates.shape[1], device=candidates.device)[:num_labels] - probabilities[:, None]
    directions = dlogits @ candidates  # (B, K, K + M) @ (B, K + M, E)
    directions = directions - (directions @ feature[:, :, None]) * feature[:, None]
    directions = directions * (model.logit_scale.exp() / length)[:, None]
    # The gradient is linear in the direction. With directions of norm 1 it stays in the range of half
    # precision. The factor p_k is applied in float32, so that improbable labels do not underflow.
    norms = directions.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    weights = last_block.vjp(saved, directions / norms) * norms * probabilities[:, :num_labels, None]
    return saved.ln1_output, weights, probabilities, saved.attention


def full_gradients(
    model: CLIP,
    tokens: Tensor,
    grid: tuple[int, int],
    text_features: Tensor,
    background_features: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at each patch, by automatic differentiation; `mean_gradients` returns their mean.

    Returns:
        activations (B, C, h, w), gradients (B, K, C, h, w), probabilities (B, K + M) and the last block's
        attention (B, 1 + n, 1 + n).
    """
    visual, block = model.visual, model.visual.transformer.resblocks[-1]
    with torch.enable_grad():
        ln1_output = block.ln_1(tokens).detach().requires_grad_()  # (B, 1 + n, C)
        # `block.forward` is never compiled, but `block` may be; compiled code cannot batch gradients.
        output, attention = block.forward(tokens, need_weights=True, ln1_output=ln1_output)
        pooled = visual.ln_post(output[:, 1:].float()).mean(1) @ visual.proj.float()  # (B, E)
        gradients, probabilities = _softmax_gradients(
            model, pooled, ln1_output, text_features, background_features, valid
        )
    gradients = gradients[:, :, 1:].mT.unflatten(-1, grid)  # (B, K, C, h, w)
    activations = ln1_output.detach()[:, 1:].float().mT.unflatten(-1, grid)  # (B, C, h, w)
    return activations, gradients, probabilities, attention.detach()


def feature_gradients(
    model: CLIP,
    features: Tensor,
    text_features: Tensor,
    background_features: Tensor,
    valid: Tensor | None = None,
    position_rounding: str = "always",
) -> tuple[Tensor, Tensor]:
    """Return the gradients of each label's probability, and the probabilities, for a ResNet tower.

    Args:
        features: (B, C, h, w), output of the last stage.

    Returns:
        gradients with respect to `features` (B, K, C, h, w), and probabilities (B, K + M).
    """
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        pooled = model.visual.attnpool(features, position_rounding).float()
        return _softmax_gradients(model, pooled, features, text_features, background_features, valid)


def _softmax_gradients(
    model: CLIP,
    pooled: Tensor,
    activations: Tensor,
    text_features: Tensor,
    background_features: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return dp_k / d activations of all labels k, (B, K, *activations.shape[1:]), and p (B, K + M).

    One batched vector-Jacobian product computes the gradient of log p_k, which is the gradient of
    logit_k - sum_j p_j logit_j with constant p. The factor p_k is applied in float32, so that improbable
    labels do not underflow in half precision.
    """
    num_labels = text_features.shape[1]
    feature = F.normalize(pooled, dim=-1)
    logits, _ = _logits(model, feature, text_features, background_features, valid)
    probabilities = logits.detach().softmax(-1)
    finite = logits.masked_fill(logits.isinf(), 0)
    targets = finite[:, :num_labels] - (probabilities * finite).sum(-1, keepdim=True)  # (B, K)
    unit = torch.eye(num_labels, device=targets.device)[:, None].expand(-1, len(targets), -1)  # (K, B, K)
    (gradients,) = torch.autograd.grad(targets, activations, unit, is_grads_batched=True)
    gradients = gradients.transpose(0, 1).float()  # (B, K, ...)
    factors = probabilities[:, :num_labels].reshape(*gradients.shape[:2], *[1] * (gradients.dim() - 2))
    return gradients * factors, probabilities


def _logits(
    model: CLIP, feature: Tensor, text_features: Tensor, background_features: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the logits tau T f / |f|, (B, K + M), -inf at padding, and T, (B, K + M, E).

    `feature` is f / |f|, (B, E).
    """
    backgrounds = background_features.expand(len(text_features), -1, -1)
    candidates = torch.cat([text_features, backgrounds], 1).float()
    logits = model.logit_scale.exp() * (candidates @ feature[:, :, None])[..., 0]
    if valid is not None:
        logits = logits.masked_fill(F.pad(~valid, (0, len(background_features))), float("-inf"))
    return logits, candidates
