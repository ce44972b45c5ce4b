"""Attention affinity: refine a class activation map (CAM) along the self-attention of a frozen ViT.

CLIP-ES (Lin et al., CVPR 2023, section 3.3) propagates each CAM with a transition matrix built from the
attention of the image tower. All labels of an image use the same matrix. Each label has its own box mask;
only activations inside the mask are propagated.
"""
import cv2
import numpy as np
import torch
from torch import Tensor

SINKHORN_ITERATIONS = 3  # the reference implementation normalizes once, then twice more


def transition_matrix(attention: Tensor, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Return a symmetric, nearly doubly stochastic matrix made from attention.

    Each iteration divides by the column sums, then by the row sums: T <- T / colsum(T); T <- T / rowsum(T).
    Finally T <- (T + T^T) / 2.

    Args:
        attention: (..., n, n), non-negative, over patches without the class token; or another affinity.
        iterations: Sinkhorn iterations; 3 reproduces CLIP-ES.

    Returns:
        (..., n, n) float32, symmetric.

    Raises:
        ValueError: `attention` is not square.
    """
    if attention.shape[-1] != attention.shape[-2]:
        raise ValueError(f"attention must be square over patches, got shape {tuple(attention.shape)}")
    matrix = attention.float()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=-2, keepdim=True)
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)
    return (matrix + matrix.mT) / 2


def refine(cams: Tensor, affinity: Tensor, box_masks: Tensor | None = None, power: int = 2) -> Tensor:
    """Return CAMs propagated by the transition matrix T: T^power (box_mask * cam).

    The paper computes T^2 first. Repeated matrix-vector products give the same values in O(n^2) instead of
    O(n^3).

    Args:
        cams: (..., K, h, w) in [0, 1].
        affinity: (..., n, n) with n = h * w, see `transition_matrix`.
        box_masks: (..., K, h, w) of 0 and 1; None uses all patches (the paper's "MHSA" row).
        power: exponent of T.

    Returns:
        (..., K, h, w) float32, not normalized to [0, 1].
    """
    sources = cams if box_masks is None else cams * box_masks
    columns = sources.flatten(-2).mT  # (..., n, K)
    matrix = transition_matrix(affinity)  # (..., n, n)
    for _ in range(power):
        columns = matrix @ columns
    return columns.mT.reshape(cams.shape)


def box_mask(cam: np.ndarray, threshold: float, include_edge: bool = False) -> np.ndarray:
    """Return the union of the bounding boxes of a CAM's activated regions.

    The reference implementation also uses the contours of holes and nested regions. Their boxes are inside
    the boxes of the 8-connected regions, so the union is the same.

    Args:
        cam: (h, w) float in [0, 1].
        threshold: relative to the maximum of the 8-bit map (the paper's lambda).
        include_edge: let boxes include the last row and column. The reference implementation clips the
            exclusive end of a box to size - 1, so its boxes never include them; published numbers depend on
            this.

    Returns:
        (h, w) uint8 of 0 and 1; all 0 if nothing is activated.
    """
    height, width = cam.shape
    levels = (cam * 255).astype(np.uint8)
    active = (levels > int(threshold * levels.max())).astype(np.uint8)
    _, _, boxes, _ = cv2.connectedComponentsWithStats(active, connectivity=8)
    bottom, right = (height, width) if include_edge else (height - 1, width - 1)
    mask = np.zeros_like(active)
    for x, y, box_width, box_height, _ in boxes[1:]:  # boxes[0] is the inactive background
        mask[y : min(y + box_height, bottom), x : min(x + box_width, right)] = 1
    return mask


def box_masks(cams: Tensor, threshold: float | Tensor, include_edge: bool = False) -> Tensor:
    """Return `box_mask` of every map of `cams` (..., h, w), on their device.

    `threshold` is one number, or a tensor (...) with one number for each map.
    """
    thresholds = torch.as_tensor(threshold, dtype=torch.float64).expand(cams.shape[:-2])
    maps = cams.float().cpu().flatten(0, -3).numpy()
    pairs = zip(maps, thresholds.flatten().tolist(), strict=True)
    masks = np.stack([box_mask(cam, threshold, include_edge) for cam, threshold in pairs])
    return torch.from_numpy(masks).to(cams.device).reshape(cams.shape)
