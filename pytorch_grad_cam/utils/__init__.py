"""Targets, images and reshape transforms, at the same module paths as in the pytorch-grad-cam package."""
from pytorch_grad_cam.utils import image, model_targets, reshape_transforms

__all__ = ["image", "model_targets", "reshape_transforms"]
