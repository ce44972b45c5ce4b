"""The command line of step 1: its flags, and the step that they describe."""
import argparse
from collections.abc import Callable
from pathlib import Path

from clip.download import resolve
from foundation.cli import Parser
from foundation.files import sha256
from foundation.settings import add_flags, from_args
from pipeline import flags, shards
from pipeline.cams import ROUND_WEIGHTS, CamSettings, CamStep
from pipeline.compute import ComputeSettings
from pipeline.masks import PUBLISHED, add_preset_flag
from pipeline.run import Record, Run
from segmentation import benchmark as benchmarks
from segmentation import camfile, labels

# Patterns of the output files.
OUTPUTS = (*(f"*{suffix}" for suffix in camfile.FORMATS.values()), "*.tar", f"*{shards.FAILED}")


def main(name: str | None = None) -> int:
    """Parse the command line, make the CAM files and return the exit code.

    Args:
        name: the benchmark; None: the flag --benchmark names it.
    """
    parser = Parser(
        description="Step 1: compute class activation maps (CAMs) for the labels of each image, with a "
        "frozen CLIP. The same command continues a stopped run.",
    )
    flag = parser.add_argument
    add_input_flags(flag, name, flags.LABELS_HELP)
    flag("--output", "--cam_out_dir", required=True, metavar="DIR", help="folder for the CAM files")
    flag("--cam_format", choices=camfile.FORMATS, default="full", help="full: .npy, as in the reference "
         "implementation; compact: .npz, about 120 times smaller. All scripts read both")  # fmt: skip
    add_cam_flags(parser)
    args = parser.parse_args()
    step, names, record = cam_step(
        parser, args, name or args.benchmark, None if args.shards else args.output, args.cam_format
    )
    run = Run(args.output, record, args.overwrite)
    workers = step.compute_settings.num_workers
    run.map(shards.ShardStep(step, args.output) if args.shards else step, names, workers)
    return run.finish()


def add_input_flags(flag: Callable, name: str | None, labels_help: str) -> None:
    """Add the flags for benchmark, images, labels and model.

    Args:
        name: the benchmark of a script that has only one; None adds --benchmark.
        labels_help: help text of --labels.
    """
    if name is None:
        flags.add_benchmark_flag(flag)
    flags.add_image_flags(flag, benchmarks.load(name).split_file if name else "the benchmark's")
    flag("--shards", metavar="PATTERN", help="read tar shards, such as 'images-{0000..0099}.tar', instead of "
         "an image folder. A shard contains <key>.jpg and <key>.cls (class indices as text). Its results are "
         "written to a shard of the same name")  # fmt: skip
    flag("--labels", metavar="FILE", help=labels_help)
    flag("--model", help=flags.MODEL_HELP)


def add_cam_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for how CAMs are made and which device computes them."""
    add_preset_flag(parser.add_argument)
    parser.add_argument("--overwrite", action="store_true", help="remove the outputs of an earlier run first")
    add_flags(parser.add_argument_group("device and speed"), ComputeSettings)
    rules = {"box_threshold": "the benchmark's", "exclude_last_layer": "the preset's"}
    add_flags(parser.add_argument_group("how CAMs are made"), CamSettings, show=rules)


def cam_step(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    name: str,
    output: str | None,
    cam_format: str,
    tagged: bool = False,
) -> tuple[CamStep, list[str], Record]:
    """Return the step that the flags describe, the names of images or shards, and the record of a CAM folder.

    Args:
        name: the benchmark.
        output, cam_format: see `CamStep`; `output` is None for shards.
        tagged: step 0 predicts the labels later: the step has no label reader, and --labels is only recorded.
    """
    benchmark = benchmarks.load(name)
    model = args.model or benchmark.model
    if not model:
        parser.error(f"--model: {name} has no default: give a checkpoint file, or a name such as ViT-B/16")
    image_root = Path(args.image_root or benchmark.path(benchmark.image_dir))
    reader, label_source = None, benchmark.labels
    if args.shards:
        if args.image_root or args.split_file:
            parser.error("--shards: cannot be combined with --image_root or --split_file: remove them")
        names, label_source = shards.shard_files(args.shards), "shards"
        if args.labels:
            reader = labels.from_file(args.labels, len(benchmark.classes))
    else:
        if not image_root.is_dir():
            parser.error(f"--image_root: image folder {image_root} does not exist: give another folder")
        if args.image_root:
            benchmark = flags.beside_images(benchmark, image_root)
        if tagged:
            names = list(labels.split_of(benchmark, args.split_file, image_root))
        else:
            split = labels.split_of(benchmark, args.split_file)
            names, reader = list(split), labels.reader(benchmark, split, args.labels)
    if args.labels:
        label_source = args.labels if tagged else str(Path(args.labels).absolute())
    defaults = CamSettings(
        exclude_last_layer=benchmark.name in PUBLISHED[args.preset]["exclude_last_layer"],
        box_threshold=benchmark.box_threshold,
    )
    step = CamStep(
        benchmark=benchmark,
        image_root=str(image_root),
        labels=reader,
        model=model,
        output=output,
        format=cam_format,
        settings=from_args(defaults, args),
        compute_settings=from_args(ComputeSettings(), args),
    )
    source = resolve(model)
    settings = {
        "benchmark": flags.recorded_path(name),
        "cam_format": cam_format,
        "precision": step.compute_settings.precision,
        "weights_rounded": source.weights_rounded(ROUND_WEIGHTS[step.settings.round_weights]),
        "conventions": source.conventions,
        "prompts": benchmark.prompts,
        "backgrounds": benchmark.backgrounds,
        "templates": benchmark.templates,
        "labels": label_source,
        **step.settings.record(),
    }
    inputs, declared = {"model": sha256(source.file)}, CamSettings().record()
    return step, names, Record("cams", settings, inputs, OUTPUTS, defaults=declared)
