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
    return _mean_of_means(logits, labels, [labels != IGNORE], share)


def balanced_cross_entropy(logits: Tensor, labels: Tensor, share: Share | None = None) -> Tensor:
    """Background and foreground weigh the same: the mean of both means of -log p(label).

    AdvCAM and CLIMS train with it from ImageNet weights. A half that no pixel is labelled with adds 0,
    where the public code gives NaN. Arguments and result as of `cross_entropy`; `share` gets two counts.
    """
    return _mean_of_means(logits, labels, [labels == 0, (labels != 0) & (labels != IGNORE)], share)


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


def _mean_of_means(logits: Tensor, labels: Tensor, parts: list[Tensor], share: Share | None) -> Tensor:
    """The mean over parts, (B, h, w) bool each, of the mean of -log p; one without pixels adds 0.

    A GPU is not waited for, and adds up in the same order each time; the sum of F.cross_entropy does not.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    pixels = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")  # (B, h, w)
    sums = torch.stack([pixels.where(part, 0).sum() for part in parts])  # (n,)
    counts = torch.stack([part.sum() for part in parts]).double()
    counts = counts if share is None else share(counts)
    return (sums / counts.where(counts > 0, 1).to(sums.dtype)).mean()
