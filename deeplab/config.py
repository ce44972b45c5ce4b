"""DeepLab's configuration: sections `model`, `augment`, `solver`; the others are in `training.config`."""

from dataclasses import dataclass, field

from foundation.settings import Settings, setting
from segmentation.config import OptimConfig as BaseOptimConfig
from segmentation.config import RunConfig
from segmentation.losses import LOSSES
from training import config as base


@dataclass
class ModelConfig(base.ModelConfig):
    """Section `model`. The defaults are as published; `blocks`, `width`, `rates` can make it smaller."""

    network: str = setting("deeplab_v2", "`deeplab_v2` or `deeplab_v1_r38`")
    blocks: list[int] = setting([], "residual blocks in each of four stages; empty: as published", least=1)
    width: int = setting(64, "channels of the first convolution", least=1)
    rates: list[int] = setting([], "dilation rates of the head; empty: as published", least=1)
    scales: list[float] = setting([0.5, 0.75], "deeplab_v2: scales in addition to 1, combined by their "
                                  "maximum (MSC); empty: only 1")  # fmt: skip
    freeze_bn: bool | None = setting(None, "freeze the statistics of batch norm; null: true for deeplab_v2, "
                                     "false for deeplab_v1_r38. With deeplab_v1_r38, true also freezes the "
                                     "first convolution")  # fmt: skip
    stride_in: str | None = setting(None, "deeplab_v2: convolution that has the stride of a stage, reduce or "
                                    "conv3x3; null: as in the initial weights, which is conv3x3 for "
                                    "torchvision's and reduce for all others")  # fmt: skip


@dataclass
class AugmentConfig(Settings):
    """Section `augment`: random scaling, cropping, flipping and color jitter of training samples."""

    SECTION = "augment."

    crop: int = setting(321, "side of a training sample in pixels", least=1)
    scales: list[float] = setting([0.5, 0.75, 1.0, 1.25, 1.5], "deeplab_v2: factors to draw from", above=0)
    base: int | None = setting(None, "deeplab_v2: longer side of the image at scale 1, in pixels; null: its "
                               "own size", least=1)  # fmt: skip
    flip: bool = setting(True, "mirror half of the samples")
    scale_range: list[float] = setting([0.5, 1.5], "deeplab_v1_r38: range from which the scale factor "
                                       "is drawn", above=0)  # fmt: skip
    jitter: int = setting(10, "deeplab_v1_r38: largest shift of hue, saturation and value", least=0)


@dataclass
class OptimConfig(BaseOptimConfig):
    """Section `solver`: SGD with the poly schedule."""

    momentum: float = setting(0.9, "momentum of SGD", least=0)
    power: float = setting(0.9, "power of the poly schedule", least=0)
    decay_every: int = setting(10, "iterations between two updates of the learning rate", least=1)
    loss: str = setting("ce", "ce: cross-entropy; balanced: mean of the cross-entropies of background and "
                        "foreground", choices=LOSSES)  # fmt: skip


@dataclass
class Config(base.Config):
    """Configuration of a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    solver: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output="output/deeplab"))
