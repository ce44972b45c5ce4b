"""DeepLab's sections of the configuration: `model`, `augment` and `solver`; others: `training.config`."""

from dataclasses import dataclass, field

from common.settings import Settings, setting
from segmentation.config import OptimConfig as BaseOptimConfig
from segmentation.config import RunConfig
from segmentation.losses import LOSSES
from training import config as base


@dataclass
class ModelConfig(base.ModelConfig):
    """Section `model`. The defaults are ResNet-101's; `blocks`, `width`, `rates` also give small networks."""

    network: str = setting("deeplab_v2", "`deeplab_v2` or `deeplab_v1_r38`")
    blocks: list[int] = setting([], "residual blocks of each stage; empty: as published", least=1)
    width: int = setting(64, "channels of the first convolution", least=1)
    rates: list[int] = setting([], "dilations of the head; empty: as published", least=1)
    scales: list[float] = setting([0.5, 0.75], "deeplab_v2: scales that MSC adds to 1; empty: one scale")
    freeze_bn: bool | None = setting(None, "batch norm keeps its statistics; empty: true for deeplab_v2. For "
                                     "deeplab_v1_r38, whose batch norm is live, true also freezes the first "
                                     "convolution")  # fmt: skip
    stride_in: str | None = setting(None, "deeplab_v2: layer with a stage's stride; empty: as the initial "
                                    "weights need it: conv3x3 for torchvision's, else reduce")  # fmt: skip


@dataclass
class AugmentConfig(Settings):
    """Section `augment`: how training samples are drawn."""

    SECTION = "augment."

    crop: int = setting(321, "side of a sample", least=1)
    scales: list[float] = setting([0.5, 0.75, 1.0, 1.25, 1.5], "deeplab_v2: one of these is drawn", above=0)
    base: int | None = setting(None, "deeplab_v2: longer side at scale 1; empty: the image's own", least=1)
    flip: bool = setting(True, "half of the samples are mirrored")
    scale_range: list[float] = setting([0.5, 1.5], "deeplab_v1_r38: the scale is drawn from it", above=0)
    jitter: int = setting(10, "deeplab_v1_r38: largest shift of hue, saturation and value", least=0)


@dataclass
class OptimConfig(BaseOptimConfig):
    """Section `solver`: SGD with the poly schedule."""

    momentum: float = setting(0.9, "of SGD", least=0)
    power: float = setting(0.9, "of the poly schedule", least=0)
    decay_every: int = setting(10, "iterations between two updates of the learning rate", least=1)
    loss: str = setting("ce", "cross-entropy, or balanced between background and foreground", choices=LOSSES)


@dataclass
class Config(base.Config):
    """Everything about a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    solver: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output="output/deeplab"))
