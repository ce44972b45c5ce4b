"""The flags that the three generate_cams scripts share."""
import argparse
import math
from dataclasses import asdict, replace
from pathlib import Path

import clip
from clip.checkpoint import rounds
from clip.download import resolve, sha256
from clip.positions import POSITION_ROUNDINGS
from pipeline.cams import INITIAL, REFINEMENTS, CamJob, CamSettings, generate
from pipeline.flags import HelpFormatter
from pipeline.run import Run
from pytorch_grad_cam import METHODS
from pytorch_grad_cam.grad_cam import AVERAGED_BLOCKS
from segmentation import benchmark as benchmarks
from segmentation import camfile, labels
from segmentation.benchmark import Benchmark

ROUND_WEIGHTS = {"auto": None, "on": True, "off": False}


def main(name: str | None = None) -> int:
    """Parse the command line and make the CAM files.

    Args:
        name: the benchmark; None lets --benchmark choose.

    Returns:
        The exit code.
    """
    parser = _parser(name)
    args = parser.parse_args()
    name = name or args.benchmark
    benchmark = benchmarks.load(name)
    model = args.model or benchmark.model
    if not model:
        parser.error("--model: give a CLIP checkpoint file, or a public name such as ViT-B/16")
    split = labels.split_of(benchmark, args.split_file)
    image_root = Path(args.img_root or benchmark.path(benchmark.image_dir))
    if not image_root.is_dir():
        parser.error(f"--img_root: image folder {image_root} does not exist")
    if args.img_root:
        benchmark = _rooted_at(benchmark, image_root)
    threshold = benchmark.box_threshold if args.box_threshold is None else args.box_threshold
    source = resolve(model)
    settings = CamSettings(
        refine=args.refine,
        method=args.cam_method,
        averaged=args.averaged_blocks,
        box_threshold=threshold,
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
        labels=labels.reader(benchmark, split, args.labels),
        model=model,
        device=args.device,
        precision=args.precision,
        round_weights=ROUND_WEIGHTS[args.round_weights],
        output=args.cam_out_dir,
        format=args.cam_format,
        settings=settings,
    )
    run = Run(
        args.cam_out_dir,
        step="cams",
        settings={
            "benchmark": _anywhere(name) if name.endswith((".yaml", ".yml")) else name,
            "cam_format": args.cam_format,
            "precision": args.precision,
            "weights_rounded": rounds(source, ROUND_WEIGHTS[args.round_weights]),
            "conventions": source.conventions,
            "prompts": benchmark.prompts,
            "backgrounds": benchmark.backgrounds,
            "templates": benchmark.templates,
            "labels": _anywhere(args.labels) if args.labels else benchmark.labels,
            **asdict(settings),
        },
        inputs={"model": sha256(source.file)},
        outputs=tuple(f"*{suffix}" for suffix in camfile.FORMATS.values()),
        overwrite=args.overwrite,
    )
    run.map(generate, list(split), job, num_workers=args.num_workers)
    return run.finish()


def _parser(name: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Step 1: class activation maps of the classes that each image contains, from a frozen "
        "CLIP. A stopped run is continued by the same command.",
        formatter_class=HelpFormatter,
    )
    flag = parser.add_argument
    if name is None:
        flag("--benchmark", required=True, metavar="NAME|FILE.yaml", help="the data set: voc12, coco14, "
             "shapes or a YAML file that describes it")  # fmt: skip
    flag("--img_root", help="image folder (without it: the benchmark's)")
    split = benchmarks.load(name).split_file if name else "the benchmark's"
    flag("--split_file", help=f"image ids, one a line (without it: {split})")
    flag("--cam_out_dir", required=True, help="folder for the CAM files, made if missing")
    flag("--model", help="CLIP checkpoint file, public name (ViT-B/16, RN50, ...) or open_clip model:tag")
    flag("--labels", help="file of lines `id index index ...` that replaces the benchmark's labels")
    flag("--num_workers", type=_count, default=1, help="processes; with several GPUs they take turns")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    flag("--precision", choices=clip.PRECISIONS, default="fp32", help="of the image tower")
    flag("--cam_format", choices=camfile.FORMATS, default="full", help="full: the public .npy; compact: "
         ".npz, about 120 times smaller, which every script here reads as well")  # fmt: skip
    flag("--overwrite", action="store_true", help="start anew in a folder filled with other settings")
    flag = parser.add_argument_group("how CAMs are made (the defaults are CLIP-ES's)").add_argument
    flag("--refine", choices=REFINEMENTS, default="caa", help="attention affinity with class boxes (caa), "
         "affinity alone (mhsa), or the initial CAM (none)")  # fmt: skip
    flag("--keep_initial", action="store_true", help=f"also store the initial CAM, as cam type {INITIAL}")
    flag("--cam_method", choices=METHODS, default="gradcam", help="how gradients weigh activations")
    flag("--cam_scales", type=_scales, default="1.0", help="scales to average, e.g. 0.5,1.0,1.5")
    flag("--flip", action="store_true", help="average with the CAMs of the mirrored image")
    flag("--averaged_blocks", type=_count, default=AVERAGED_BLOCKS, help="last blocks that make the affinity")
    flag("--box_threshold", type=_share, help="lambda of the class boxes (without it: the benchmark's)")
    flag("--cover_edge", action="store_true", help="let class boxes reach the grid's last row and column, "
         "which the public code cuts off")  # fmt: skip
    flag("--position_rounding", choices=POSITION_ROUNDINGS, default="always", help="round the positional "
         "table to float16")  # fmt: skip
    flag("--round_weights", choices=ROUND_WEIGHTS, default="auto", help="round matrix weights to float16; "
         "auto: those of OpenAI-layout files, as the public code does")  # fmt: skip
    flag("--max_patches", type=_count, default=10_000, help="images with more are shrunk to this many")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("expected a whole number, 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("expected a number from 0 to 1")
    return share


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = (math.nan,)
    if not all(0.1 <= factor <= 10 for factor in scales):
        raise argparse.ArgumentTypeError("expected numbers from 0.1 to 10, separated by commas")
    return scales


def _anywhere(file: str) -> str:
    """A path that later steps find from any folder."""
    return str(Path(file).absolute())


def _rooted_at(benchmark: Benchmark, image_root: Path) -> Benchmark:
    """The benchmark with the annotations and masks that lie beside the given images, if they do: the
    public scripts are told nothing but the image folder."""
    folder = {"voc_xml": benchmark.annotation_dir, "masks": benchmark.mask_dir}.get(benchmark.labels)
    root = image_root.absolute()
    for _ in Path(benchmark.image_dir).parts:
        root = root.parent
    if folder is None or not (root / folder).is_dir():
        return benchmark
    return replace(benchmark, root=str(root))
