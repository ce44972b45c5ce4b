"""DeepLab-v2 on ResNet-101 with the multi-scale wrapper (Chen et al., 2016).

Names, order and shapes of the state dict are those of deeplab-pytorch. Images are BGR minus the mean, see
`segmentation.transforms.caffe_normalize`; logits have an eighth of the image's size.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BN = {"eps": 1e-5, "momentum": 1e-3}  # Caffe's moving average fraction of 0.999, as in deeplab-pytorch
STRIDES_IN = ("reduce", "conv3x3")


class ConvBnReLU(nn.Module):
    """Convolution without bias, batch normalization and, by default, ReLU.

    PyTorch's batch norm stores its input for the backward pass even if it is frozen. While gradients are
    recorded, frozen batch norm is therefore computed as x * scale + shift per channel, which halves the
    memory of training.
    """

    def __init__(self, into: int, out: int, kernel: int, stride: int, padding: int, dilation: int,
                 relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(into, out, kernel, stride, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(out, **BN)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn.training or not torch.is_grad_enabled():
            x = self.bn(x)
        else:
            scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
            shift = self.bn.bias - self.bn.running_mean * scale
            scale, shift = (part.to(x.dtype)[:, None, None] for part in (scale, shift))  # (C, 1, 1)
            x = torch.addcmul(shift, x, scale)
        return F.relu_(x) if self.relu else x  # in place: addcmul's backward pass does not use its output


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions; the first block of a stage has a convolved shortcut.

    With `stride_in` "reduce" the stride is in the first 1x1 convolution, as in Caffe's ResNets. With
    "conv3x3" it is in the 3x3 convolution, as in torchvision's. Names and shapes of the weights are the same.
    """

    def __init__(self, into: int, out: int, stride: int, dilation: int, first: bool, stride_in: str):
        super().__init__()
        middle = out // 4
        early, late = (stride, 1) if stride_in == "reduce" else (1, stride)
        self.reduce = ConvBnReLU(into, middle, 1, early, 0, 1)
        self.conv3x3 = ConvBnReLU(middle, middle, 3, late, dilation, dilation)
        self.increase = ConvBnReLU(middle, out, 1, 1, 0, 1, relu=False)
        self.shortcut = ConvBnReLU(into, out, 1, stride, 0, 1, relu=False) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.increase(self.conv3x3(self.reduce(x)))
        return F.relu_(branch.add_(self.shortcut(x)))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling of DeepLab-v2: the sum of 3x3 convolutions with different dilations."""

    def __init__(self, into: int, channels: int, rates: tuple[int, ...]):
        super().__init__()
        if not rates:
            raise ValueError("rates is empty: the head requires at least one dilation rate")
        for position, rate in enumerate(rates):
            branch = nn.Conv2d(into, channels, 3, padding=rate, dilation=rate)
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)
            self.add_module(f"c{position}", branch)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.children()
        total = first(x)  # (B, channels, h, w)
        for branch in others:
            total = total + branch(x)
        return total


def check_blocks(blocks: tuple[int, ...]) -> None:
    """Raise ValueError unless there are four stages with at least one block each."""
    if len(blocks) != 4 or min(blocks) < 1:
        raise ValueError(f"blocks must be four positive numbers, one for each stage, got {tuple(blocks)}")


def backbone(blocks: tuple[int, ...], width: int, stride_in: str) -> OrderedDict[str, nn.Module]:
    """Return layer1 (the stem) to layer5: (B, 3, H, W) -> (B, 32 * width, ~H/8, ~W/8)."""
    check_blocks(blocks)
    if stride_in not in STRIDES_IN:
        raise ValueError(f"stride_in must be one of {', '.join(STRIDES_IN)}, got {stride_in!r}")
    # Pooling rounds sizes up, as in Caffe: 240 -> 120 -> 61.
    pool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
    stem = nn.Sequential(OrderedDict(conv1=ConvBnReLU(3, width, 7, 2, 3, 1), pool=pool))
    layers = OrderedDict(layer1=stem)
    into = width
    stages = zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)  # strides, dilations
    for position, (count, stride, dilation) in enumerate(stages):
        out = 4 * width * 2**position
        stage = OrderedDict()
        for block in range(count):
            first = block == 0
            stage[f"block{block + 1}"] = Bottleneck(
                into if first else out, out, stride if first else 1, dilation, first, stride_in
            )
        layers[f"layer{position + 2}"] = nn.Sequential(stage)
        into = out
    return layers


class MSC(nn.Module):
    """Multi-scale wrapper: applies `base` to the image and to rescaled copies, and takes the maximum.

    In training mode it returns a list of logits, and each entry gets a loss: the logits of the image, the
    logits of each copy at its own size, and the maximum at the size of the image's logits. In evaluation mode
    it returns only the maximum. Without `scales`, the logits of the image are the only output.

    Args:
        base: (B, 3, H, W) -> (B, channels, h, w).
        scales: factors of the sizes of the copies.
        freeze_bn: keep batch norm in evaluation mode during training, as in the published recipes.
    """

    def __init__(self, base: nn.Module, scales: tuple[float, ...] = (0.5, 0.75), freeze_bn: bool = True):
        super().__init__()
        if min(scales, default=1) <= 0:
            raise ValueError(f"scales must be positive, got {tuple(scales)}")
        self.base = base
        self.scales = tuple(scales)
        self.freeze_bn = freeze_bn
        freeze_affine(self)
        self.train()

    def train(self, mode: bool = True) -> "MSC":
        super().train(mode)
        if self.freeze_bn:
            freeze_statistics(self)
        return self

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        outputs = [self.base(x)]
        outputs += [self.base(rescale(x, scale)) for scale in self.scales]
        fused = outputs[0]  # (B, channels, h, w)
        for output in outputs[1:]:
            output = F.interpolate(output, fused.shape[-2:], mode="bilinear", align_corners=False)
            fused = torch.maximum(fused, output)
        if not self.training:
            return fused
        return [*outputs, fused] if self.scales else outputs


def rescale(x: Tensor, scale: float) -> Tensor:
    """Resize (B, 3, H, W) bilinearly to (B, 3, floor(H * scale), floor(W * scale)), at least one pixel.

    Source positions depend on the scale, not on the rounded sizes, as in deeplab-pytorch with PyTorch 1.6 or
    newer.
    """
    size = [int(side * scale) for side in x.shape[-2:]]
    if min(size) < 1:  # for example 1 pixel at scale 0.5; PyTorch raises for an empty result
        return F.interpolate(x, [max(1, side) for side in size], mode="bilinear", align_corners=False)
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


def freeze_statistics(module: nn.Module) -> None:
    """Put all batch norm layers of a module into evaluation mode."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


