"""Overlays, preprocessing and reshape transforms, and the documented example."""
import re
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from pytorch_grad_cam.utils.image import deprocess_image, preprocess_image, show_cam_on_image
from pytorch_grad_cam.utils.reshape_transforms import swinT_reshape_transform, vit_reshape_transform

PAGE = Path(__file__).parents[2] / "docs" / "cams.md"
RNG = np.random.default_rng(0)
IMAGE, MASK = RNG.random((6, 8, 3)), RNG.random((6, 8)).astype(np.float32)


@pytest.mark.parametrize("use_rgb", [False, True])
@pytest.mark.parametrize("image_weight", [0, 0.3, 1])
def test_overlay_equals_the_weighted_sum(use_rgb, image_weight):
    blue_green_red = cv2.applyColorMap(np.uint8(255 * MASK), cv2.COLORMAP_HOT)
    heatmap = np.float32(blue_green_red[..., ::-1] if use_rgb else blue_green_red) / 255
    expected = (1 - image_weight) * heatmap + image_weight * IMAGE
    overlay = show_cam_on_image(IMAGE, MASK, use_rgb, cv2.COLORMAP_HOT, image_weight)
    assert overlay.dtype == np.uint8
    np.testing.assert_array_equal(overlay, np.uint8(255 * (expected / expected.max())))


def test_overlay_of_black_images_is_black():
    assert not show_cam_on_image(0 * IMAGE, 0 * MASK, colormap=cv2.COLORMAP_HOT).any()


def test_overlay_accepts_rounding_errors_of_resized_images():
    expected = show_cam_on_image(IMAGE.clip(0, 0.5) * 2, MASK)
    np.testing.assert_array_equal(show_cam_on_image(IMAGE.clip(0, 0.50001) * 2, MASK), expected)


@pytest.mark.parametrize(
    "img, mask, settings, message",
    [
        (
            np.uint8(255 * IMAGE),
            MASK,
            {},
            "img must be float in [0, 1], got uint8: divide 8-bit values by 255",
        ),
        (255 * IMAGE, MASK, {}, "img must be in [0, 1], got values in"),
        (IMAGE - 0.5, MASK, {}, "img must be in [0, 1], got values in"),
        (IMAGE * np.nan, MASK, {}, "img must be in [0, 1], got values in"),
        (IMAGE, 255 * MASK, {}, "mask must be in [0, 1]"),
        (IMAGE, MASK * np.nan, {}, "mask must be in [0, 1]"),
        (IMAGE, MASK[None], {}, "mask must be of shape (6, 8), the size of img, got (1, 6, 8)"),
        (IMAGE, MASK[:3], {}, "got (3, 8): give the CAM of one image, such as cams[0]"),
        (IMAGE[..., 0], MASK, {}, "img must be of shape (H, W, 3), got (6, 8)"),
        (IMAGE, MASK, {"image_weight": 1.5}, "image_weight must be in [0, 1], got 1.5"),
    ],
)
def test_overlay_of_other_inputs_raises(img, mask, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        show_cam_on_image(img, mask, **settings)


def test_preprocess_image_normalizes():
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    batch = preprocess_image(IMAGE, mean=mean, std=std)
    assert batch.shape == (1, 3, 6, 8)
    np.testing.assert_allclose(batch[0].movedim(0, -1), (IMAGE - mean) / std, atol=1e-6)
    eight_bits = np.uint8(255 * IMAGE)
    np.testing.assert_allclose(
        preprocess_image(eight_bits)[0].movedim(0, -1), eight_bits / 127.5 - 1, atol=1e-6
    )


def test_deprocess_image_standardizes():
    pixels = deprocess_image(IMAGE * 100 - 7)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [127.5, 25.5], atol=1)


def test_reshape_transforms_make_maps_of_the_patches():
    maps = torch.rand(2, 5, 3, 4)
    patches = maps.flatten(2).mT
    tokens = torch.cat([torch.rand(2, 1, 5), patches], 1)
    assert torch.equal(vit_reshape_transform(tokens, height=3, width=4), maps)
    assert torch.equal(swinT_reshape_transform(patches, height=3, width=4), maps)
    assert torch.equal(swinT_reshape_transform(maps.movedim(1, -1)), maps)  # torchvision and timm
    assert vit_reshape_transform(torch.rand(2, 197, 5)).shape == (2, 5, 14, 14)
    assert swinT_reshape_transform(torch.rand(2, 49, 5)).shape == (2, 5, 7, 7)


@pytest.mark.parametrize(
    "function, shape, message",
    [
        (vit_reshape_transform, (2, 198, 5), "tokens of shape (2, 198, 5) are not (B, 1 + 14 * 14, C)"),
        (partial(vit_reshape_transform, height=3, width=4), (2, 12, 5), "are not (B, 1 + 3 * 4, C)"),
        (swinT_reshape_transform, (2, 50, 5), "are not (B, 7 * 7, C): set height and width"),
        (swinT_reshape_transform, (2, 5), "tokens of shape (2, 5) are not"),
    ],
)
def test_other_numbers_of_tokens_raise(function, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(torch.rand(shape))


def test_documented_example_runs(tmp_path, monkeypatch):
    """Untrained small models replace the downloads."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(RNG.integers(0, 255, (60, 80, 3), np.uint8)).save("photo.jpg")
    resnet, vit = torchvision.models.resnet18(), torchvision.models.VisionTransformer(224, 16, 2, 2, 32, 64)
    torch.nn.init.normal_(vit.heads.head.weight)  # 0 before training
    monkeypatch.setattr("torchvision.models.resnet18", lambda weights: resnet)
    monkeypatch.setattr("torchvision.models.vit_b_16", lambda weights: vit)
    section = PAGE.read_text().split("\n## GradCAM for any torch model\n")[1]
    names: dict = {}
    for lines in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(lines, names)
    assert names["cams"].shape == (1, 224, 224) and names["cams"].any()
    assert Image.open("cam.png").size == (224, 224)
