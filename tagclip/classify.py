"""Command line of step 0: TagCLIP scores classes, writes the label file and prints metrics."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clip.download import resolve
from foundation.cli import Parser
from foundation.files import check_outputs, sha256
from foundation.settings import add_flags, from_args
from pipeline.cams import CamStep
from pipeline.compute import ComputeSettings
from pipeline.flags import add_image_flags, recorded_path
from pipeline.label_scores import (
    RULES,
    SUFFIX,
    LabelRule,
    label_rule,
    read_scores,
    report_metrics,
    truth_reader,
    write_labels,
)
from pipeline.run import Record, Run
from segmentation import benchmark as benchmarks
from segmentation import labels
from segmentation.benchmark import Benchmark
from segmentation.distributed import gather
from tagclip.config import COCOSTUFF, TagSettings
from tagclip.step import TagStep

LABELS = "labels.txt"  # label file in the output folder
OUTPUTS = (f"scores-*{SUFFIX}", LABELS)


VOC2007, COCO2017 = "./datasets/VOC2007", "./datasets/COCO2017/JPEGImages/val2017"
# Published data set -> (benchmark, image folder, split file). The first is the default, as in the reference
# implementation.
DATASETS = {
    "voc2007": ("voc12", f"{VOC2007}/JPEGImages", f"{VOC2007}/ImageSets/Main/test.txt"),
    "voc2012": ("voc12", "./datasets/VOC2012/JPEGImages", "./voc12/val.txt"),
    "coco2014": ("coco14", "./datasets/COCO2014/JPEGImages/val2014", "./coco14/val.txt"),
    "coco2017": ("coco14", COCO2017, "./coco14/val2017.txt"),
    "cocostuff": ("cocostuff", COCO2017, "./cocostuff/val.txt"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, tag the images, print the metrics; return the exit code."""
    args = make_parser().parse_args(arguments)
    name, image_root, split_file = DATASETS.get(args.benchmark, (args.benchmark, None, None))
    benchmark = benchmarks.load(name)
    benchmark = replace(benchmark, split_file=split_file or benchmark.split_file)
    image_root = args.image_root or image_root or str(benchmark.path(benchmark.image_dir))
    split = labels.split_of(benchmark, args.split_file, image_root)
    title = args.benchmark if args.benchmark in DATASETS else benchmark.name
    output = args.output or f"./output/{title}_tags"
    model = args.model or benchmark.model or "ViT-B/16"
    settings = from_args(default_settings(benchmark), args)
    compute_settings = from_args(ComputeSettings(), args)
    step = TagStep(benchmark, str(image_root), model, output, settings, compute_settings)
    rule = label_rule(args.label_rule, args.label_threshold, settings.ratio)
    label_file = args.save_file or f"./output/{title}_val_tagclip.txt" if args.save_file is not None else None
    read = [args.split_file or benchmark.split_file, args.labels]
    check_outputs(read, [str(Path(output) / LABELS), label_file, args.json])
    truth = truth_reader(benchmark, split, args.labels, step.image_root)
    code, scores = tag(step, record_of(step, name), args.overwrite, list(split), rule)
    if scores and label_file:
        write_labels(label_file, scores, rule)
    if scores:
        report_metrics(scores, truth, benchmark.classes, rule, args.json)
    return code


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="classify.py",
        description="Step 0, TagCLIP: predict the classes in each image with a frozen CLIP, without "
        "annotation. True labels are used only for metrics. The same command continues a stopped run.",
    )
    flag = parser.add_argument
    flag("--benchmark", "--dataset", default=next(iter(DATASETS)), metavar="NAME|FILE.yaml",
         help=f"a published data set ({', '.join(DATASETS)}), voc12, coco14, shapes or a YAML file that "
         "describes your data set")  # fmt: skip
    add_image_flags(flag, "the benchmark's; if it has none, all images of the folder")
    flag("--labels", metavar="FILE", help="true labels for the metrics, lines `id index index ...` (default: "
         "the class indices in the split file, else the benchmark's)")  # fmt: skip
    flag("--model", "--model_path", help="CLIP checkpoint file, name of an OpenAI model (ViT-B/16, ...) or "
         "open_clip model:tag (default: the benchmark's, else ViT-B/16)")  # fmt: skip
    flag("--output", metavar="DIR", help=f"folder for the scores and {LABELS} (default: "
         "output/<benchmark>_tags)")  # fmt: skip
    flag("--save_file", nargs="?", const="", metavar="FILE", help="also write the label file to FILE "
         "(if FILE is left out: output/<benchmark>_val_tagclip.txt, as in the reference script)")  # fmt: skip
    flag("--label_rule", choices=RULES, default="relative", help="which scores become labels; relative: "
         "those above a fraction of the range of the image's scores; absolute: those above a number; top: "
         "the N highest")  # fmt: skip
    flag("--label_threshold", type=float, metavar="X", help="fraction, number or N of --label_rule (default: "
         "--ratio for relative)")  # fmt: skip
    flag("--json", metavar="FILE", help="write the metrics to FILE")
    flag("--overwrite", action="store_true", help="remove the outputs of an earlier run first")
    add_flags(parser.add_argument_group("device and speed"), ComputeSettings)
    group = parser.add_argument_group(
        "tagging", "Benchmarks without a background class use the defaults for COCO-Stuff."
    )
    add_flags(group, TagSettings)
    return parser


def default_settings(benchmark: Benchmark) -> TagSettings:
    """Return the published settings; those of COCO-Stuff if the benchmark has no background class."""
    return TagSettings() if benchmark.has_background else COCOSTUFF


def record_of(step: TagStep, name: str) -> Record:
    """Return the record of settings for the output folder; `name`: see `segmentation.benchmark.load`."""
    source = resolve(step.model)
    settings = {
        "benchmark": recorded_path(name),
        "names": step.benchmark.tag_names,
        "templates": step.templates,
        "precision": step.compute_settings.precision,
        "conventions": source.conventions,
        **step.settings.record(),
    }
    inputs = {"model": sha256(source.file)}
    return Record("tags", settings, inputs, OUTPUTS, defaults=TagSettings().record())


def tag(
    step: TagStep, record: Record, overwrite: bool, names: Sequence[str], rule: LabelRule
) -> tuple[int, dict[str, np.ndarray]]:
    """Score images and write the label file to the step's output folder, in the order of `names`.

    Returns:
        The exit code; and image name -> (K,) scores, empty on ranks other than 0. Failed images have no
        scores and no line in the label file.
    """
    run = Run(step.output, record, overwrite)
    run.map(step, names, step.compute_settings.num_workers)
    code = run.finish()
    scores = {}
    if run.rank == 0:
        scored = read_scores(step.output, len(step.benchmark.classes))
        scores = {name: scored[name] for name in names if name in scored}
        write_labels(Path(step.output) / LABELS, scores, rule)
    gather(None)  # barrier: no rank reads the label file before it is written
    return code, scores


def published_step(cams: CamStep, output: str) -> TagStep:
    """Return the tagging step for a CAM step: the same images and model, with the published settings."""
    settings = replace(default_settings(cams.benchmark), max_patches=cams.settings.max_patches)
    return TagStep(cams.benchmark, cams.image_root, cams.model, output, settings, cams.compute_settings)
