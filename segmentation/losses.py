"""Losses for masks in which unsure pixels are 255 and count for nothing.

Means are over the labelled pixels of the whole batch. Where it is split over processes, each divides its
sum by what `share` makes of its count; a mean of means would weigh a pixel by how few there are beside it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.benchmark import IGNORE
from segmentation.transforms import resize_labels

# Local pixel counts (n,) float64 -> what this process divides its sums by. Processes whose gradients are
# averaged return the count over all of them / their number; then the average is that of the whole batch.
Share = Callable[[Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, share: Share | None = None) -> Tensor:
    """Mean of -log p(label) over the labelled pixels.

    Args:
        logits: (B, C, h, w); half precision is computed in float32.
        labels: (B, h, w) int64, in [0, C) or 255.
        share: what to divide by, see `Share`; None is the count itself.

    Returns:
        A scalar; 0, with gradients of 0, where nothing is labelled.
    """
    total = F.cross_entropy(_full(logits), labels, ignore_index=IGNORE, reduction="sum")
    return _mean_of_means([total], [labels != IGNORE], share)


def balanced_cross_entropy(logits: Tensor, labels: Tensor, share: Share | None = None) -> Tensor:
    """Background and foreground weigh the same: the mean of both means of -log p(label).

    AdvCAM and CLIMS train with it from ImageNet weights. A half that no pixel is labelled with adds 0,
    where the public code gives NaN. Arguments and result as of `cross_entropy`; `share` gets two counts.
    """
    pixels = F.cross_entropy(_full(logits), labels, ignore_index=IGNORE, reduction="none")  # (B, h, w)
    halves = [labels == 0, (labels != 0) & (labels != IGNORE)]
    return _mean_of_means([pixels.where(half, 0).sum() for half in halves], halves, share)


LOSSES = {"ce": cross_entropy, "balanced": balanced_cross_entropy}


def pyramid(
    outputs: Tensor | Sequence[Tensor],
    labels: Tensor,
    loss: Callable[[Tensor, Tensor, Share | None], Tensor],
    share: Share | None = None,
) -> list[Tensor]:
    """The loss of every output, against labels shrunk to its size.

    Args:
        outputs: (B, C, h, w) each, or a single one.
        labels: (B, H, W) int64.
        loss: one of `LOSSES`.
        share: see `Share`.

    Returns:
        A scalar for each output; networks of several are trained on the sum.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [loss(logits, resize_labels(labels, logits.shape[-2:]), share) for logits in outputs]


def _full(logits: Tensor) -> Tensor:
    """A sum over thousands of pixels needs more than half precision; float64 stays."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _mean_of_means(sums: list[Tensor], masks: list[Tensor], share: Share | None) -> Tensor:
    """The mean of sum / pixels, where a mask without pixels adds 0; nothing is read back from the device."""
    counts = torch.stack([mask.sum() for mask in masks]).double()  # (n,)
    counts = counts if share is None else share(counts)
    sums = torch.stack(sums)
    return (sums / counts.where(counts > 0, 1).to(sums.dtype)).mean()
