"""Grad-CAM and its variants for any torch model, with the interface of the pytorch-grad-cam package.

    with GradCAM(model, target_layers=[model.layer4[-1]]) as cam:
        cams = cam(images, targets=[ClassifierOutputTarget(281)])  # (B, H, W) in [0, 1]

For CLIP use `pytorch_grad_cam.grad_cam.text_cams`.
"""
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import ttach
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pytorch_grad_cam.methods import METHODS, Combine, channel_sum, min_max_normalize, principal_component
from pytorch_grad_cam.model_outputs import call, describe, first_line, float_tensors
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, RawScoresOutputTarget

BRIGHTNESS = (0.9, 1, 1.1)  # factors of aug_smooth, as in the pytorch-grad-cam package
NO_GRADIENT = (
    "the model gives an output without gradient: its forward uses torch.no_grad, torch.inference_mode or "
    "detach. Remove these, or pass the module inside, such as GradCAM(model.inner, ...)"
)
INFERENCE_MODE = (
    "the model uses tensors made under torch.inference_mode: build it, and run all parts of its forward, "
    "without torch.inference_mode"
)
NOT_FINITE = "The image or the weights contain NaN or inf, or half precision overflows: use float32"
WRAP = "wrap the model in a torch.nn.Module whose forward(images) calls it"
Target = Callable[[Any], Tensor]
Calls = list[tuple[Tensor, GradientEdge]]  # values of a layer's output, and its place in the graph


