"""Helpers for tests of training: a small data set of images and masks, and functions that ranks run."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deeplab import model as network_a
from deeplab import recipe, train
from deeplab.config import Config, OptimConfig
from pipeline.run import command
from segmentation.benchmark import voc_palette
from segmentation.config import RunConfig
from segmentation.dataset import TrainingSet
from segmentation.distributed import World, rank_and_world, together
from segmentation.masks import write_mask
from segmentation.trainer import Objective, Trainer
from segmentation.transforms import ScaleCrop
from tests.deeplab.common import labels
from tests.weights import parity_image


def write_world(root: Path, train: int = 5, val: int = 3, size: tuple[int, int] = (40, 52)) -> list[str]:
    """Write images and masks in VOC's layout, and split files train.txt and val.txt; return training names.

    Of every five images, one has labels only in its first 4 rows, and two have no labeled pixel.
    """
    names = [f"image_{number}" for number in range(train + val)]
    for number, name in enumerate(names):
        mask = labels(name, (1, *size), 4, block=8, p=0.9)[0].astype(np.uint8)
        if number % 5 in (1, 4):
            mask[:] = 255
        elif number % 5 == 3:
            mask[4:] = 255
        write_mask(root / "SegmentationClass" / f"{name}.png", mask, voc_palette())
        (root / "JPEGImages").mkdir(exist_ok=True)
        Image.fromarray(parity_image(name, *size)).save(root / "JPEGImages" / f"{name}.png")
    for split, part in (("train", names[:train]), ("val", names[train:])):
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in part))
    return names[:train]


def trained(arguments: Sequence[str]) -> None:
    """Run the command `python -m deeplab.train` in this process."""
    command(lambda: train.main(arguments))


def train_a(root: Path, output: Path, loss: str, whole: bool) -> tuple[dict[str, np.ndarray], list[float]]:
    """Train network A for 20 iterations in float64 on five images, in batches of four and of one.

    Args:
        whole: divide the loss by the labeled pixels of all ranks; False: each rank divides by its own.

    Returns:
        The parameters, and the losses of the last iterations.
    """
    objective = objective_of(loss)

    def alone(network, batch, global_count):
        return objective(network, batch, global_count if whole else lambda counts: counts)

    trainer = train_with(root, output, alone)
    assert trainer.run()
    parameters = {name: value.detach().numpy() for name, value in trainer.model.named_parameters()}
    return parameters, list(trainer.recent)


def objective_of(loss: str) -> Objective:
    return recipe.objective(Config(solver=OptimConfig(loss=loss)))


def train_with(root: Path, output: Path, objective: Objective, freeze_bn: bool = True, **run) -> Trainer:
    torch.manual_seed(0)
    model = network_a.build_v2(21, (1, 1, 1, 1), (1, 2), width=4, scales=(0.5,), freeze_bn=freeze_bn)
    model.double()
    names = (root / "train.txt").read_text().split()
    dataset = TrainingSet(
        names, str(root / "JPEGImages"), str(root / "SegmentationClass"), 21, ScaleCrop(33, (0.75, 1.0))
    )
    solver = OptimConfig(iterations=20, batch_size=4, accumulate=2, learning_rate=1e-3, decay_every=1)
    optimizer = recipe.sgd(network_a.parameter_groups(model), solver)
    schedule = recipe.schedule(solver, solver.iterations)
    run = RunConfig(str(output), "cpu", workers=1, **run)
    return Trainer(model, optimizer, schedule, objective, dataset, solver, run)


def train_cases(root: Path, output: Path, cases: Sequence[tuple[str, bool]]) -> list:
    return [train_a(root, output / f"{loss}_{whole}", loss, whole) for loss, whole in cases]


def exchange() -> dict[str, list]:
    """Return the result of each communication between ranks."""
    world = World(torch.device("cpu"))
    own = torch.tensor([1.0, 10.0]) * world.rank
    mean, same = world.mean(own), own.clone()
    world.copy_from_rank_0([same])
    return {
        "any": world.any(world.rank == 1, False),
        "mean": mean.tolist(),
        "same": same.tolist(),
        "given": own.tolist(),
    }


def fail_on_rank_1() -> None:
    def main():
        with together():
            if rank_and_world()[0] == 1:
                raise FileNotFoundError("rank 1 found nothing")

    command(main)


def nan_on_rank_1(root: Path, output: Path) -> None:
    """Train with a loss that is NaN on rank 1 in the third iteration."""
    calls = []

    def poisoned(*arguments):
        calls.append(None)
        losses = objective_of("ce")(*arguments)
        bad = rank_and_world()[0] == 1 and len(calls) == 5
        return {name: loss * float("nan") if bad else loss for name, loss in losses.items()}

    command(lambda: train_with(root, output, poisoned, save_every=2).run())


def statistics_validated(root: Path, output: Path) -> list[np.ndarray]:
    """Return the batch norm statistics in a rank's validation, before training and after two iterations."""
    trainer = train_with(root, output, objective_of("ce"), freeze_bn=False, validate_every=2)
    statistics = [_statistics(trainer.model)]

    def validate(model):
        statistics.append(_statistics(model))
        return {}

    trainer.validation, trainer.optim.iterations = validate, 2
    trainer.run()
    return statistics


def _statistics(model: torch.nn.Module) -> np.ndarray:
    return np.concatenate([value.numpy().ravel() for value in model.buffers()])  # a copy


def lose_rank_1() -> None:
    def main():
        world = World(torch.device("cpu"))
        world.any(False)
        if world.rank == 1:
            os._exit(9)
        world.any(False)

    command(main)
