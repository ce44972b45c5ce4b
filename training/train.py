"""Command `train` of a method: trains a network in a run folder, and resumes a stopped run."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from foundation.cli import Parser
from foundation.files import sha256, write_file
from foundation.logs import log
from pipeline.compute import warn_of_slow_precision
from pipeline.evaluate import benchmark_scores
from pipeline.processes import device_of
from pipeline.run import Record, Run, check_folder, fingerprint, first_few, read_settings
from segmentation.benchmark import Benchmark
from segmentation.checkpoints import FINAL, RESUME, numbered_checkpoints
from segmentation.dataset import Batch, TrainingSet, check_files, read_labels
from segmentation.distributed import gather, local_rank_and_world, rank_and_world, together
from segmentation.images import find_image, read_rgb
from segmentation.inference import infer
from segmentation.masks import check_class_pixels, overlay
from segmentation.metrics import confusion
from segmentation.trainer import LOGS, Figures, Trainer, Validation
from training import config as configs
from training.config import Config
from training.data import Split, benchmark_of, training_split, validation_split
from training.recipe import Network, Recipe
from training.segmenter import protocol_of

OUTPUTS = ("checkpoint_*.pth", RESUME)
NUM_SHOWN = 3  # samples of an example figure
AGAIN = "the same command with --resume continues from the last saved state"


def validation(
    split: Split, network: Network, benchmark: Benchmark, device: str, precision: str
) -> Validation:
    """Return a function that scores a network on a split. The ranks divide the images.

    Each image is segmented once, at scale 1. The published protocol of command `test` may have more scales.
    """
    protocol = replace(network.protocol, scales=(1.0,), flip=False)
    rank, world = rank_and_world()
    channels = benchmark.channels

    def validate(model: nn.Module) -> dict[str, float]:
        hist, failed = np.zeros((channels, channels), np.int64), []
        for name in split.names[rank::world]:
            try:
                image = read_rgb(find_image(split.image_dir, name))
                truth = read_labels(split.label_dir, name, channels, image.shape[:2])
                segmented = infer(model, network.normalize(image), protocol, device, precision)
                hist += confusion(truth, segmented.labels, channels)
            except (ValueError, OSError) as error:  # training continues
                failed.append(f"{name} ({error})")
        hists, failures = zip(*gather((hist, failed)), strict=True)
        failures = [failure for part in failures for failure in part]
        if failures and rank == 0:
            log.warning("%d images were left out of validation: %s", len(failures), first_few(failures))
        scores = benchmark_scores(sum(hists), benchmark)
        return {name: scores[name] for name in ("Mean IoU", "Pixel Accuracy")}

    return validate


def figures(network: Network, benchmark: Benchmark) -> Figures:
    """Return a function that draws an example figure: one row per sample with input, label and prediction."""

    def draw(model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        images, labels = batch.images[:NUM_SHOWN], batch.labels[:NUM_SHOWN]
        logits = nn.functional.interpolate(model(images).float(), labels.shape[-2:], mode="bilinear")
        rows = []
        for image, *masks in zip(images, labels, logits.argmax(1), strict=True):
            pixels = network.denormalize(image.float().cpu().numpy())
            masks = [mask.cpu().numpy().astype(np.uint8) for mask in masks]
            overlays = [overlay(pixels, mask, benchmark.palette) for mask in masks]
            rows.append(np.concatenate([pixels, *overlays], axis=1))  # (h, 3 w, 3)
        return {"input_label_prediction": np.concatenate(rows)}

    return draw


def prepare(
    recipe: Recipe, config: Config, overwrite: bool = False, resume: bool = False
) -> Trainer | None:
    """Return the trainer of a configuration, with its network initialized or resumed and its folder checked.

    Returns:
        The trainer, or None if the run to resume is complete.

    Raises:
        FileNotFoundError, ValueError: an input is missing or invalid; no file was changed.
    """
    folder = Path(config.run.output)
    with together():
        network, benchmark = recipe.network(config), benchmark_of(config)
        # A resumed network does not need its initial weights; their file may be gone.
        started = resume and (folder / RESUME).is_file()
        recipe.resolve(config, read_settings(folder).get("settings", {}) if started else None)
        split = training_split(config, benchmark, recipe.needs_masks)
        protocol_of(recipe, config)  # so that an invalid protocol is an error before training
        record = check_run_folder(recipe, config, split, overwrite, resume, started)
        if resume and (folder / FINAL).is_file():
            return None
        check_files(*split)
        if split.label_dir is not None:
            check_class_pixels(split.label_dir, split.names, benchmark)
        transform, extras = network.transform(config), recipe.extras(config, benchmark)
        dataset = TrainingSet(*split, benchmark.channels, transform, config.solver.seed, extras)
        device = torch.device(device_of(config.run.device, local_rank_and_world()[0]))
        warn_of_slow_precision(device.type, config.run.precision)
        validate = None
        if config.data.val_split and config.run.validate_every:
            val = validation_split(config, benchmark)
            check_files(*val)
            check_class_pixels(val.label_dir, val.names, benchmark, allow_background=True)
            validate = validation(val, network, benchmark, str(device), config.run.precision)
        torch.manual_seed(config.solver.seed)
        model = network.build(config, benchmark)
        report = recipe.load_initial(model, config.model.init) if config.model.init and not started else None
    with together():
        trainer = Trainer(
            model.to(device),
            *network.optimizer(model, config),
            recipe.objective(config),
            dataset,
            config.solver,
            config.run,
            network.frozen,
            validate,
            figures(network, benchmark),
        )
        resumed = resume and trainer.load_resume()
        run = Run(folder, record, overwrite)
    trainer.after_save = partial(run.check_folders, AGAIN)
    if run.rank == 0:
        if report:
            log.info("%s", report)
        if not resume:
            for events in (folder / LOGS).glob("events.out.tfevents*"):
                events.unlink()
        elif not resumed:
            log.warning("nothing to resume in %s: starting at iteration 0", folder)
        write_file(folder / configs.CONFIG, configs.to_yaml(config))
    return trainer


def check_run_folder(
    recipe: Recipe, config: Config, split: Split, overwrite: bool, resume: bool, started: bool
) -> Record:
    """Return the record of the run, without changing any file.

    Args:
        started: the run has a resume file; the recorded hash of its initial weights is kept.

    Raises:
        ValueError: the folder contains another run, files of another origin, or this run while neither
            `resume` nor `overwrite` is set.
    """
    folder, step = Path(config.run.output), f"{recipe.name}.train"
    if folder.resolve() in (Path(path).resolve() for path in (split.image_dir, split.label_dir) if path):
        raise ValueError(f"run.output {folder} is the folder of the images or masks: choose another folder")
    last = read_settings(folder)
    foreign = next((name for name in (configs.CONFIG, LOGS) if (folder / name).exists()), None)
    if foreign and last.get("step") != step:
        raise ValueError(
            f"run.output {folder} contains {foreign} but no record of {step}: choose another folder"
        )
    sections = asdict(config)
    sections["data"] |= {key: str(Path(value)) for key, value in sections["data"].items() if value}
    info = {name: sections.pop(name) for name in ("run", "test")}
    settings = {f"{name}.{key}": value for name, part in sections.items() for key, value in part.items()}
    settings = {"benchmark": settings.pop("data.benchmark"), **settings}
    settings |= {f"run.{key}": info["run"][key] for key in ("precision", "sync_batchnorm")}
    files = {"init": config.model.init, **recipe.frozen_files(config)}
    inputs = {name: sha256(file) if Path(file).is_file() else "" for name, file in files.items()}
    if started:
        inputs["init"] = last.get("inputs", {}).get("init", "")
    if split.label_dir is not None:
        inputs["labels"] = fingerprint(read_settings(split.label_dir))
    record = Record(step, settings, inputs, OUTPUTS, info)
    check_folder(folder, record, overwrite)
    trained = [folder / RESUME, *numbered_checkpoints(folder), folder / FINAL]
    first = next((file for file in trained if file.is_file()), None)
    if first and not resume and not overwrite:
        raise ValueError(
            f"run.output {folder} contains {first.name}: give --resume to continue that run, --overwrite to "
            "start from scratch, or choose another folder"
        )
    return record


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        prog=f"python -m {recipe.name}.train",
        description=f"Train {recipe.title}, in one process or, with torchrun, in several. SIGTERM and "
        "Ctrl-C save the state and stop. --resume continues; the result is the same as without the stop. "
        "TensorBoard shows run.output/logs.",
        epilog=f"docs/{recipe.name}.md lists all keys of the configuration.",
    )
    flag = parser.add_argument
    flag("--config", metavar="FILE.yaml", help=f"configuration; published ones are in {recipe.name}/configs")
    flag("--resume", action="store_true", help="continue the run in run.output; start it if nothing is saved")
    flag("--overwrite", action="store_true", help="remove the outputs of an earlier run in run.output first")
    flag("overrides", nargs="*", metavar="key=value", help="changes to the configuration, such as "
         "data.label_dir=output/voc12/pseudo_masks solver.learning_rate=2e-4")  # fmt: skip
    args = parser.parse_intermixed_args(arguments)
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite cannot be combined: give only one of them")
    first = rank_and_world()[0] == 0
    with together():
        config = configs.read(recipe.config, args.config, args.overrides)
    if first:
        print(configs.to_yaml(config))
    trainer = prepare(recipe, config, args.overwrite, args.resume)
    final = Path(config.run.output) / FINAL
    if trainer is None:
        message = f"training is complete: {final}"
    elif trainer.run():
        message = f"trained {trainer.done} iterations: {final}"
    else:
        message = f"stopped after iteration {trainer.done}: the same command with --resume continues"
    if first:
        print(message)
    return 0
