"""CAM methods: activations and their gradients -> a raw CAM.

Each function takes activations and gradients (..., C, h, w) and returns the weighted sum over channels
(..., h, w), before the ReLU. `gradients` may have more leading axes than `activations`. `combine` replaces
the sum: it maps the weighted activations (..., C, h, w) to (..., h, w), see `principal_component`.
"""
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# These avoid division by zero, as in the pytorch-grad-cam package.
PLUS_PLUS_EPSILON, X_EPSILON = 1e-6, 1e-7
Combine = Callable[[Tensor], Tensor]


def channel_sum(weighted: Tensor) -> Tensor:
    """Return the sum over channels of (..., C, h, w)."""
    return weighted.sum(-3)


def principal_component(weighted: Tensor) -> Tensor:
    """Return the first principal component of the channels (Muhammad and Yeasin, IJCNN 2020).

    This is `eigen_smooth` of the pytorch-grad-cam package. As there, the sign is that of NumPy's SVD, so
    strong regions may have negative values.

    Args:
        weighted: (B, C, h, w), finite.

    Returns:
        (B, h, w): the channels of each position, minus their mean over all positions, projected on the first
        right singular vector.
    """
    columns = weighted.flatten(2).mT.cpu().numpy()  # (B, n, C)
    columns = columns - columns.mean(1, keepdims=True)
    directions = np.linalg.svd(columns, full_matrices=False)[2][:, 0, :, None]  # (B, C, 1)
    return torch.from_numpy(columns @ directions).to(weighted.device).reshape(-1, *weighted.shape[2:])


def grad_cam(activations: Tensor, gradients: Tensor, combine: Combine = channel_sum) -> Tensor:
    """Weight channels by the mean gradient (Selvaraju et al., ICCV 2017)."""
    weights = gradients.mean((-2, -1), keepdim=True)  # (..., C, 1, 1)
    return combine(weights * activations)


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor, combine: Combine = channel_sum) -> Tensor:
    """Weight channels by the sum over positions of alpha relu(g) (Chattopadhyay et al., WACV 2018).

    alpha = g^2 / (2 g^2 + sum(a) g^3) for gradients g that are not 0, else 0; a are the activations.
    """
    square = gradients**2
    total = activations.sum((-2, -1), keepdim=True)  # (..., C, 1, 1)
    alpha = square / (2 * square + total * square * gradients + PLUS_PLUS_EPSILON)
    weights = (gradients.relu() * torch.where(gradients != 0, alpha, 0)).sum((-2, -1), keepdim=True)
    return combine(weights * activations)


def x_grad_cam(activations: Tensor, gradients: Tensor, combine: Combine = channel_sum) -> Tensor:
    """Weight channels by the activation-weighted mean gradient (Fu et al., BMVC 2020)."""
    total = activations.sum((-2, -1), keepdim=True) + X_EPSILON
    weights = (gradients * activations / total).sum((-2, -1), keepdim=True)
    return combine(weights * activations)


def layer_cam(activations: Tensor, gradients: Tensor, combine: Combine = channel_sum) -> Tensor:
    """Weight each position of each channel by its positive gradient (Jiang et al., TIP 2021)."""
    return combine(gradients.relu() * activations)


# Flags, checks and `any_model` use this registry.
METHODS: dict[str, Callable[..., Tensor]] = {
    "gradcam": grad_cam,
    "gradcam++": grad_cam_plus_plus,
    "xgradcam": x_grad_cam,
    "layercam": layer_cam,
}


def min_max_normalize(cams: Tensor) -> Tensor:
    """Return (x - min) / (1e-7 + max(x - min)) of each map x of `cams` (..., h, w), float32.

    The epsilon is the reference implementation's. The maximum of the result is clearly below 1 if the range
    of the map is near or below 1e-7 (raw CAMs of improbable labels). A constant map becomes 0.
    """
    cams = cams.float()
    cams = cams - cams.amin((-2, -1), keepdim=True)
    return cams / (1e-7 + cams.amax((-2, -1), keepdim=True))


def activation_map(raw: Tensor) -> Tensor:
    """Return CAMs in [0, 1] from raw CAMs (..., h, w): ReLU, then `min_max_normalize` twice.

    The reference implementation normalizes the map of the layer, then the mean over its single layer. The
    second epsilon changes the result for maps with small values.
    """
    return min_max_normalize(min_max_normalize(raw.relu()))
