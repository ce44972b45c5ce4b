"""The two networks: how each is built, fed, trained and tested as published."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from torch import nn

from deeplab import model, resnet38
from deeplab.config import Augment, Config, Model, Solver
from segmentation.dataset import Transform
from segmentation.inference import Protocol
from segmentation.transforms import (
    CAFFE_MEAN,
    JitterScaleCrop,
    ScaleCrop,
    caffe_normalise,
    denormalised,
    imagenet_normalise,
)


@dataclass(frozen=True)
class Network:
    """A published network and its conventions.

    Attributes:
        build: (configuration, channels of the logits) -> the network with random weights.
        groups: the network -> parameter groups, see `segmentation.trainer.optimizer`.
        transform: how training samples are drawn.
        normalise: (H, W, 3) uint8 RGB -> (3, H, W) float32, what the network reads.
        denormalise: the other way, for pictures.
        horizon: the iteration at which the learning rate would reach 0.
        protocol: how it is tested.
        crf: preset of the dense CRF that belongs to it.
        foreign: keys of the configuration that are the other network's.
    """

    build: Callable[[Model, int], nn.Module]
    groups: Callable[[nn.Module], list[dict[str, Any]]]
    transform: Callable[[Augment], Transform]
    normalise: Callable[[np.ndarray], np.ndarray]
    denormalise: Callable[[np.ndarray], np.ndarray]
    horizon: Callable[[Solver], int]
    protocol: Protocol
    crf: str
    foreign: tuple[str, ...]


def _chosen(**arguments: Any) -> dict[str, Any]:
    """Arguments of a builder, without those that the configuration leaves to it."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
        if value is not None and value != []
    }


def _build_v2(config: Model, channels: int) -> nn.Module:
    chosen = _chosen(
        blocks=config.blocks, rates=config.rates, freeze_bn=config.freeze_bn, stride_in=config.stride_in
    )
    return model.build_v2(channels, width=config.width, scales=tuple(config.scales), **chosen)


def _build_r38(config: Model, channels: int) -> nn.Module:
    if len(config.rates) > 1:
        raise ValueError(f"deeplab_v1_r38 has one dilation, but model.rates are {config.rates}")
    dilation = next(iter(config.rates), None)
    chosen = _chosen(blocks=config.blocks, dilation=dilation, freeze_bn=config.freeze_bn)
    return resnet38.build_r38(channels, width=config.width, **chosen)


def _without_mean(image: np.ndarray) -> np.ndarray:
    """`caffe_normalise` undone: (3, H, W) float32 -> (H, W, 3) uint8 RGB."""
    bgr = np.rint(image.transpose(1, 2, 0) + CAFFE_MEAN)
    return np.clip(bgr, 0, 255).astype(np.uint8)[..., ::-1]


NETWORKS = {
    "deeplab_v2": Network(
        build=_build_v2,
        groups=model.parameter_groups,
        transform=lambda augment: ScaleCrop(
            augment.crop, tuple(augment.scales), augment.base, augment.flip
        ),
        normalise=caffe_normalise,
        denormalise=_without_mean,
        horizon=lambda solver: solver.iterations,
        protocol=Protocol(),
        crf="deeplab",
        foreign=("augment.scale_range", "augment.jitter"),
    ),
    "deeplab_v1_r38": Network(
        build=_build_r38,
        groups=resnet38.parameter_groups,
        transform=lambda augment: JitterScaleCrop(
            augment.crop, tuple(augment.scale_range), augment.jitter, augment.flip
        ),
        normalise=imagenet_normalise,
        denormalise=denormalised,
        horizon=lambda solver: solver.iterations + 1,
        protocol=Protocol(
            scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
            flip=True,
            average="logits",
            align_corners=True,
            resize="cubic",
        ),
        crf="seam",
        foreign=("model.scales", "model.stride_in", "augment.scales", "augment.base"),
    ),
}


def network_of(config: Config) -> Network:
    """The network that a configuration names.

    Raises:
        ValueError: there is none of that name, or the configuration sets what only another network heeds.
    """
    name = config.model.network
    if name not in NETWORKS:
        raise ValueError(f"model.network must be one of {', '.join(NETWORKS)}, got {name!r}")
    for key in NETWORKS[name].foreign:
        chosen, usual = (attrgetter(key)(source) for source in (config, Config()))
        if chosen != usual:
            raise ValueError(f"{name} does not heed {key}: leave it out")
    return NETWORKS[name]
