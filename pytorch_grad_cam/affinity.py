"""Attention affinity: how far a class activation at one patch speaks for another patch.

CLIP-ES refines a CAM by letting it flow along the self-attention of the frozen vision tower
(Lin et al., CVPR 2023, section 3.3). One affinity serves all labels of an image; each label brings
its own box mask, which says where its activation may flow *from*.
"""
import cv2
import numpy as np
import torch
from torch import Tensor

SINKHORN_ROUNDS = 3  # column then row normalisation; the public code does one round, then two more


def transition(attention: Tensor, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """Turn mean attention into a symmetric, nearly doubly stochastic transition matrix.

    Args:
        attention: (..., n, n) non-negative, patch rows and columns only (no class token); usually
            the mean over heads and the last 8 blocks. Any other affinity between patches will do.
        rounds: Sinkhorn rounds; 3 reproduces the public code.

    Returns:
        (..., n, n) float32, symmetric.
    """
    if attention.shape[-1] != attention.shape[-2]:
        raise ValueError(f"attention must be square over patches, got {tuple(attention.shape)}")
    matrix = attention.float()
    for _ in range(rounds):
        matrix = matrix / matrix.sum(dim=-2, keepdim=True)
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)
    return (matrix + matrix.mT) / 2


def refine(cams: Tensor, attention: Tensor, masks: Tensor | None = None, steps: int = 2) -> Tensor:
    """Propagate CAMs along the affinity: T @ ... @ T @ (mask * cam), `steps` times.

    The paper squares T and multiplies once; two matrix-vector products give the same numbers
    without the n^3 product.

    Args:
        cams: (..., K, h, w) in [0, 1].
        attention: (..., n, n) with n = h * w, see `transition`.
        masks: (..., K, h, w) 0/1, which patches may send; None lets all of them (the paper's "MHSA"
            ablation).

    Returns:
        (..., K, h, w) float32, not yet rescaled to [0, 1].
    """
    sources = cams if masks is None else cams * masks
    flow = sources.flatten(-2).mT  # (..., n, K)
    step = transition(attention)  # (..., n, n)
    for _ in range(steps):
        flow = step @ flow
    return flow.mT.reshape(cams.shape)


def box_mask(cam: np.ndarray, threshold: float, cover_edge: bool = False) -> np.ndarray:
    """Union of the bounding boxes of a CAM's activated regions.

    The public code takes contours, holes and nested regions included; their boxes lie inside those
    of the 8-connected regions, so the union is the same.

    Args:
        cam: (h, w) float in [0, 1].
        threshold: relative to the maximum of the 8-bit map (the paper's lambda).
        cover_edge: the public code never lets a box reach the last row and column of the grid
            (it clips an exclusive end to size - 1). Published numbers need that; True mends it.

    Returns:
        (h, w) uint8 0/1; all zero when nothing is activated.
    """
    height, width = cam.shape
    levels = (cam * 255).astype(np.uint8)
    active = (levels > int(threshold * levels.max())).astype(np.uint8)
    _, _, boxes, _ = cv2.connectedComponentsWithStats(active, connectivity=8)
    bottom, right = (height, width) if cover_edge else (height - 1, width - 1)
    mask = np.zeros_like(active)
    for x, y, box_width, box_height, _ in boxes[1:]:  # the first box is the inactive rest
        mask[y : min(y + box_height, bottom), x : min(x + box_width, right)] = 1
    return mask


def box_masks(cams: Tensor, threshold: float | Tensor, cover_edge: bool = False) -> Tensor:
    """`box_mask` of every map of (..., h, w); made on the CPU, returned where `cams` is.

    `threshold` is one for all, or one for each: (...).
    """
    thresholds = torch.as_tensor(threshold, dtype=torch.float64).expand(cams.shape[:-2])
    maps = cams.float().cpu().flatten(0, -3).numpy()
    pairs = zip(maps, thresholds.flatten().tolist(), strict=True)
    masks = np.stack([box_mask(cam, threshold, cover_edge) for cam, threshold in pairs])
    return torch.from_numpy(masks).to(cams.device).reshape(cams.shape)
