"""Grad-CAM for any torch model, against the published formulas."""
import numpy as np
import pytest
import torch
from torch import nn

from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, LayerCAM, XGradCAM
from pytorch_grad_cam.methods import METHODS
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget


class Linear(nn.Module):
    """Convolution, spatial mean, linear layer: the Grad-CAM of this network has a closed form."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def expected(model, images, category):
    activations = model.conv(images).detach()
    raw = torch.einsum("c,bchw->bhw", model.head.weight[category].detach(), activations).relu()
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    return ((raw - low) / (high - low)).numpy()


@pytest.mark.parametrize("method", [GradCAM, XGradCAM])
def test_cams_of_linear_model_equal_closed_form(method):
    """The gradient is the same at all positions, so XGradCAM equals GradCAM."""
    model, images = Linear(), torch.randn(2, 3, 8, 10)
    with method(model=model, target_layers=[model.conv]) as cam:
        maps = cam(input_tensor=images, targets=[ClassifierOutputTarget(1)] * 2)
    assert maps.shape == (2, 8, 10) and maps.dtype == np.float32
    np.testing.assert_allclose(maps, expected(model, images, 1), atol=1e-5)


def test_default_target_is_the_class_with_the_largest_score():
    model, images = Linear(), torch.randn(2, 3, 8, 10)
    best = model(images).argmax(1).tolist()
    cam = GradCAM(model, [model.conv])
    chosen = cam(images, [ClassifierOutputTarget(category) for category in best])
    np.testing.assert_array_equal(cam(images), chosen)


@pytest.mark.parametrize("method", [GradCAM, GradCAMPlusPlus, XGradCAM, LayerCAM])
def test_frozen_transformer_with_two_layers(method):
    """Tokens are reshaped to a grid and two layers averaged. No hooks or gradients remain in the model."""
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), Transpose(), block, Mean(), nn.Linear(16, 3))
    model.eval().requires_grad_(False)
    grid = lambda tokens: tokens.mT.unflatten(-1, (4, 6))  # noqa: E731
    cam = method(model, [model[2], model[3]], reshape_transform=grid)
    maps = cam(torch.randn(1, 3, 16, 24), [ClassifierOutputTarget(2)])
    assert maps.shape == (1, 16, 24) and maps.min() >= 0 and maps.max() <= 1
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Transpose(nn.Module):
    def forward(self, x):
        return x.mT


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def by_hand(method, activations, gradients):
    """The published formulas, computed for one channel and position after the other."""
    channels, rows, columns = activations.shape
    raw = np.zeros((rows, columns))
    for c in range(channels):
        a, g = activations[c], gradients[c]
        weight = {
            "gradcam": lambda a, g: g.mean(),
            "xgradcam": lambda a, g: (g * a).sum() / (a.sum() + 1e-7),
            "gradcam++": lambda a, g: sum(
                g[y, x] ** 2 / (2 * g[y, x] ** 2 + a.sum() * g[y, x] ** 3 + 1e-6) * max(g[y, x], 0)
                for y in range(rows)
                for x in range(columns)
            ),
            "layercam": lambda a, g: np.maximum(g, 0),
        }[method](a, g)
        raw += weight * a
    return raw


@pytest.mark.parametrize("method", METHODS)
def test_methods_equal_the_published_formulas(method):
    generator = torch.Generator().manual_seed(1)
    activations = torch.rand(5, 3, 4, generator=generator)
    gradients = torch.randn(5, 3, 4, generator=generator)
    expected = by_hand(method, activations.double().numpy(), gradients.double().numpy())
    np.testing.assert_allclose(METHODS[method](activations, gradients), expected, rtol=1e-4, atol=1e-5)


def test_in_place_module_after_the_layer_does_not_change_its_activations():
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(4 * 80, 2))
    images, target = torch.randn(1, 3, 8, 10), [ClassifierOutputTarget(1)]
    maps = [
        GradCAM(nn.Sequential(conv, nn.ReLU(inplace=inplace), head), [conv])(images, target)
        for inplace in (False, True)
    ]
    np.testing.assert_array_equal(*maps)


def test_aug_smooth_averages_mirror_images_and_brightness():
    model, images, target = Linear(), torch.randn(1, 3, 8, 10), [ClassifierOutputTarget(1)]
    cam = GradCAM(model, [model.conv])
    views = [cam(images * factor, target) for factor in (0.9, 1, 1.1)]
    views += [cam(images.flip(-1) * factor, target)[..., ::-1] for factor in (0.9, 1, 1.1)]
    smooth = cam(input_tensor=images, targets=target, aug_smooth=True)
    np.testing.assert_allclose(smooth, np.mean(views, axis=0), atol=1e-6)


def test_wrong_number_of_targets_raises():
    model = Linear()
    with pytest.raises(ValueError, match="1 targets for 2 images"):
        GradCAM(model, [model.conv])(torch.randn(2, 3, 8, 8), [ClassifierOutputTarget(0)])
