"""The flags of step 1, and what the scripts that have them do."""
import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import clip
from clip.checkpoint import rounds
from clip.download import resolve
from clip.positions import POSITION_ROUNDINGS
from common.files import sha256
from pipeline import shards
from pipeline.cams import (
    AHEAD,
    INITIAL,
    REFINEMENTS,
    CamJob,
    CamSettings,
    CamStep,
    flow_settings,
    generate,
)
from pipeline.flags import HelpFormatter, add_preset_flag, count, factors, leave_out_last, share, workers
from pipeline.flow import FlowSettings
from pipeline.run import Run
from pytorch_grad_cam import METHODS
from pytorch_grad_cam.grad_cam import AFFINITY_LAYERS
from segmentation import benchmark as benchmarks
from segmentation import camfile, labels
from segmentation.benchmark import Benchmark

OUTPUTS = (*(f"*{suffix}" for suffix in camfile.FORMATS.values()), "*.tar", f"*{shards.FAILED}")  # of CAMs
ROUND_WEIGHTS = {"auto": None, "on": True, "off": False}
LABELS_HELP = "file of lines `id index index ...` that replaces the benchmark's labels"


def main(name: str | None = None) -> int:
    """Parse the command line and make the CAM files.

    Args:
        name: the benchmark; None lets --benchmark choose.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description="Step 1: class activation maps of the classes that each image contains, from a frozen "
        "CLIP. A stopped run is continued by the same command.",
        formatter_class=HelpFormatter,
    )
    flag = add_image_flags(parser, name)
    flag("--cam_out_dir", required=True, help="folder for the CAM files, made if missing")
    flag("--cam_format", choices=camfile.FORMATS, default="full", help="full: the public .npy; compact: "
         ".npz, about 120 times smaller, which every script here reads as well")  # fmt: skip
    add_preset_flag(parser)
    add_run_flags(parser)
    add_cam_flags(parser)
    args = parser.parse_args()
    folder = None if args.shards else args.cam_out_dir
    job, names, record = cam_job(parser, args, name, folder, args.cam_format)
    retry = {"retry": shards.RETRY} if args.shards else {}
    run = Run(args.cam_out_dir, **record, outputs=OUTPUTS, overwrite=args.overwrite, **retry)
    if args.shards:
        step = partial(CamStep, job)
        run.map(shards.generate, names, args.cam_out_dir, step, num_workers=args.num_workers, counted=False)
    else:
        run.map(generate, names, job, num_workers=args.num_workers, block=job.flow.look_ahead)
    return run.finish()


def add_image_flags(
    parser: argparse.ArgumentParser, name: str | None, labels_help: str = LABELS_HELP
) -> Callable:
    """Which images, labels and model; returns the parser's `add_argument`."""
    flag = parser.add_argument
    if name is None:
        flag("--benchmark", required=True, metavar="NAME|FILE.yaml", help="the data set: voc12, coco14, "
             "cocostuff, shapes or a YAML file that describes it")  # fmt: skip
    flag("--img_root", help="image folder (without it: the benchmark's)")
    split = benchmarks.load(name).split_file if name else "the benchmark's"
    flag("--split_file", help=f"image ids, one a line (without it: {split})")
    flag("--shards", metavar="PATTERN", help="tar shards in place of an image folder, such as "
         "'images-{0000..0099}.tar': <key>.jpg and <key>.cls, class indices as text; what is made of "
         "each goes to a shard of its name")  # fmt: skip
    flag("--labels", help=labels_help)
    flag("--model", help="CLIP checkpoint file, public name (ViT-B/16, RN50, ...) or open_clip model:tag")
    return flag


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """On what, and how fast; the results do not depend on it, but for rounding."""
    flag = parser.add_argument
    flag("--overwrite", action="store_true", help="start anew in a folder filled with other settings")
    flag = parser.add_argument_group("what computes").add_argument
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    flag("--precision", choices=clip.PRECISIONS, default="fp32", help="of the image tower")
    flag("--num_workers", type=count, default=1, help="processes; with several GPUs they take turns, on a "
         "CPU one keeps all cores busy")  # fmt: skip
    flag("--threads", type=count, help="CPU threads of a process, each busy with images of its own (without "
         "it: one for each core); fewer need less memory")  # fmt: skip
    flag("--batch_size", type=batch, default="auto", help="images computed at once; auto: what fits on a "
         "GPU, 1 on a CPU. A batch that does not fit is halved")  # fmt: skip
    flag("--look_ahead", type=count, help="images that are decoded ahead and grouped by size into "
         f"batches; bounds memory (without it: {AHEAD} batches)")  # fmt: skip
    flag("--decode_workers", type=workers, help="processes that decode for a GPU (without it: a core "
         "each, on a CPU 0)")  # fmt: skip


