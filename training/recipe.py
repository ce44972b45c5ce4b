"""The recipe of a trained method: all that `training` needs to know of it.

A method's folder holds `recipe.py` with its `RECIPE`, and commands that bind it:

    main = partial(training.train.main, RECIPE)

Recipes are pickled for worker processes, so their functions must not be lambdas.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from segmentation.benchmark import Benchmark
from segmentation.dataset import Transform
from segmentation.inference import Protocol
from segmentation.schedules import Schedule
from segmentation.trainer import Objective
from training.config import Config


@dataclass(frozen=True)
class Network:
    """One of a method's networks and its conventions.

    Attributes:
        build: (configuration, benchmark) -> the network with random weights, its frozen submodules loaded.
        optimizer: (network, configuration) -> optimizer, whose groups have their base rates, and schedule.
        transform: configuration -> transform of training samples.
        normalize: (H, W, 3) uint8 RGB -> (3, H, W) float32, the input of the network.
        denormalize: the inverse, for figures.
        protocol: how the network is tested.
        crf: its preset in `refinement.densecrf.PRESETS`.
        unused: keys of the configuration that have no effect with it.
        frozen: names of submodules that are not trained and not saved in checkpoints.
    """

    build: Callable[[Config, Benchmark], nn.Module]
    optimizer: Callable[[nn.Module, Config], tuple[torch.optim.Optimizer, Schedule]]
    transform: Callable[[Config], Transform]
    normalize: Callable[[np.ndarray], np.ndarray]
    denormalize: Callable[[np.ndarray], np.ndarray]
    protocol: Protocol
    crf: str
    unused: Sequence[str] = ()
    frozen: Sequence[str] = ()


def _empty(*_) -> dict:
    return {}


@dataclass(frozen=True)
class Recipe:
    """A trained method.

    Attributes:
        name: its package; `python -m <name>.train` trains it, and outputs record the step `<name>.train`.
        title: its name in --help.
        config: class of its configuration.
        networks: its networks by the value of `model.network`.
        objective: configuration -> what is minimized.
        load_initial: (network, file) -> loads the weights to start from; returns a report to print.
        load_trained: (network, file) -> loads a checkpoint; raises ValueError if it does not fit.
        resolve: (configuration, recorded settings of the resumed run or None) -> sets values that depend on
            the initial weights.
        frozen_files: configuration -> files of frozen weights by name; outputs record their sha256.
        extras: (configuration, benchmark) -> `segmentation.dataset.TrainingSet.extras`.
        needs_masks: whether training reads masks besides images and `extras`.
    """

    name: str
    title: str
    config: type[Config]
    networks: Mapping[str, Network]
    objective: Callable[[Config], Objective]
    load_initial: Callable[[nn.Module, str], object]
    load_trained: Callable[[nn.Module, str], object]
    resolve: Callable[[Config, Mapping[str, Any] | None], object] = _empty
    frozen_files: Callable[[Config], Mapping[str, str]] = _empty
    extras: Callable[[Config, Benchmark], Mapping[str, Callable[[str], Any]]] = _empty
    needs_masks: bool = True

    def network(self, config: Config) -> Network:
        """Return the network of a configuration.

        Raises:
            ValueError: no such network, or a key that has no effect with it is set.
        """
        name, defaults = config.model.network, self.config()
        if name not in self.networks:
            raise ValueError(f"model.network must be one of {', '.join(self.networks)}, got {name!r}")
        for key in self.networks[name].unused:
            if attrgetter(key)(config) != attrgetter(key)(defaults):
                raise ValueError(f"{key} has no effect with {name}: remove it")
        return self.networks[name]
