"""A plain float32 training iteration that works like the reference DeepLab trainers, for benchmarks only.

Convolution, batch norm and ReLU are separate modules. Frozen batch norm only keeps its statistics; its affine
parameters still get gradients, which are not used. Masks are resized by Pillow, one at a time, on the CPU.
Every batch waits for its loss. The values are those of `segmentation.trainer`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeplab.model import ConvBnReLU
from segmentation.benchmark import IGNORE
from segmentation.dataset import Batch


def plain(model: nn.Module) -> nn.Module:
    """Replace fused blocks by separate modules, in place; parameters stay the same objects."""
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, ConvBnReLU):
                activation = [nn.ReLU()] if part.relu else []
                setattr(parent, name, nn.Sequential(part.conv, part.bn, *activation))
    for part in model.modules():
        if isinstance(part, _BatchNorm):
            part.requires_grad_(True)
    return model


def reference_iteration(
    model: nn.Module, sgd: torch.optim.SGD, batches: Sequence[Batch], factor: float = 1.0
) -> float:
    """Run forward and backward for each batch, then one optimizer step.

    Args:
        model: a network in training mode, see `plain`.
        sgd: see `deeplab.recipe.sgd`.
        batches: batches of one iteration.
        factor: factor of the learning rate from the schedule.

    Returns:
        The loss, summed over the network's outputs and averaged over the batches.
    """
    device = next(model.parameters()).device
    for group in sgd.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    sgd.zero_grad()
    total = 0.0
    for batch in batches:
        outputs = model(torch.from_numpy(batch.images).to(device))
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        losses = [
            F.cross_entropy(logits, shrunk(batch.labels, logits.shape[-2:]).to(device), ignore_index=IGNORE)
            for logits in outputs
        ]
        loss = sum(losses)
        (loss / len(batches)).backward()
        total += loss.item()
    sgd.step()
    return total / len(batches)


def shrunk(labels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Return labels (B, H, W) int64 resized to (B, h, w) int64 by Pillow's NEAREST."""
    height, width = size
    masks = [Image.fromarray(label.astype(np.uint8)) for label in labels]
    small = [np.asarray(mask.resize((width, height), Image.Resampling.NEAREST)) for mask in masks]
    return torch.from_numpy(np.stack(small)).long()