@dataclass(eq=False)
class GradCAM:
    """CAMs from the gradients at the outputs of `target_layers`, averaged over these layers.

    Hooks are registered on the layers only during a call. All modules are in eval mode during a call and in
    their former mode after it.

    Raises:
        TypeError, ValueError: the model or a layer is not a module, there are no layers, or the method is
            unknown.
    """

    model: nn.Module  # maps images (B, C, H, W) to outputs (B, ...)
    target_layers: Sequence[nn.Module]  # or one. Of a layer's calls, the last with a gradient counts
    reshape_transform: Callable[[Tensor], Tensor] | None = None  # layer output, e.g. tokens -> (B, C, h, w)
    method: str = "gradcam"  # a name in `pytorch_grad_cam.methods.METHODS`
    # Function of what the model returns -> output (B, ...). None: of a tuple, dict or dataclass, its first
    # float tensor (B, ...)
    output: Callable[[Any], Tensor] | None = None

    def __post_init__(self):
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        layers = self.target_layers
        if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList):
            layers = [layers]  # also an nn.Sequential, whose modules would otherwise be taken one by one
        try:
            self.target_layers = list(layers)
        except TypeError:
            raise TypeError(f"target_layers must be a list of modules, got {type(layers).__name__}") from None
        if not self.target_layers:
            raise ValueError("target_layers is empty: pass at least one layer, such as [model.layer4[-1]]")
        for index, layer in enumerate(self.target_layers):
            if not isinstance(layer, nn.Module):
                raise TypeError(
                    f"target_layers[{index}] is of type {type(layer).__name__}: pass modules of the model, "
                    "such as [model.layer4[-1]]"
                )
        if self.method not in METHODS:
            raise ValueError(f"CAM method must be one of {', '.join(METHODS)}, got {self.method!r}")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Return the CAM of one target per image, (B, H, W) float32 in [0, 1].

        Args:
            input_tensor: images (B, C, H, W), converted to the device and float type of the model.
            targets: for each image a function that maps its output to one number; None uses the class with
                the largest score of outputs (B, C), and the output itself of outputs (B,).
            aug_smooth: average over the image and its mirror image, each at three levels of brightness.
            eigen_smooth: use the first principal component of the weighted activations instead of their sum,
                see `pytorch_grad_cam.methods.principal_component`.

        Raises:
            TypeError, ValueError: images, targets, layers and outputs do not fit together, the output has no
                gradient, or a result is not finite.
        """
        check_images(self.model, input_tensor)
        if targets is not None:
            targets = checked_targets(targets, len(input_tensor))
        combine = principal_component if eigen_smooth else channel_sum
        views = ttach.Compose([ttach.HorizontalFlip(), ttach.Multiply(BRIGHTNESS)] if aug_smooth else [])
        cams = [
            view.deaugment_mask(self._cams(view.augment_image(input_tensor), targets, combine)[:, None])[:, 0]
            for view in views
        ]
        return torch.stack(cams).mean(0).numpy()

    def _cams(self, images: Tensor, targets: Sequence[Target] | None, combine: Combine) -> Tensor:
        """Return the mean CAM over the layers, (B, H, W) in [0, 1]."""
        batch, _, height, width = images.shape
        with eval_mode(self.model), torch.inference_mode(False), torch.enable_grad():
            result, calls = self._forward(images)
            outputs = self._outputs(result, batch)
            loss = sum(map(score, targets or best_targets(outputs), outputs, range(batch)))
            edges = [edge for layer in self.target_layers for _, edge in calls[layer]]
            try:
                gradients = iter(torch.autograd.grad(loss, edges, allow_unused=True))
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                message = f"the targets have no gradient at target_layers: {first_line(error)}"
                raise ValueError(message) from error
        layers = []
        for layer in self.target_layers:
            name = self._name(layer)
            pairs = [(activation, next(gradients)) for activation, _ in calls[layer]]
            pairs = [pair for pair in pairs if pair[1] is not None]
            if not pairs:
                raise ValueError(
                    f"no gradient of the targets reaches {name}: the scores do not depend on it, or forward "
                    "uses torch.no_grad, torch.inference_mode or detach after it. Choose another layer"
                )
            maps = [self._maps(name, tensor, batch) for tensor in pairs[-1]]
            raw = METHODS[self.method](*maps, combine)  # (B, h, w)
            check_finite(name, raw)
            cams = min_max_normalize(raw.relu()).cpu().numpy()
            layers.append(np.stack([cv2.resize(cam, (width, height)) for cam in cams]))
        return min_max_normalize(torch.from_numpy(np.mean(layers, axis=0)).relu())

    def _forward(self, images: Tensor) -> tuple[Any, dict[nn.Module, Calls]]:
        """Return what the model returns, and the output of each call of each layer, see `Calls`."""
        results: dict[nn.Module, Any] = {}
        calls: dict[nn.Module, Calls] = {layer: [] for layer in self.target_layers}

        def hook(layer: nn.Module, inputs: tuple, result: Any) -> Tensor | None:
            results[layer] = result
            tensor = next(iter(float_tensors(result).values()), None)
            if isinstance(result, Tensor) and tensor is not None:
                with torch.inference_mode(False), torch.enable_grad():
                    if not tensor.requires_grad:  # of a frozen part under no_grad: differentiate what follows
                        tensor = tensor.clone().requires_grad_()
                    calls[layer].append((tensor.detach(), get_gradient_edge(tensor)))
                    return tensor.clone()  # later in-place modules must not change the stored output
            if tensor is not None and tensor.requires_grad:  # part of a tuple, for example
                calls[layer].append((tensor.detach().clone(), get_gradient_edge(tensor)))
            return None

        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), images)
        images = images.detach().clone().to(parameter.device, parameter.dtype).requires_grad_()
        handles = [layer.register_forward_hook(hook) for layer in self.target_layers]
        try:
            result = self.model(images.clone())  # an in-place module may be the first one
        except RuntimeError as error:
            if "nference tensor" in str(error):  # some weights or layer outputs were made in this mode
                raise ValueError(INFERENCE_MODE) from error
            raise
        finally:
            for handle in handles:
                handle.remove()
        for layer in self.target_layers:
            if layer not in results:
                raise ValueError(
                    f"{self._name(layer)} is not called by the model: choose a layer that forward uses. For "
                    "a compiled or scripted model, pass the original model"
                )
            if not calls[layer]:
                raise ValueError(
                    f"{self._name(layer)} gives {describe(results[layer])}: needed is a float tensor with "
                    "gradient, or a tuple, dict or dataclass with one. Choose another layer"
                )
        return result, calls

    def _outputs(self, result: Any, batch: int) -> Sequence[Any]:
        """Return the outputs (B, ...); for a detection model, the list of its B dicts."""
        if self.output is not None:
            result = call("output", self.output, result)
        tensors = [x for x in float_tensors(result).values() if x.ndim and len(x) == batch]
        if not tensors:
            if isinstance(result, list) and len(result) == batch and isinstance(result[0], Mapping):
                return result
            raise ValueError(
                f"the model gives {describe(result)} for a batch of {batch} images: needed is a float tensor "
                f"({batch}, ...). Pass GradCAM(..., output=function), which returns it from what the model "
                "gives"
            )
        unnamed = isinstance(result, tuple | list) and not hasattr(result, "_fields")
        if unnamed and any(x.shape == tensors[0].shape for x in tensors[1:]):
            raise ValueError(
                f"the model gives {describe(result)}, several outputs of the same shape: choose one with "
                "GradCAM(..., output=function), such as output=lambda outputs: outputs[0]"
            )
        if not tensors[0].requires_grad:
            raise ValueError(NO_GRADIENT)
        return tensors[0]

    def _maps(self, name: str, tensor: Tensor, batch: int) -> Tensor:
        """Return what a layer gives, or its gradient, as (B, C, h, w) float32."""
        if self.reshape_transform is not None:
            tensor = call(f"reshape_transform of {name}", self.reshape_transform, tensor)
            name = f"reshape_transform of {name}"
        if not (isinstance(tensor, Tensor) and tensor.ndim == 4 and len(tensor) == batch):
            raise ValueError(
                f"{name} gives {describe(tensor)}: needed are maps ({batch}, C, h, w). Choose a layer before "
                "pooling and flattening, or pass a reshape_transform that makes maps from it; for tokens see "
                "pytorch_grad_cam.utils.reshape_transforms"
            )
        if tensor.shape[2:].numel() < 2:
            raise ValueError(
                f"{name} gives {describe(tensor)}, a single position: choose a layer before pooling, or use "
                "larger images"
            )
        check_finite(name, tensor)
        return tensor.float()

    def _name(self, layer: nn.Module) -> str:
        """Return the description of a layer for messages."""
        name = next((name for name, module in self.model.named_modules() if module is layer), "")
        return f"target layer {name or 'without name'} ({type(layer).__name__})"


GradCAMPlusPlus = partial(GradCAM, method="gradcam++")
XGradCAM = partial(GradCAM, method="xgradcam")
LayerCAM = partial(GradCAM, method="layercam")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set all modules to eval mode, and each to its former mode afterwards.

    `model.eval()` is not used, because models override `train`, and their own mode could not be restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_images(model: nn.Module, images: Any) -> None:
    """Raise TypeError or ValueError unless `images` is (B, C, H, W) float and the only input of the model."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"input_tensor must be a torch tensor of images (B, C, H, W), got {describe(images)}. For "
            f"several inputs, {WRAP} with the other inputs"
        )
    if images.ndim != 4 or not images.numel():
        raise ValueError(
            f"input_tensor must be images (B, C, H, W), got {describe(images)}; image[None] makes a batch of "
            "one image (C, H, W)"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be float, got {images.dtype}: normalize them as for training")
    try:
        parameters = inspect.signature(model.forward)
    except ValueError:  # a scripted model has none
        return
    try:
        parameters.bind(images)
    except TypeError as error:
        raise TypeError(
            f"the model must take images only, but its forward takes {parameters} ({error}): {WRAP} with the "
            "other inputs"
        ) from None


def checked_targets(targets: Any, batch: int) -> list[Target]:
    """Return the targets as a list; raise TypeError or ValueError unless there is one function per image."""
    if callable(targets) or not hasattr(targets, "__iter__"):
        raise TypeError(f"targets must be a list with one function per image, got {type(targets).__name__}")
    targets = list(targets)
    for index, target in enumerate(targets):
        if not callable(target):
            raise TypeError(
                f"targets[{index}] is {first_line(repr(target))}, not a function of the output: for a class "
                "use ClassifierOutputTarget(class_index)"
            )
    if len(targets) != batch:
        raise ValueError(f"{len(targets)} targets for {batch} images: give one per image")
    return targets


def best_targets(outputs: Sequence[Any]) -> list[Target]:
    """Return the targets of the largest scores (B, C), or of the only scores (B,)."""
    if isinstance(outputs, Tensor) and outputs.ndim == 1:
        return [RawScoresOutputTarget()] * len(outputs)
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        return [ClassifierOutputTarget(category) for category in outputs.argmax(1).tolist()]
    raise ValueError(
        f"the model gives {describe(outputs)}: without targets it must give scores (B, C). Pass one target "
        "per image, such as SemanticSegmentationTarget(category, mask) for scores (B, C, H, W)"
    )


def score(target: Target, output: Any, index: int) -> Tensor:
    """Return the number that a target computes from the output for image `index`, of shape ()."""
    value = call(f"targets[{index}]", target, output)
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
        raise ValueError(
            f"targets[{index}] returns {describe(value)} from {describe(output)}: needed is a tensor of one "
            "number with gradient, such as output[category]; for scores (C, H, W) use "
            "SemanticSegmentationTarget(category, mask)"
        )
    if not value.isfinite():
        raise ValueError(f"image {index}: the score of targets[{index}] is {value.item()}. {NOT_FINITE}")
    return value.reshape(())


def check_finite(name: str, maps: Tensor) -> None:
    """Raise ValueError if maps (B, ..., h, w) contain NaN or inf."""
    finite = maps.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"image {int(finite.int().argmin())}: {name} gives NaN or inf. {NOT_FINITE}")
