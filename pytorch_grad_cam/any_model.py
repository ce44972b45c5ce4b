"""Grad-CAM and its variants for any torch model, with the interface of the pytorch-grad-cam package.

    with GradCAM(model, target_layers=[model.layer4[-1]]) as cam:
        cams = cam(images, targets=[ClassifierOutputTarget(281)])  # (B, H, W) in [0, 1]

For CLIP use `pytorch_grad_cam.grad_cam.text_cams`.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
import ttach
from torch import Tensor, nn

from pytorch_grad_cam.methods import METHODS, min_max_normalize
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

BRIGHTNESS = (0.9, 1, 1.1)  # factors of aug_smooth, as in the pytorch-grad-cam package


@dataclass(eq=False)
class GradCAM:
    """CAMs from the gradients at the outputs of `target_layers`, averaged over these layers.

    Hooks are registered on the layers only during a call.
    """

    model: nn.Module  # maps images (B, 3, H, W) to outputs (B, ...)
    target_layers: Sequence[nn.Module]
    reshape_transform: Callable[[Tensor], Tensor] | None = None  # layer output, e.g. tokens -> (B, C, h, w)
    method: str = "gradcam"  # a name in `pytorch_grad_cam.methods.METHODS`

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Tensor], Tensor]] | None = None,
        aug_smooth: bool = False,
    ) -> np.ndarray:
        """Return the CAM of one target per image, (B, H, W) float32 in [0, 1].

        Args:
            input_tensor: (B, 3, H, W).
            targets: for each image a function of its output; None uses the class with the largest score.
            aug_smooth: average over the image and its mirror image, each at three levels of brightness.

        Raises:
            ValueError: the numbers of targets and images differ.
        """
        if targets is not None and len(targets) != len(input_tensor):
            raise ValueError(f"{len(targets)} targets for {len(input_tensor)} images: give one per image")
        views = ttach.Compose([ttach.HorizontalFlip(), ttach.Multiply(BRIGHTNESS)] if aug_smooth else [])
        cams = [
            view.deaugment_mask(self._cams(view.augment_image(input_tensor), targets)[:, None])[:, 0]
            for view in views
        ]
        return torch.stack(cams).mean(0).numpy()

    def _cams(self, input_tensor: Tensor, targets: Sequence[Callable[[Tensor], Tensor]] | None) -> Tensor:
        """Return the mean CAM over the layers, (B, H, W) in [0, 1]."""
        outputs: dict[nn.Module, Tensor] = {}

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            outputs[module] = output
            return output.clone()  # later in-place modules must not change the stored output

        handles = [layer.register_forward_hook(hook) for layer in self.target_layers]
        try:
            with torch.enable_grad():
                result = self.model(input_tensor.detach().requires_grad_())
        finally:
            for handle in handles:
                handle.remove()
        if targets is None:
            targets = [ClassifierOutputTarget(int(scores.argmax())) for scores in result]
        loss = sum(target(output) for target, output in zip(targets, result, strict=True))
        activations = [outputs[layer] for layer in self.target_layers]
        gradients = torch.autograd.grad(loss, activations)
        height, width = input_tensor.shape[-2:]
        layers = []
        for activation, gradient in zip(activations, gradients, strict=True):
            if self.reshape_transform is not None:
                activation, gradient = map(self.reshape_transform, (activation.detach(), gradient))
            raw = METHODS[self.method](activation.detach().float(), gradient.float())  # of (B, C, h, w)
            cams = min_max_normalize(raw.relu()).cpu().numpy()  # (B, h, w)
            layers.append(np.stack([cv2.resize(cam, (width, height)) for cam in cams]))
        return min_max_normalize(torch.from_numpy(np.mean(layers, axis=0)).relu())


GradCAMPlusPlus = partial(GradCAM, method="gradcam++")
XGradCAM = partial(GradCAM, method="xgradcam")
LayerCAM = partial(GradCAM, method="layercam")