def freeze_affine(module: nn.Module) -> None:
    """Exclude scale and shift of batch norm from training, as in all published recipes."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.requires_grad_(False)


def build_v2(channels: int, blocks: tuple[int, ...] = (3, 4, 23, 3), rates: tuple[int, ...] = (6, 12, 18, 24),
             width: int = 64, scales: tuple[float, ...] = (0.5, 0.75), freeze_bn: bool = True,
             stride_in: str = "reduce") -> MSC:
    """Return DeepLab-v2 with random weights, in training mode.

    Args:
        channels: number of classes in the logits, background included.
        blocks: number of residual blocks in each of the four stages; (3, 4, 23, 3) is ResNet-101.
        rates: dilation rates of the head's branches.
        width: channels of the stem; the stages have 4, 8, 16 and 32 times as many.
        scales, freeze_bn: see `MSC`.
        stride_in: "reduce", or "conv3x3" for weights from torchvision.

    Raises:
        ValueError: blocks, rates, scales or stride_in are invalid.
    """
    layers = backbone(blocks, width, stride_in)
    layers["aspp"] = ASPP(32 * width, channels, rates)
    return MSC(nn.Sequential(layers), scales, freeze_bn)


def parameter_groups(model: nn.Module) -> list[dict]:
    """Return the trained parameters of either network in three groups, see `deeplab.recipe.sgd`.

    The groups are the convolution weights of the backbone (learning rate x 1), the weights of the head (x 10)
    and the biases of the head (x 20, without weight decay). Batch norm is not trained.
    """
    body, head = [], []
    for name, part in model.named_modules():
        if isinstance(part, nn.Conv2d) and part.weight.requires_grad:
            (body if "layer" in name or "backbone" in name else head).append(part)
    biases = [part.bias for part in head if part.bias is not None]
    return [
        {"params": [part.weight for part in body], "rate": 1, "weight_decay": True},
        {"params": [part.weight for part in head], "rate": 10, "weight_decay": True},
        {"params": biases, "rate": 20, "weight_decay": False},
    ]
