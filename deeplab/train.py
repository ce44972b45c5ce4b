"""Step 3, a network learns from masks: python -m deeplab.train --help"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.files import replacing, sha256
from deeplab import config as configs
from deeplab.checkpoint import family, load_init
from deeplab.config import Config
from deeplab.data import Split, benchmark_of, training_split, validation_split
from deeplab.keymaps import STRIDE_IN
from deeplab.networks import Network, network_of
from deeplab.trained import protocol_of
from pipeline.evaluate import benchmark_scores
from pipeline.flags import HelpFormatter
from pipeline.masks import fingerprint
from pipeline.processes import device_of
from pipeline.run import Run, check_folder, command, read_settings, some
from segmentation.benchmark import Benchmark
from segmentation.checkpoints import FINAL, RESUME, checkpoints
from segmentation.dataset import TrainingSet, check_files, check_values
from segmentation.distributed import gather, rank_and_world, together
from segmentation.images import find_image, read_rgb
from segmentation.inference import infer
from segmentation.losses import LOSSES, pyramid
from segmentation.masks import overlay, read_mask
from segmentation.metrics import confusion
from segmentation.trainer import LOGS, Objective, Trainer

STEP = "deeplab.train"
OUTPUTS = ("checkpoint_*.pth", RESUME)
SHOWN = 3  # samples in the pictures of the log


def objective(loss: str) -> Objective:
    """The loss of every output of the network, each at its own size; their sum is minimised.

    Args:
        loss: a name in `segmentation.losses.LOSSES`.
    """
    if loss not in LOSSES:
        raise ValueError(f"solver.loss must be one of {', '.join(LOSSES)}, got {loss!r}")

    def losses(model: nn.Module, images: Tensor, labels: Tensor, share: Callable) -> dict[str, Tensor]:
        found = pyramid(model(images), labels, LOSSES[loss], share)
        return {f"output_{index}": value for index, value in enumerate(found)}

    return losses


def validation(
    split: Split, network: Network, benchmark: Benchmark, device: str, precision: str
) -> Callable[[nn.Module], dict[str, float]]:
    """A function network -> scores on a split, its images shared out among the ranks.

    Every image is taken once, as it is: the public protocol may take it many times (`deeplab.test`).
    """
    protocol = replace(network.protocol, scales=(1.0,), flip=False)
    rank, world = rank_and_world()
    channels = benchmark.channels

    def validate(model: nn.Module) -> dict[str, float]:
        hist, failed = np.zeros((channels, channels), np.int64), []
        for name in split.names[rank::world]:
            try:
                image = read_rgb(find_image(split.image_dir, name))
                mask_file = Path(split.label_dir) / f"{name}.png"
                truth = read_mask(mask_file)
                check_values(truth, channels, mask_file)
                found = infer(model, network.normalise(image), protocol, device, precision)
                hist += confusion(truth, found.argmax(0).cpu().numpy(), channels)
            except (ValueError, OSError) as error:  # no reason to stop training
                failed.append(f"{name} ({error})")
        hists, failures = zip(*gather((hist, failed)), strict=True)
        failures = [failure for part in failures for failure in part]
        if failures and rank == 0:
            print(f"{len(failures)} images could not be validated on: {some(failures)}", file=sys.stderr)
        found = benchmark_scores(sum(hists), benchmark)
        return {name: found[name] for name in ("Mean IoU", "Pixel Accuracy")}

    return validate


def pictures(
    network: Network, benchmark: Benchmark
) -> Callable[[nn.Module, Tensor, Tensor], dict[str, np.ndarray]]:
    """A function (network, images, masks) -> one picture: samples in rows, as drawn, labelled, predicted."""

    def paint(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
        images, labels = images[:SHOWN], labels[:SHOWN]
        logits = nn.functional.interpolate(model(images).float(), labels.shape[-2:], mode="bilinear")
        rows = []
        for image, *masks in zip(images, labels, logits.argmax(1), strict=True):
            drawn = network.denormalise(image.float().cpu().numpy())
            shown = [overlay(drawn, mask.cpu().numpy().astype(np.uint8), benchmark.palette) for mask in masks]
            rows.append(np.concatenate([drawn, *shown], axis=1))  # (h, 3 w, 3)
        return {"input_label_prediction": np.concatenate(rows)}

    return paint


def prepare(config: Config, overwrite: bool = False, resume: bool = False) -> Trainer | None:
    """A trainer as the configuration says, its network initialised or resumed, its folder settled.

    Returns:
        None if the run that was to be resumed is complete.

    Raises:
        FileNotFoundError, ValueError: something is missing or does not fit; nothing was trained yet, nor
            anything removed.
    """
    with together():
        network, benchmark = network_of(config), benchmark_of(config)
        # What is resumed has its weights, and no need of the file that it began with.
        begun = resume and (Path(config.run.output) / RESUME).is_file()
        if config.model.init and config.model.stride_in is None:
            if begun:
                known = read_settings(config.run.output).get("settings", {})
                config.model.stride_in = known.get("model.stride_in")
            else:
                config.model.stride_in = STRIDE_IN.get(family(config.model.init))
        split = training_split(config, benchmark)
        losses = objective(config.solver.loss)
        protocol_of(config)  # raises what testing would, days later
        record = settled(config, split, overwrite, resume, begun)
        if resume and (Path(config.run.output) / FINAL).is_file():
            return None
        check_files(split.names, split.image_dir, split.label_dir)
        dataset = TrainingSet(
            split.names,
            split.image_dir,
            split.label_dir,
            benchmark.channels,
            network.transform(config.augment),
            config.solver.seed,
        )
        device = torch.device(device_of(config.run.device, int(os.environ.get("LOCAL_RANK", 0))))
        validate = None
        if config.data.val_split and config.run.validate_every:
            val = validation_split(config, benchmark)
            check_files(val.names, val.image_dir, val.label_dir)
            validate = validation(val, network, benchmark, str(device), config.run.precision)
        torch.manual_seed(config.solver.seed)
        model = network.build(config.model, benchmark.channels)
        report = load_init(model, config.model.init) if config.model.init and not begun else None
    with together():
        trainer = Trainer(
            model.to(device),
            network.groups(model),
            losses,
            dataset,
            config.solver,
            config.run,
            horizon=network.horizon(config.solver),
            validation=validate,
            pictures=pictures(network, benchmark),
        )
        resumed = resume and trainer.load_resume()
        run = Run(config.run.output, outputs=OUTPUTS, overwrite=overwrite, step=STEP, **record)
    if run.rank == 0:
        if report:
            print(report, file=sys.stderr)
        if not resume:
            for events in (run.folder / LOGS).glob("events.out.tfevents*"):
                events.unlink()
        elif not resumed:
            print(f"nothing to resume in {run.folder}: starting at iteration 0", file=sys.stderr)
        with replacing(run.folder / configs.CONFIG) as stream:
            stream.write(configs.text(config).encode())
    return trainer


def settled(
    config: Config, split: Split, overwrite: bool, resume: bool, begun: bool = False
) -> dict[str, Any]:
    """What the run records of itself (arguments of `Run`), if its folder may be taken; changes nothing.

    Args:
        begun: the initial weights are those that are recorded, whether their file is there or not.

    Raises:
        ValueError: the folder holds another run, or this one and neither `resume` nor `overwrite` is set; or
            files that no run wrote.
    """
    folder = Path(config.run.output)
    if folder.resolve() in (Path(split.image_dir).resolve(), Path(split.label_dir).resolve()):
        raise ValueError(f"run.output {folder} is the folder of the images or masks: choose another")
    last = read_settings(folder)
    foreign = next((name for name in (configs.CONFIG, LOGS) if (folder / name).exists()), None)
    if foreign and last.get("step") != STEP:
        raise ValueError(f"{folder} holds {foreign}, which no training wrote: choose another run.output")
    parts = asdict(config)
    parts["data"] |= {key: str(Path(value)) for key, value in parts["data"].items() if value}
    info = {"run": parts.pop("run"), "test": parts.pop("test")}
    settings = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    settings = {"benchmark": settings.pop("data.benchmark"), **settings}
    record = {
        "settings": {
            **settings,
            "run.precision": config.run.precision,
            "run.sync_batchnorm": config.run.sync_batchnorm,
        },
        "inputs": {
            "init": last.get("inputs", {}).get("init", "") if begun else _digest(config.model.init),
            "labels": fingerprint(read_settings(split.label_dir)),
        },
    }
    check_folder(folder, **record, outputs=OUTPUTS, overwrite=overwrite, step=STEP)
    trained = [folder / RESUME, *checkpoints(folder), folder / FINAL]
    first = next((file for file in trained if file.is_file()), None)
    if first and not resume and not overwrite:
        raise ValueError(
            f"{folder} holds {first.name}: --resume continues that run, --overwrite starts anew, or choose "
            "another run.output"
        )
    return {**record, "info": info}


def _digest(file: str) -> str:
    return sha256(file) if Path(file).is_file() else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deeplab.train",
        description="Step 3: train DeepLab on masks; under torchrun in several processes. SIGTERM and Ctrl-C "
        "save, and --resume continues as if nothing had happened. run.output/logs is for TensorBoard.",
        epilog="The keys are those of deeplab/config.py, explained in docs/deeplab.md.",
        formatter_class=HelpFormatter,
    )
    flag = parser.add_argument
    flag("--config", metavar="FILE.yaml", help="configuration; published recipes are in deeplab/configs")
    flag("--resume", action="store_true", help="continue the run in run.output; start it if nothing is saved")
    flag("--overwrite", action="store_true", help="remove what another run left in run.output")
    flag("overrides", nargs="*", metavar="key=value", help="changes to the configuration, such as "
         "data.label_dir=output/voc12/pseudo_masks solver.learning_rate=2e-4")  # fmt: skip
    args = parser.parse_intermixed_args(arguments)
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite contradict each other")
    first = rank_and_world()[0] == 0
    with together():
        config = configs.read(args.config, args.overrides)
    if first:
        print(configs.text(config))
    trainer = prepare(config, args.overwrite, args.resume)
    final = Path(config.run.output) / FINAL
    if trainer is None:
        told = f"training is complete: {final}"
    elif trainer.run():
        told = f"trained {trainer.done} iterations: {final}"
    else:
        told = f"stopped after iteration {trainer.done}: the same command with --resume continues"
    if first:
        print(told)
    return 0


if __name__ == "__main__":
    command(main, again="the same command with --resume continues from what was saved last")
