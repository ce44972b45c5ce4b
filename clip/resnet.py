"""The ResNet image towers of CLIP (Radford et al., ICML 2021).

They differ from a standard ResNet in three points: three stem convolutions, average pooling in place of
strides, and attention pooling at the end. Parameters have the names of OpenAI's checkpoints.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.positions import resample_positions

STRIDE = 32  # total stride of the last stage; image sides are rounded up to multiples of it


def normal(*shape: int, std: float) -> nn.Parameter:
    """Return a parameter drawn from a normal distribution; on the meta device, no values are drawn.

    Checkpoints are loaded on the meta device. Drawing there makes PyTorch import its compiler, which takes
    seconds.
    """
    values = torch.empty(*shape)
    return nn.Parameter(values if values.is_meta else values.normal_(std=std))


class Bottleneck(nn.Module):
    """Residual unit (1x1, 3x3, 1x1). Average pooling after the 3x3 and in the shortcut replaces strides."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(stride)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(self.pool(x))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.pool(x)))
        return F.relu(x + shortcut)


class AttentionPool(nn.Module):
    """Attention pooling whose only query is the spatial mean."""

    def __init__(self, grid: int, width: int, heads: int, outputs: int):
        super().__init__()
        self.grid, self.heads = grid, heads
        self.positional_embedding = normal(grid**2 + 1, width, std=width**-0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, outputs)

    def forward(self, features: Tensor, position_rounding: str = "always") -> Tensor:
        """Return (B, E) from features (B, C, h, w); for `position_rounding` see `resample_positions`."""
        tokens = features.flatten(2).mT  # (B, hw, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)  # (B, 1 + hw, C)
        grid = features.shape[-2:]
        positions = resample_positions(self.positional_embedding, self.grid, *grid, position_rounding)
        tokens = tokens + positions.to(tokens.dtype)
        packed = self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens)  # (B, L, C)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in packed)
        pooled = F.scaled_dot_product_attention(query, key, value)  # (B, heads, 1, 64)
        return self.c_proj(pooled.flatten(1))


class ModifiedResNet(nn.Module):
    """The image tower: `stages` returns the activations for Grad-CAM, `attnpool` the image feature."""

    patch_size = STRIDE

    def __init__(self, config):
        super().__init__()
        width = config.vision_width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inputs = width
        for stage, blocks in enumerate(config.vision_layers):
            planes = width * 2**stage
            units = []
            for i in range(blocks):
                units.append(Bottleneck(inputs, planes, stride=2 if i == 0 and stage > 0 else 1))
                inputs = planes * Bottleneck.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*units))
        grid = config.image_resolution // STRIDE
        self.attnpool = AttentionPool(grid, inputs, inputs // 64, config.embed_dim)

    def stages(self, images: Tensor) -> Tensor:
        """Return the output of the last stage (B, C, H'/32, W'/32) for normalized images (B, 3, H', W')."""
        x = images.to(self.conv1.weight.dtype)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2)))))

    def forward(self, images: Tensor, position_rounding: str = "always") -> Tensor:
        """Return image features (B, E), not normalized, of images (B, 3, H', W')."""
        return self.attnpool(self.stages(images), position_rounding)
