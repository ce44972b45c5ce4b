"""A minimal method that differs from DeepLab in every part of a recipe.

* Labels are made online from image-level labels and a frozen backbone; the state is class prototypes.
* AdamW with warm-up and a cosine schedule down to a minimum rate; one group has the base rate 0.
* The configuration has its own section.
* The test protocol has a fixed longer side.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from foundation.settings import Settings, setting
from segmentation.benchmark import IGNORE
from segmentation.config import OptimConfig
from segmentation.inference import Protocol
from segmentation.losses import cross_entropy
from segmentation.transforms import ScaleCrop, imagenet_denormalize, imagenet_normalize, resize_labels
from training import config as base
from training.recipe import Network, Recipe


@dataclass
class ModelConfig(base.ModelConfig):
    network: str = setting("toy", "the only network")
    clip: str = setting("", "file of the frozen backbone")


@dataclass
class PrototypeConfig(Settings):
    SECTION = "prototypes."

    momentum: float = setting(0.9, "momentum of the running mean", least=0, most=1)


@dataclass
class AdamWConfig(OptimConfig):
    warmup: int = setting(3, "iterations of linear warm-up", least=1)
    min_rate: float = setting(1e-6, "rate at the end of the cosine", least=0)


@dataclass
class Config(base.Config):
    model: ModelConfig = field(default_factory=ModelConfig)
    solver: AdamWConfig = field(default_factory=AdamWConfig)
    prototypes: PrototypeConfig = field(default_factory=PrototypeConfig)


class Toy(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.clip = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.BatchNorm2d(8))
        self.dropout, self.decoder = nn.Dropout(0.2), nn.Conv2d(8, channels, 1)

    def forward(self, images):
        features = self.clip(images)
        logits = self.decoder(self.dropout(features))
        return (logits, features) if self.training else logits


class OnlineLabels:
    """Labels each cell with the class of the image whose running prototype is nearest."""

    def __init__(self, config: Config):
        self.momentum, self.prototypes = config.prototypes.momentum, None

    def __call__(self, network, batch, global_count):
        logits, features = network(batch.images)  # (B, C, h, w), (B, 8, h, w)
        assert not features.requires_grad
        in_image = batch.extras["image_labels"]  # (B, C) bool
        if self.prototypes is None:
            self.prototypes = torch.linspace(-1, 1, in_image.shape[1])[:, None].repeat(1, features.shape[1])
        scores = torch.einsum("bdhw,cd->bchw", features, self.prototypes)
        labels = scores.masked_fill(~in_image[..., None, None], -math.inf).argmax(1)  # (B, h, w)
        means = [features.mean((0, 2, 3)) * (index + 1) for index in range(in_image.shape[1])]
        self.prototypes = self.prototypes.lerp(torch.stack(means), 1 - self.momentum)
        padding = resize_labels(batch.labels, logits.shape[-2:]) == IGNORE
        return {"seg": cross_entropy(logits, labels.masked_fill(padding, IGNORE), global_count)}

    def state_dict(self):
        return {"prototypes": self.prototypes}

    def load_state_dict(self, state):
        self.prototypes = state["prototypes"]


def rate_of(solver: AdamWConfig, rate: float, done: int) -> float:
    cosine = (1 + math.cos(math.pi * done / solver.iterations)) / 2
    annealed = solver.min_rate + (rate - solver.min_rate) * cosine
    return annealed * min(1, (done + 1) / solver.warmup)


def build(config: Config, benchmark) -> Toy:
    model = Toy(benchmark.channels)
    model.clip.load_state_dict(torch.load(config.model.clip, weights_only=True))
    return model


def optimizer(model: Toy, config: Config):
    groups = [{"params": [model.decoder.weight]}, {"params": [model.decoder.bias], "lr": 0.0}]
    adamw = torch.optim.AdamW(groups, config.solver.learning_rate, weight_decay=config.solver.weight_decay)
    return adamw, partial(rate_of, config.solver)


def transform(config: Config) -> ScaleCrop:
    return ScaleCrop(33, (0.5, 1.0))


def load_trained(model: Toy, file: str) -> None:
    missing = model.load_state_dict(torch.load(file, weights_only=True), strict=False).missing_keys
    assert all(key.startswith("clip.") for key in missing)


def frozen_files(config: Config) -> dict[str, str]:
    return {"clip": config.model.clip}


def image_labels(channels: int, name: str) -> np.ndarray:
    number = int(name.split("_")[1])
    return np.isin(np.arange(channels), [0, 1 + number % 3])


def extras(config: Config, benchmark) -> dict:
    return {"image_labels": partial(image_labels, benchmark.channels), "caption": "a photo of {}".format}


RECIPE = Recipe(
    name="toy",
    title="a toy",
    config=Config,
    networks={
        "toy": Network(
            build=build,
            optimizer=optimizer,
            transform=transform,
            normalize=imagenet_normalize,
            denormalize=imagenet_denormalize,
            protocol=Protocol(scales=(1.0, 0.75), flip=True, average="logits", longer_side=48),
            crf="deeplab",
            frozen=("clip",),
        )
    },
    objective=OnlineLabels,
    load_initial=load_trained,
    load_trained=load_trained,
    frozen_files=frozen_files,
    extras=extras,
    needs_masks=False,
)
