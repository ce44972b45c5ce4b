"""DeepLab-v1 (LargeFOV) on ResNet-38d, the wide pre-activation network of Wu, Shen and van den Hengel.

Names, order and shapes of the state dict are those of SEAM's retraining code. Images are standardized RGB,
see `segmentation.transforms.imagenet_normalize`; logits have the image's size.
"""
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab.model import check_blocks, freeze_affine, freeze_statistics

BN = {"eps": 1e-5, "momentum": 3e-4}  # as in SEAM


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, plus a shortcut.

    The shortcut is the input or, if the shape changes, a convolution of the activated input (the input after
    batch norm and ReLU). Returns the sum and the activated input.
    """

    def __init__(self, into: int, middle: int, out: int, stride: int = 1, first_dilation: int = 1,
                 dilation: int = 1):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(into, **BN)
        self.conv_branch2a = conv3x3(into, middle, first_dilation, stride)
        self.bn_branch2b1 = nn.BatchNorm2d(middle, **BN)
        self.conv_branch2b1 = conv3x3(middle, out, dilation)
        same = into == out and stride == 1
        self.conv_branch1 = None if same else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = F.relu_(self.bn_branch2a(x))
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(active)
        branch = F.relu_(self.bn_branch2b1(self.conv_branch2a(active)))
        return self.conv_branch2b1(branch).add_(shortcut), active


class BottleneckBlock(nn.Module):
    """1x1, dilated 3x3 and 1x1 convolution with dropout, plus a convolved shortcut; returns as `ResBlock`."""

    def __init__(self, into: int, out: int, dilation: int, dropout: float):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(into, **BN)
        self.conv_branch2a = nn.Conv2d(into, out // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(out // 4, **BN)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = conv3x3(out // 4, out // 2, dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(out // 2, **BN)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(out // 2, out, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(into, out, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = F.relu_(self.bn_branch2a(x))
        branch = F.relu_(self.bn_branch2b1(self.conv_branch2a(active)))
        branch = F.relu_(self.bn_branch2b2(self.conv_branch2b1(self.dropout_2b1(branch))))
        branch = self.conv_branch2b2(self.dropout_2b2(branch))
        return branch.add_(self.conv_branch1(active)), active


def conv3x3(into: int, out: int, dilation: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, stride, padding=dilation, dilation=dilation, bias=False)


class ResNet38(nn.Module):
    """(B, 3, H, W) -> (B, 64 * width, ceil(H / 8), ceil(W / 8))."""

    def __init__(self, blocks: tuple[int, ...] = (3, 3, 6, 3), width: int = 64):
        super().__init__()
        check_blocks(blocks)
        self.conv1a = conv3x3(3, width, 1)
        into = width
        for stage, count in enumerate(blocks[:3], 2):
            out = into * 2
            for block in range(count):
                part = ResBlock(into, out, out, stride=1 if block else 2)
                self.add_module(f"b{stage}_{block}" if block else f"b{stage}", part)
                into = out
        for block in range(blocks[3]):
            part = ResBlock(into, out, 2 * out, first_dilation=2 if block else 1, dilation=2)
            self.add_module(f"b5_{block}" if block else "b5", part)
            into = 2 * out
        self.b6 = BottleneckBlock(into, 2 * into, dilation=4, dropout=0.3)
        self.b7 = BottleneckBlock(2 * into, 4 * into, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(4 * into, **BN)

    def stages(self, x: Tensor) -> list[Tensor]:
        """Return [conv4, conv5, conv6]: the inputs of b5, b6 and the head, each after batch norm and ReLU.

        Args:
            x: (B, 3, H, W).

        Returns:
            (B, c * width, ceil(H / 8), ceil(W / 8)) with c = 8, 16 and 64.
        """
        features = []
        x = self.conv1a(x)
        for name, block in self.named_children():
            if name in ("conv1a", "bn7"):
                continue
            x, activated = block(x)
            if name in ("b5", "b6"):
                features.append(activated)
        return [*features, F.relu_(self.bn7(x))]

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1]


class LargeFOV(nn.Module):
    """(B, 3, H, W) -> logits (B, channels, H, W), in training and evaluation mode; see `build_r38`."""

    def __init__(self, backbone: ResNet38, channels: int, width: int, dilation: int, freeze_bn: bool):
        super().__init__()
        hidden = 8 * width
        self.backbone = backbone
        self.conv_fov = conv3x3(64 * width, hidden, dilation)
        self.bn_fov = nn.BatchNorm2d(hidden, **BN)
        self.conv_fov2 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.bn_fov2 = nn.BatchNorm2d(hidden, **BN)
        self.dropout1 = nn.Dropout(0.5)
        self.cls_conv = nn.Conv2d(hidden, channels, 1)
        for convolution in (self.conv_fov, self.conv_fov2, self.cls_conv):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.freeze_bn = freeze_bn
        freeze_affine(self)
        self.backbone.conv1a.requires_grad_(not freeze_bn)
        self.train()

    def train(self, mode: bool = True) -> "LargeFOV":
        super().train(mode)
        if self.freeze_bn:
            freeze_statistics(self.backbone)
        return self

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = self.backbone(x)  # (B, 64 * width, ceil(H / 8), ceil(W / 8))
        x = F.relu_(self.bn_fov(self.conv_fov(x)))
        x = F.relu_(self.bn_fov2(self.conv_fov2(x)))
        x = self.cls_conv(self.dropout1(x))
        return F.interpolate(x, size, mode="bilinear", align_corners=True)


def build_r38(channels: int, blocks: tuple[int, ...] = (3, 3, 6, 3), width: int = 64, dilation: int = 12,
              freeze_bn: bool = False) -> LargeFOV:
    """Return DeepLab-v1 on ResNet-38d with random weights, in training mode.

    Args:
        channels: number of classes in the logits, background included.
        blocks: number of residual blocks of the stages b2, b3, b4 and b5.
        width: channels of conv1a; the last layer of the backbone has 64 times as many.
        dilation: dilation of the head's 3x3 convolution.
        freeze_bn: freeze conv1a and the statistics of batch norm in the backbone, not in the head. SEAM's
            code has this option but does not use it.

    Raises:
        ValueError: blocks are invalid.
    """
    return LargeFOV(ResNet38(blocks, width), channels, width, dilation, freeze_bn)
