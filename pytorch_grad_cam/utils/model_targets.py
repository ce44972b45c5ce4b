"""Targets of CAMs: functions that map the output for one image to a scalar."""
from torch import Tensor


class ClassifierOutputTarget:
    """The score of one class in a classifier's output."""

    def __init__(self, category: int):
        self.category = category

    def __call__(self, output: Tensor) -> Tensor:
        return output[..., self.category]
