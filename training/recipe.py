"""The recipe of a trained method: all information about the method that `training` uses.

A method's folder contains `recipe.py` with its `RECIPE`, and one module per command, which binds it:

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
        build: (configuration, benchmark) -> network with random weights; only frozen submodules are loaded.
        optimizer: (network, configuration) -> (optimizer whose groups have base learning rates, schedule).
        transform: configuration -> transform of training samples.
        normalize: image (H, W, 3) uint8 RGB -> network input (3, H, W) float32.
        denormalize: inverse of `normalize`, for figures.
        protocol: published test protocol.
        crf: name of its CRF preset in `refinement.densecrf.PRESETS`.
        unused: configuration keys that have no effect with this network; setting one is an error.
        frozen: names of the submodules that are not trained and not saved in checkpoints.
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
        name: its package; `python -m <name>.train` trains it, and its outputs record the step `<name>.train`.
        title: its name in --help.
        config: class of its configuration.
        networks: value of `model.network` -> network.
        objective: configuration -> objective to minimize.
        load_initial: (network, file) -> loads the initial weights and returns a report to print.
        load_trained: (network, file) -> loads a checkpoint; raises ValueError if it does not fit the network.
        resolve: (configuration, recorded settings of the resumed run or None) -> sets the values
            that depend on the initial weights.
        frozen_files: configuration -> {name: file of frozen weights}; outputs record their sha256.
        extras: (configuration, benchmark) -> `segmentation.dataset.TrainingSet.extras`.
        needs_masks: whether training reads masks in addition to images and `extras`.
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
            ValueError: the network is unknown, or a key that has no effect with it is set.
        """
        name, defaults = config.model.network, self.config()
        if name not in self.networks:
            raise ValueError(f"model.network must be one of {', '.join(self.networks)}, got {name!r}")
        for key in self.networks[name].unused:
            if attrgetter(key)(config) != attrgetter(key)(defaults):
                raise ValueError(f"{key} has no effect with {name}: remove it")
        return self.networks[name]
