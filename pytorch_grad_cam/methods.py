"""From activations and their gradients to a raw CAM, four ways.

Each function takes activations and gradients (..., C, h, w) and returns the weighted sum over
channels (..., h, w), before the ReLU. `gradients` may have more leading axes than `activations`.
"""
from collections.abc import Callable

import torch
from torch import Tensor

#: Against division by zero, as in the widely used pytorch-grad-cam package.
PLUS_PLUS_EPSILON, X_EPSILON = 1e-6, 1e-7


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Weights are mean gradients (Selvaraju et al., ICCV 2017)."""
    weights = gradients.mean((-2, -1), keepdim=True)  # (..., C, 1, 1)
    return (weights * activations).sum(-3)


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Positive gradients, weighted by their share at each place (Chattopadhyay et al., WACV 2018)."""
    square = gradients**2
    total = activations.sum((-2, -1), keepdim=True)  # (..., C, 1, 1)
    share = square / (2 * square + total * square * gradients + PLUS_PLUS_EPSILON)
    weights = (gradients.relu() * torch.where(gradients != 0, share, 0)).sum((-2, -1), keepdim=True)
    return (weights * activations).sum(-3)


def x_grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Gradients weighted by activation, per channel (Fu et al., BMVC 2020)."""
    total = activations.sum((-2, -1), keepdim=True) + X_EPSILON
    weights = (gradients * activations / total).sum((-2, -1), keepdim=True)
    return (weights * activations).sum(-3)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Every place is weighted by its own positive gradient (Jiang et al., TIP 2021)."""
    return (gradients.relu() * activations).sum(-3)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcam": grad_cam,
    "gradcam++": grad_cam_plus_plus,
    "xgradcam": x_grad_cam,
    "layercam": layer_cam,
}


def scale(maps: Tensor) -> Tensor:
    """Min-max scaling of each (h, w) map: (x - min) / (1e-7 + max(x - min)), float32.

    The epsilon is the public code's and matters: where a map's range is near or below 1e-7 (raw
    CAMs of improbable labels) the result stays well below 1; a constant map gives zeros.
    """
    maps = maps.float()
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (1e-7 + maps.amax((-2, -1), keepdim=True))


def activation_map(raw: Tensor) -> Tensor:
    """Raw CAM (..., h, w) -> [0, 1]: ReLU, then scaled twice, once for the layer and once for the
    (single-layer) aggregate, as the public code does; the second epsilon shows on faint maps."""
    return scale(scale(raw.float().relu()).relu())
