"""Tensor names of published weight files -> names of our networks. Pure functions that read no files.

Network A (DeepLab-v2) has the names of deeplab-pytorch, such as `base.layer1.conv1.conv.weight`. Network B
(DeepLab-v1 on ResNet-38d) has those of SEAM's retraining code, such as `backbone.b2.conv_branch2a.weight`.
Files of these two projects differ from our names only in prefixes.
"""
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segmentation.transforms import IMAGENET_STD

# A state dict with the names of our networks, and the keys of the file without counterpart.
Converted = tuple[dict[str, Tensor], list[str]]

# Attributes under which wrappers and other projects store the network.
WRAPPERS = re.compile(r"((module|_orig_mod|model|base|backbone)\.)+")
# Modules of networks A and B -> prefix of their full names.
PREFIXES = {
    re.compile(r"(layer[1-5]|aspp|fc)\."): "base.",
    re.compile(r"(conv1a|b\d(_\d+)?|bn7)\."): "backbone.",
    re.compile(r"(conv_fov2?|bn_fov2?|cls_conv)\."): "",
}
# Names of the convolutions in a residual block: torchvision's number -> ours; Caffe's branch -> ours.
PARTS = {"1": "reduce", "2": "conv3x3", "3": "increase"}
SHORTCUT = {"0": "shortcut.conv", "1": "shortcut.bn"}
BRANCHES = {"1": "shortcut", "2a": "reduce", "2b": "conv3x3", "2c": "increase"}
CAFFE_STEM = {
    "conv1": "base.layer1.conv1.conv",
    "bn_conv1": "base.layer1.conv1.bn",
    "scale_conv1": "base.layer1.conv1.bn",
}
COPIES = ("res075", "res05")  # branches of the multi-scale Caffe model; same weights as the main one
MXNET_LEAVES = {"weight": "weight", "beta": "bias", "gamma": "weight", "moving_mean": "running_mean",
                "moving_var": "running_var"}  # fmt: skip


def unwrap(key: str) -> str:
    """Return a key without the prefixes of wrappers: "module.base.layer2..." -> "layer2..."."""
    return key[match.end() :] if (match := WRAPPERS.match(key)) else key


def own_key(key: str) -> str | None:
    """Return the full name of a key of network A or B; None for other keys.

    Args:
        key: with or without prefixes: "layer2.block1..." -> "base.layer2.block1...".
    """
    key = unwrap(key)
    return next((prefix + key for pattern, prefix in PREFIXES.items() if pattern.match(key)), None)


def torchvision_key(key: str) -> str | None:
    """Return network A's key for a key of torchvision's bottleneck ResNets; None for the classifier."""
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", key):
        return f"base.layer1.conv1.{match[1]}.{match[2]}"
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(?:(conv|bn)([123])|downsample\.([01]))\.(\w+)", key)
    if match is None:
        return None
    stage, block, kind, part, shortcut, leaf = match.groups()
    module = f"{PARTS[part]}.{kind}" if part else SHORTCUT[shortcut]
    return f"base.layer{int(stage) + 1}.block{int(block) + 1}.{module}.{leaf}"


def caffe_layer(layer: str) -> str | None:
    """Return network A's module for a layer of Caffe's ResNets or of the published DeepLab models.

    Caffe splits batch norm into two layers, `bn...` and `scale...`; both map to one module here. Blocks are
    named a, b, c or a, b1, b2. For layers without counterpart, such as the classifier `fc1000`, return None.
    """
    if layer in CAFFE_STEM:
        return CAFFE_STEM[layer]
    if match := re.fullmatch(r"(res|bn|scale)([2-5])([a-z])(\d*)_branch(1|2[abc])", layer):
        kind, stage, letter, number, branch = match.groups()
        if number and letter != "b":
            return None
        block = int(number) + 1 if number else ord(letter) - ord("a") + 1
        return f"base.layer{stage}.block{block}.{BRANCHES[branch]}.{'conv' if kind == 'res' else 'bn'}"
    if match := re.fullmatch(r"fc[^_]*_[^_]+_(c\d+)", layer):
        return f"base.aspp.{match[1]}"
    return "base.fc" if re.fullmatch(r"fc[^_]*_[^_]+", layer) else None


def mxnet_key(key: str) -> str | None:
    """Return network B's key for a key of the MXNet ImageNet file of ResNet-38; None for the classifier.

    The file was published with the paper of Wu et al., "Wider or Deeper".
    """
    key = key.removeprefix("arg:").removeprefix("aux:")  # prefixes of mxnet.nd.load
    match = re.fullmatch(r"(\w+?)_(weight|beta|gamma|moving_mean|moving_var)", key)
    if match is None:
        return None
    name, leaf = match[1], MXNET_LEAVES[match[2]]
    if name in ("conv1a", "bn7"):
        return f"backbone.{name}.{leaf}"
    match = re.fullmatch(r"(res|bn)(\d)(?:a|b(\d+))_branch(\w+)", name)
    if match is None:
        return None
    kind, stage, number, branch = match.groups()
    block = f"{stage}_{number}" if number else stage  # 4a -> b4, 4b1 -> b4_1
    return f"backbone.b{block}.{'conv' if kind == 'res' else 'bn'}_branch{branch}.{leaf}"


