"""Losses for masks with ignored pixels (255).

Means are over the labeled pixels of the whole batch. If the batch is split over processes, each process
divides its sum by `global_count(its count)`. Averaging the means of the processes would be wrong, because the
number of labeled pixels differs between processes.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.benchmark import IGNORE
from segmentation.transforms import resize_labels

# Pixel counts of this process (n,) float64 -> their mean over all processes (`World.mean`). Each process
# divides its sums by this mean. The mean of the processes' gradients is then the gradient of the whole batch.
GlobalCount = Callable[[Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, global_count: GlobalCount | None = None) -> Tensor:
    """Return the mean of -log p(label) over the labeled pixels.

    Args:
        logits: (B, C, h, w); half-precision logits are converted to float32.
        labels: (B, h, w) int64, in [0, C) or 255.
        global_count: see `GlobalCount`; None divides by the count of this process.

    Returns:
        A scalar; 0, with gradients of 0, if no pixel is labeled.
    """
    return _mean_of_means(logits, labels, [labels != IGNORE], global_count)


def balanced_cross_entropy(logits: Tensor, labels: Tensor, global_count: GlobalCount | None = None) -> Tensor:
    """Return the mean of two means of -log p(label): over background pixels and over foreground pixels.

    AdvCAM and CLIMS use it to train from ImageNet weights. A mean over no pixels is 0; the reference
    implementation returns NaN. For arguments and result see `cross_entropy`.
    """
    parts = [labels == 0, (labels != 0) & (labels != IGNORE)]
    return _mean_of_means(logits, labels, parts, global_count)


LOSSES = {"ce": cross_entropy, "balanced": balanced_cross_entropy}


def pyramid(
    outputs: Tensor | Sequence[Tensor],
    labels: Tensor,
    loss: Callable[[Tensor, Tensor, GlobalCount | None], Tensor],
    global_count: GlobalCount | None = None,
) -> list[Tensor]:
    """Return the loss of each output, a scalar, with labels resized to the size of the output.

    Args:
        outputs: one tensor (B, C, h, w), or several.
        labels: (B, H, W) int64.
        loss: one of `LOSSES`.
        global_count: see `GlobalCount`.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [loss(logits, resize_labels(labels, logits.shape[-2:]), global_count) for logits in outputs]


def _mean_of_means(
    logits: Tensor, labels: Tensor, parts: list[Tensor], global_count: GlobalCount | None
) -> Tensor:
    """Return the mean over `parts`, (B, h, w) bool each, of the mean of -log p; a part without pixels adds 0.

    This sum has a fixed order and does not synchronize with the GPU. The reduction of F.cross_entropy is
    therefore not used.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    pixels = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")  # (B, h, w)
    sums = torch.stack([pixels.where(part, 0).sum() for part in parts])  # (n,)
    counts = torch.stack([part.sum() for part in parts]).double()
    counts = counts if global_count is None else global_count(counts)
    return (sums / counts.where(counts > 0, 1).to(sums.dtype)).mean()
