"""CAM weightings: activations and their gradients -> a raw CAM.

Each function takes activations and gradients (..., C, h, w) and returns the weighted sum over
channels (..., h, w), before the ReLU. `gradients` may have more leading axes than `activations`.
"""
from collections.abc import Callable

import torch
from torch import Tensor

# Against division by zero, as in the pytorch-grad-cam package.
PLUS_PLUS_EPSILON, X_EPSILON = 1e-6, 1e-7


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Weigh channels by the mean gradient (Selvaraju et al., ICCV 2017)."""
    weights = gradients.mean((-2, -1), keepdim=True)  # (..., C, 1, 1)
    return (weights * activations).sum(-3)


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Weigh channels by the sum over positions of alpha relu(g), with gradients g, activations a and
    alpha = g^2 / (2 g^2 + sum(a) g^3), where g is not 0 (Chattopadhyay et al., WACV 2018)."""
    square = gradients**2
    total = activations.sum((-2, -1), keepdim=True)  # (..., C, 1, 1)
    alpha = square / (2 * square + total * square * gradients + PLUS_PLUS_EPSILON)
    weights = (gradients.relu() * torch.where(gradients != 0, alpha, 0)).sum((-2, -1), keepdim=True)
    return (weights * activations).sum(-3)


def x_grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Weigh channels by the mean gradient, itself weighted by activation (Fu et al., BMVC 2020)."""
    total = activations.sum((-2, -1), keepdim=True) + X_EPSILON
    weights = (gradients * activations / total).sum((-2, -1), keepdim=True)
    return (weights * activations).sum(-3)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Weigh each position by its own positive gradient (Jiang et al., TIP 2021)."""
    return (gradients.relu() * activations).sum(-3)


# Flags, checks and `any_model` read this registry.
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcam": grad_cam,
    "gradcam++": grad_cam_plus_plus,
    "xgradcam": x_grad_cam,
    "layercam": layer_cam,
}


def min_max_normalize(cams: Tensor) -> Tensor:
    """Return (x - min) / (1e-7 + max(x - min)) of each map x of `cams` (..., h, w), float32.

    The epsilon is that of the reference implementation. Maps with a range near or below 1e-7 (raw CAMs of
    improbable labels) stay well below 1; a constant map becomes 0.
    """
    cams = cams.float()
    cams = cams - cams.amin((-2, -1), keepdim=True)
    return cams / (1e-7 + cams.amax((-2, -1), keepdim=True))


def activation_map(raw: Tensor) -> Tensor:
    """Return raw CAMs (..., h, w) in [0, 1]: ReLU, then normalized twice.

    The reference implementation normalizes for the layer and again for the mean over its single layer; on
    faint maps the second epsilon changes the result."""
    return min_max_normalize(min_max_normalize(raw.relu()))
