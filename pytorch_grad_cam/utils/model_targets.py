"""Targets of CAMs: functions that map the output for one image to a scalar.

Names and module path are those of the pytorch-grad-cam package.
"""
from operator import index

import numpy as np
import torch
from torch import Tensor


class ClassifierOutputTarget:
    """The score of one class in a classifier's output (..., C)."""

    def __init__(self, category: int):
        self.category = category

    def __call__(self, output: Tensor) -> Tensor:
        return output[..., class_index(self.category, output.shape[-1] if output.ndim else 0)]


class ClassifierOutputSoftmaxTarget(ClassifierOutputTarget):
    """The probability of one class, after a softmax over the scores (..., C)."""

    def __call__(self, output: Tensor) -> Tensor:
        return super().__call__(output.softmax(-1) if output.ndim else output)


class BinaryClassifierOutputTarget:
    """The score of a classifier with one output, with its sign changed if `category` is not 1."""

    def __init__(self, category: int):
        self.category = category

    def __call__(self, output: Tensor) -> Tensor:
        return output if self.category == 1 else -output


class RawScoresOutputTarget:
    """The output itself, of a model with one number per image."""

    def __call__(self, output: Tensor) -> Tensor:
        return output


class SemanticSegmentationTarget:
    """The sum of one class's scores (C, H, W) over the pixels of a mask (H, W) of 0 and 1."""

    def __init__(self, category: int, mask: np.ndarray | Tensor):
        self.category, self.mask = category, torch.as_tensor(mask)

    def __call__(self, output: Tensor) -> Tensor:
        if output.shape[1:] != self.mask.shape:
            raise ValueError(
                f"the mask has the shape {tuple(self.mask.shape)}, but the scores of an image have "
                f"{tuple(output.shape)}: give a mask (H, W) for scores (C, H, W)"
            )
        return (output[class_index(self.category, len(output))] * self.mask.to(output.device)).sum()


def class_index(category: int, num_classes: int) -> int:
    """Return `category` as an int; raise ValueError unless it is in 0..num_classes - 1."""
    try:
        class_id = index(category)
    except TypeError:
        raise ValueError(f"a class must be an int, got {category!r}") from None
    if not 0 <= class_id < num_classes:
        raise ValueError(f"class {class_id} is outside 0..{num_classes - 1}, the classes of the model")
    return class_id