def rename(state: Mapping[str, Any], key_of: Callable[[str], str | None]) -> Converted:
    """Return the tensors renamed by `key_of`, and the keys for which it returns None."""
    renamed = {key_of(key): torch.as_tensor(value) for key, value in state.items()}
    renamed.pop(None, None)
    return renamed, [key for key in state if key_of(key) is None]


def torchvision(state: Mapping[str, Any]) -> Converted:
    """Convert torchvision's ResNets to network A, whose input is BGR of 0 to 255 minus the mean.

    Built with `stride_in="conv3x3"`, the network computes torchvision's features, with two exceptions:
    torchvision's first pooling rounds sizes down, and the means differ by up to one gray level.
    """
    renamed, dropped = rename({unwrap(key): value for key, value in state.items()}, torchvision_key)
    first = "base.layer1.conv1.conv.weight"
    if first in renamed:
        renamed[first] = bgr_stem(renamed[first])
    return renamed, dropped


def bgr_stem(weight: Tensor) -> Tensor:
    """Return the weights of a first convolution, converted from standardized RGB to BGR of 0 to 255.

    Args:
        weight: (out, 3, k, k).

    Raises:
        ValueError: the number of input channels is not three.
    """
    if weight.ndim != 4 or weight.shape[1] != 3:
        raise ValueError(f"conv1.weight has shape {tuple(weight.shape)}, expected (out, 3, k, k) for RGB")
    deviation = torch.tensor(IMAGENET_STD, dtype=torch.float64).view(1, 3, 1, 1) * 255
    return (weight.double() / deviation).flip(1).float()


def caffe(blobs: Mapping[str, Any]) -> Converted:
    """Convert blobs `{"layer/0": array, ...}` of Caffe's ResNets to network A.

    Caffe's batch norm layer has weighted sums of mean and variance, and the sum of the weights in its third
    blob. Scale and shift are in the `scale...` layer. The bias of a convolution before batch norm (the first
    one of ResNet-50) is subtracted from the mean.

    Raises:
        ValueError: a layer lacks blobs, or a batch norm layer has no `scale...` layer.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in blobs.items():
        layer, _, index = key.rpartition("/")
        if not any(branch in layer for branch in COPIES):
            layers.setdefault(layer, {})[index] = torch.as_tensor(value)

    state, dropped = {}, []
    for layer, values in layers.items():
        module = caffe_layer(layer)
        if module is None:
            dropped += [f"{layer}/{index}" for index in values]
        elif layer.startswith("bn"):
            mean, variance, total = (_blob(layer, values, index, "batch norm").double() for index in "012")
            factor = 1 / total.flatten()[0] if total.any() else 0  # Caffe also gives 0 for a sum of 0
            state[f"{module}.running_mean"] = mean.flatten() * factor
            state[f"{module}.running_var"] = variance.flatten() * factor
            scale = layer.replace("bn", "scale", 1)
            if scale not in layers:
                raise ValueError(f"batch norm layer {layer} has no layer {scale}")
        elif layer.startswith("scale"):
            state[f"{module}.weight"] = _blob(layer, values, "0", "scale").flatten()
            state[f"{module}.bias"] = _blob(layer, values, "1", "scale").flatten()
        else:
            state[f"{module}.weight"] = _blob(layer, values, "0", "convolution")
            if "1" in values:
                state[f"{module}.bias"] = values["1"].flatten()

    for key in [key for key in state if key.endswith(".conv.bias")]:
        mean = key.replace("conv.bias", "bn.running_mean")
        if mean in state:
            state[mean] = state[mean] - state.pop(key).double()
    return state, dropped


def _blob(layer: str, values: dict[str, Tensor], index: str, kind: str) -> Tensor:
    if index not in values:
        raise ValueError(f"{kind} layer {layer} has no blob {layer}/{index}")
    return values[index]


class Family(NamedTuple):
    """One naming scheme. A file belongs to it if a key, without prefixes of wrappers, matches `pattern`."""

    name: str
    pattern: re.Pattern[str]
    convert: Callable[[Mapping[str, Any]], Converted]


OWN_NAMES = partial(rename, key_of=own_key)
FAMILIES = (
    Family("deeplab-pytorch", re.compile(r"layer[2-5]\.block\d+\.\w+\.conv\.weight"), OWN_NAMES),
    Family("resnet38d", re.compile(r"b\d(_\d+)?\.conv_branch\w+\.weight"), OWN_NAMES),
    Family("torchvision", re.compile(r"layer[1-4]\.\d+\.conv[123]\.weight"), torchvision),
    Family("caffe", re.compile(r"res[2-5]([a-z]|b\d+)_branch(1|2[abc])/0"), caffe),
    Family("mxnet", re.compile(r"(arg:)?res\d(a|b\d+)_branch\w+_weight"), partial(rename, key_of=mxnet_key)),
)
# Family -> `stride_in` of the network in which the weights were trained, if it is known.
STRIDE_IN = {"torchvision": "conv3x3", "caffe": "reduce"}


def family_of(state: Mapping[str, Any]) -> Family | None:
    """Return the family of a state dict, by its keys; None if it is unknown."""
    keys = [unwrap(key) for key in state]
    return next((family for family in FAMILIES if any(map(family.pattern.fullmatch, keys))), None)
