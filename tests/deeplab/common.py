"""Inputs, labels and weights with which the golden vectors of tests/golden/deeplab were made."""
from functools import partial

import numpy as np
import torch

from deeplab.model import backbone
from segmentation.transforms import caffe_normalize, imagenet_normalize
from tests import conftest
from tests.weights import parity_array, parity_image

golden = partial(conftest.golden, system="deeplab")


def input_a(name: str, height: int, width: int) -> torch.Tensor:
    """Return (1, 3, H, W) float32, BGR minus mean."""
    return torch.from_numpy(caffe_normalize(parity_image(name, height, width)))[None]


def input_b(name: str, height: int, width: int) -> torch.Tensor:
    """Return (1, 3, H, W) float32, RGB standardized."""
    return torch.from_numpy(imagenet_normalize(parity_image(name, height, width)))[None]


def labels(name: str, shape: tuple, classes: int, block: int = 4, p: float = 1.0) -> np.ndarray:
    """Return random labels (n, H, W) int64 in square blocks, with 255 for ignored blocks."""
    count, height, width = shape
    grid = (count, -(-height // block), -(-width // block))
    blocks = np.floor(np.abs(parity_array(name, grid, scale=3.0))).astype(np.int64) % classes
    blocks[parity_array(name + ":ign", grid) > p] = 255
    return blocks.repeat(block, 1).repeat(block, 2)[:, :height, :width].copy()


def summary(values) -> np.ndarray:
    """Return (18,): sum, L2 norm and 16 evenly spaced elements, padded with zeros."""
    flat = np.asarray(values, np.float64).ravel()
    index = np.linspace(0, flat.size - 1, 16).astype(np.int64) if flat.size >= 16 else np.arange(flat.size)
    shown = np.zeros(16)
    shown[: len(index)] = flat[index]
    return np.concatenate([[flat.sum(), np.sqrt((flat**2).sum())], shown])


def build_v1(
    channels: int, blocks: tuple[int, ...] = (3, 4, 23, 3), width: int = 64
) -> torch.nn.Sequential:
    """Return DeepLab-v1, the network of the published COCO weights: v2's stages and a 1x1 convolution."""
    layers = backbone(blocks, width, "reduce")
    layers["fc"] = torch.nn.Conv2d(32 * width, channels, 1)
    return torch.nn.Sequential(layers)


def fill_a(model, seed: int = 0, stem: str = "base.layer1.conv1.conv.weight"):
    """Set weights that depend on the names; the stem is scaled down for inputs of 0 to 255."""
    from tests.weights import fill_module

    fill_module(model, seed)
    with torch.no_grad():
        dict(model.named_parameters())[stem].mul_(1 / 64)
    return model.eval()
