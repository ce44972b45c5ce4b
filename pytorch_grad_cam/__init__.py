"""Class activation maps: text-driven Grad-CAM on CLIP, refinement by attention, Grad-CAM for any model."""
from pytorch_grad_cam.any_model import GradCAM, GradCAMPlusPlus, LayerCAM, XGradCAM
from pytorch_grad_cam.grad_cam import TextCAMs, text_cams
from pytorch_grad_cam.methods import METHODS
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

__all__ = [
    "METHODS",
    "ClassifierOutputTarget",
    "GradCAM",
    "GradCAMPlusPlus",
    "LayerCAM",
    "TextCAMs",
    "XGradCAM",
    "text_cams",
]
