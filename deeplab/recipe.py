"""Recipes of the two DeepLab networks: construction, input, optimizer, losses and test, as published."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from deeplab import model, resnet38
from deeplab.checkpoint import family, load_full, load_init
from deeplab.config import Config, OptimConfig
from deeplab.keymaps import STRIDE_IN
from segmentation.benchmark import Benchmark
from segmentation.dataset import Batch
from segmentation.inference import Protocol
from segmentation.losses import LOSSES, GlobalCount, pyramid
from segmentation.schedules import Schedule, poly
from segmentation.trainer import Objective
from segmentation.transforms import (
    JitterScaleCrop,
    ScaleCrop,
    caffe_denormalize,
    caffe_normalize,
    imagenet_denormalize,
    imagenet_normalize,
)
from training.recipe import Network, Recipe


def sgd(groups: Sequence[Mapping[str, Any]], solver: OptimConfig) -> torch.optim.SGD:
    """Return the SGD optimizer for parameter groups.

    Args:
        groups: dicts of `params`, `rate` (factor of the learning rate) and `weight_decay` (bool).
        solver: learning rate, weight decay and momentum.
    """
    options = [
        {
            "params": group["params"],
            "lr": group["rate"] * solver.learning_rate,
            "weight_decay": group["weight_decay"] * solver.weight_decay,
        }
        for group in groups
    ]
    return torch.optim.SGD(options, lr=solver.learning_rate, momentum=solver.momentum)


def schedule(solver: OptimConfig, max_iterations: int) -> Schedule:
    """Return the poly schedule; the learning rate becomes 0 at `max_iterations`."""
    return lambda rate, done: rate * poly(done, max_iterations, solver.power, solver.decay_every)


def objective(config: Config) -> Objective:
    """Return the objective: a loss for each output of the network, against masks of the same size."""
    loss = LOSSES[config.solver.loss]

    def losses(network: nn.Module, batch: Batch, global_count: GlobalCount) -> dict[str, torch.Tensor]:
        values = pyramid(network(batch.images), batch.labels, loss, global_count)
        return {f"output_{index}": value for index, value in enumerate(values)}

    return losses


def resolve(config: Config, recorded: Mapping[str, Any] | None) -> None:
    """Set `model.stride_in` to that of the initial weights or, if resumed, of the recorded run."""
    if config.model.init and config.model.stride_in is None:
        if recorded is None:
            config.model.stride_in = STRIDE_IN.get(family(config.model.init))
        else:
            config.model.stride_in = recorded.get("model.stride_in")


def _optimizer(
    network: nn.Module, config: Config, extra_iterations: int = 0
) -> tuple[torch.optim.Optimizer, Schedule]:
    solver = config.solver
    max_iterations = solver.iterations + extra_iterations
    return sgd(model.parameter_groups(network), solver), schedule(solver, max_iterations)


def _without_defaults(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are set; None and [] select the builder's default."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
        if value is not None and value != []
    }


def _build_v2(config: Config, benchmark: Benchmark) -> nn.Module:
    c = config.model
    options = _without_defaults(blocks=c.blocks, rates=c.rates, freeze_bn=c.freeze_bn, stride_in=c.stride_in)
    return model.build_v2(benchmark.channels, width=c.width, scales=tuple(c.scales), **options)


def _transform_v2(config: Config) -> ScaleCrop:
    augment = config.augment
    return ScaleCrop(augment.crop, tuple(augment.scales), augment.base, augment.flip)


def _build_r38(config: Config, benchmark: Benchmark) -> nn.Module:
    c = config.model
    if len(c.rates) > 1:
        raise ValueError(f"model.rates is {c.rates}, but deeplab_v1_r38 has one dilation: give one rate")
    options = _without_defaults(blocks=c.blocks, dilation=next(iter(c.rates), None), freeze_bn=c.freeze_bn)
    return resnet38.build_r38(benchmark.channels, width=c.width, **options)


def _transform_r38(config: Config) -> JitterScaleCrop:
    augment = config.augment
    return JitterScaleCrop(augment.crop, tuple(augment.scale_range), augment.jitter, augment.flip)


NETWORKS = {
    "deeplab_v2": Network(
        build=_build_v2,
        optimizer=_optimizer,
        transform=_transform_v2,
        normalize=caffe_normalize,
        denormalize=caffe_denormalize,
        protocol=Protocol(),
        crf="deeplab",
        unused=("augment.scale_range", "augment.jitter"),
    ),
    "deeplab_v1_r38": Network(
        build=_build_r38,
        optimizer=partial(_optimizer, extra_iterations=1),  # as in SEAM: the rate does not reach 0
        transform=_transform_r38,
        normalize=imagenet_normalize,
        denormalize=imagenet_denormalize,
        protocol=Protocol(
            scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
            flip=True,
            average="logits",
            align_corners=True,
            resize="cubic",
        ),
        crf="seam",
        unused=("model.scales", "model.stride_in", "augment.scales", "augment.base"),
    ),
}

RECIPE = Recipe(
    name="deeplab",
    title="DeepLab",
    config=Config,
    networks=NETWORKS,
    objective=objective,
    load_initial=load_init,
    load_trained=load_full,
    resolve=resolve,
)