def add_cam_flags(parser: argparse.ArgumentParser) -> None:
    """How CAMs are made."""
    flag = parser.add_argument_group("how CAMs are made (the defaults are CLIP-ES's)").add_argument
    flag("--refine", choices=REFINEMENTS, default="caa", help="attention affinity with class boxes (caa), "
         "affinity alone (mhsa), or the initial CAM (none)")  # fmt: skip
    flag("--keep_initial", action="store_true", help=f"also store the initial CAM, as cam type {INITIAL}")
    flag("--cam_method", choices=METHODS, default="gradcam", help="how gradients weigh activations")
    flag("--cam_scales", type=factors, default="1.0", help="scales to average, e.g. 0.5,1.0,1.5")
    flag("--flip", action="store_true", help="average with the CAMs of the mirrored image")
    flag("--averaged_blocks", type=count, default=AFFINITY_LAYERS, help="last blocks that make the affinity")
    flag("--leave_out_last", action=argparse.BooleanOptionalAction, help="average without the very last of "
         "these blocks (without it: as --preset says)")  # fmt: skip
    flag("--box_threshold", type=share, help="lambda of the class boxes (without it: the benchmark's)")
    flag("--cover_edge", action="store_true", help="let class boxes reach the grid's last row and column, "
         "which the public code cuts off")  # fmt: skip
    flag("--position_rounding", choices=POSITION_ROUNDINGS, default="always", help="round the positional "
         "table to float16")  # fmt: skip
    flag("--round_weights", choices=ROUND_WEIGHTS, default="auto", help="round matrix weights to float16; "
         "auto: those of OpenAI-layout files, as the public code does")  # fmt: skip
    flag("--max_patches", type=count, default=10_000, help="images with more are shrunk to this many")


def batch(text: str) -> int | None:
    """Argument type: a number of images, or auto (None)."""
    return None if text == "auto" else count(text)


def cam_job(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    name: str | None,
    output: str | None,
    cam_format: str,
    found_later: bool = False,
) -> tuple[CamJob, list[str], dict]:
    """What the flags ask for.

    Args:
        name: the benchmark; None takes --benchmark.
        output: folder of the CAM files; None when they are not kept, or go to shards.
        cam_format: see `segmentation.camfile`; "none" when they are not kept.
        found_later: labels are yet to be found; the job has none, and --labels is only recorded.

    Returns:
        The job; names of images, or of shards; and what a folder of CAMs records, as arguments of `Run`.
    """
    name = name or args.benchmark
    benchmark = benchmarks.load(name)
    model = args.model or benchmark.model
    if not model:
        parser.error("--model: give a CLIP checkpoint file, or a public name such as ViT-B/16")
    image_root = Path(args.img_root or benchmark.path(benchmark.image_dir))
    if args.shards:
        if args.img_root or args.split_file:
            parser.error("--shards: its images are all of the shards; leave out --img_root and --split_file")
        names = shards.shard_files(args.shards)
        classes = len(benchmark.classes)
        reader = labels.from_file(args.labels, classes) if args.labels else None
    else:
        if not image_root.is_dir():
            parser.error(f"--img_root: image folder {image_root} does not exist")
        if args.img_root:
            benchmark = beside(benchmark, image_root)
        if found_later:
            names, reader = list(labels.split_or_folder(benchmark, args.split_file, image_root)), None
        else:
            split = labels.split_of(benchmark, args.split_file)
            names, reader = list(split), labels.reader(benchmark, split, args.labels)
    source, told = resolve(model), "shards" if args.shards else benchmark.labels
    if args.labels:
        told = args.labels if found_later else _anywhere(args.labels)
    settings = CamSettings(
        refine=args.refine,
        method=args.cam_method,
        averaged=args.averaged_blocks,
        leave_out_last=leave_out_last(args, benchmark),
        box_threshold=benchmark.box_threshold if args.box_threshold is None else args.box_threshold,
        cover_edge=args.cover_edge,
        scales=args.cam_scales,
        flip=args.flip,
        keep_initial=args.keep_initial,
        position_rounding=args.position_rounding,
        max_patches=args.max_patches,
    )
    job = CamJob(
        benchmark=benchmark,
        image_root=str(image_root),
        labels=reader,
        model=model,
        device=args.device,
        precision=args.precision,
        round_weights=ROUND_WEIGHTS[args.round_weights],
        output=output,
        format=cam_format,
        settings=settings,
        flow=flow_of(args),
    )
    record = {
        "step": "cams",
        "settings": {
            "benchmark": recorded(name),
            "cam_format": cam_format,
            "precision": args.precision,
            "weights_rounded": rounds(source, ROUND_WEIGHTS[args.round_weights]),
            "conventions": source.conventions,
            "prompts": benchmark.prompts,
            "backgrounds": benchmark.backgrounds,
            "templates": benchmark.templates,
            "labels": told,
            **asdict(settings),
        },
        "inputs": {"model": sha256(source.file)},
    }
    return job, names, record


def flow_of(args: argparse.Namespace) -> FlowSettings:
    """What the flags of `add_run_flags` say."""
    return flow_settings(
        args.device,
        processes=args.num_workers,
        batch_size=args.batch_size,
        look_ahead=args.look_ahead,
        threads=args.threads,
        decode_workers=args.decode_workers,
    )


def recorded(name: str) -> str:
    """A benchmark's name, as later steps find it from any folder."""
    return _anywhere(name) if name.endswith((".yaml", ".yml")) else name


def _anywhere(file: str) -> str:
    """A path that later steps find from any folder."""
    return str(Path(file).absolute())


def beside(benchmark: Benchmark, image_root: Path) -> Benchmark:
    """The benchmark with the annotations and masks that lie beside the given images, if they do: the
    public scripts are told nothing but the image folder."""
    folder = {"voc_xml": benchmark.annotation_dir, "masks": benchmark.mask_dir}.get(benchmark.labels)
    root = image_root.absolute()
    for _ in Path(benchmark.image_dir).parts:
        root = root.parent
    if folder is None or not (root / folder).is_dir():
        return benchmark
    return replace(benchmark, root=str(root))
