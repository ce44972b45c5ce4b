"""Step 0: which classes images contain, told by a frozen CLIP - scores, label file, metrics."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip.download import resolve
from clip.positions import POSITION_ROUNDINGS
from common.files import replacing, sha256
from pipeline.cams_cli import add_run_flags, beside, flow_of, recorded
from pipeline.flags import HelpFormatter, count, share
from pipeline.run import FAILED, Run, check_folder, some
from segmentation import benchmark as benchmarks
from segmentation import labels
from segmentation.benchmark import Benchmark
from segmentation.distributed import WorkFailed, gather, together
from tagclip import scores as scoring
from tagclip.config import PRESETS, TagSettings
from tagclip.step import TagJob, generate

LABELS = "labels.txt"  # in the output folder
OUTPUTS = (f"scores-*{scoring.SUFFIX}", LABELS)


class Dataset(NamedTuple):
    """What a public --dataset name stands for: a benchmark, and where its images and list usually are."""

    benchmark: str
    image_root: str
    split_file: str


VOC2007, COCO2017 = "./datasets/VOC2007", "./datasets/COCO2017/JPEGImages/val2017"
DATASETS = {  # the first is the public default
    "voc2007": Dataset("voc12", f"{VOC2007}/JPEGImages", f"{VOC2007}/ImageSets/Main/test.txt"),
    "voc2012": Dataset("voc12", "./datasets/VOC2012/JPEGImages", "./voc12/val.txt"),
    "coco2014": Dataset("coco14", "./datasets/COCO2014/JPEGImages/val2014", "./coco14/val.txt"),
    "coco2017": Dataset("coco14", COCO2017, "./coco14/val2017.txt"),
    "cocostuff": Dataset("cocostuff", COCO2017, "./cocostuff/val.txt"),
}


class LabelRule(NamedTuple):
    """How scores become labels, see `tagclip.scores.choose`."""

    threshold: float
    rule: str = "relative"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, tag the images, tell how well; returns the exit code."""
    args = make_parser().parse_args(arguments)
    told = None if args.benchmark else args.dataset or next(iter(DATASETS))
    name = DATASETS[told].benchmark if told else args.benchmark
    benchmark = benchmarks.load(name)
    image_root = args.img_root or (DATASETS[told].image_root if told else benchmark.path(benchmark.image_dir))
    if told:
        benchmark = replace(benchmark, split_file=DATASETS[told].split_file)
    split = labels.split_or_folder(benchmark, args.split_file, image_root)
    called = told or benchmark.name
    output = args.output or f"./output/{called}_tags"
    settings = settings_of(args, benchmark)
    job = job_of(args, benchmark, image_root, args.model_path, output, settings, args.round_weights)
    rule = rule_of(args, settings)
    saved = args.save_file or f"./output/{called}_val_tagclip.txt" if args.save_file is not None else None
    read = [args.split_file or benchmark.split_file, args.labels]
    check_files(read, [str(Path(output) / LABELS), saved, args.json])
    truth = truth_reader(benchmark, split, args.labels, job.image_root)
    code, scores = tag(job, run_of(job, name, args.overwrite), list(split), rule, args.num_workers)
    if scores and saved:
        write_labels(saved, scores, rule)
    if scores:
        tell(scores, truth, benchmark.classes, rule, args.json)
    return code


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="classify.py",
        description="Step 0, TagCLIP: the classes that each image contains, from a frozen CLIP and no "
        "annotation. True labels only serve to score. A stopped run is continued by the same command.",
        formatter_class=HelpFormatter,
    )
    what = parser.add_mutually_exclusive_group().add_argument
    what("--dataset", choices=DATASETS, help="a published data set (voc2007 without --benchmark)")
    what("--benchmark", metavar="NAME|FILE.yaml", help="any other data set: shapes or a YAML file")
    flag = parser.add_argument
    flag("--img_root", help="image folder (without it: the data set's usual one)")
    flag("--split_file", help="image ids, one a line, perhaps with true class indices (without it: the data "
         "set's; where that has none, all images of the folder)")  # fmt: skip
    flag("--labels", help="file of lines `id index index ...`, true labels to score with (without it: those "
         "of the split file, else the benchmark's)")  # fmt: skip
    flag("--model_path", help="CLIP checkpoint file, public name or open_clip model:tag (without it: the "
         "benchmark's, else ViT-B/16)")  # fmt: skip
    flag("--output", metavar="DIR", help=f"folder for the scores and {LABELS} (without it: "
         "output/<dataset>_tags)")  # fmt: skip
    flag("--save_file", nargs="?", const="", metavar="FILE", help="also write the label file there (without "
         "a name: output/<dataset>_val_tagclip.txt, as the public script does)")  # fmt: skip
    flag("--label_rule", choices=scoring.RULES, default="relative", help="which scores make labels: those "
         "above a share of the image's range, above a number, or so many of the highest")  # fmt: skip
    flag("--label_threshold", type=float, help="of that rule (of relative, without it: --ratio)")
    flag("--json", metavar="FILE", help="write the metrics there")
    add_run_flags(parser)
    flag = parser.add_argument_group(
        "how images are tagged",
        "In brackets what is published; that of COCO-Stuff serves every benchmark without background.",
    ).add_argument
    flag("--averaged_blocks", dest="averaged", type=blocks, metavar="N|all", help="blocks before the last "
         "whose attention is averaged (3; COCO-Stuff all)")  # fmt: skip
    flag("--voting_blocks", dest="voting", type=count, metavar="N", help="last blocks that vote (all)")
    flag("--votes", type=count, metavar="N", help="that relate two patches (a third, rounded up)")
    flag("--vote_threshold", type=float, metavar="X", help="multiple of a map's mean that is a vote (1)")
    flag("--box_threshold", type=float, metavar="X", help="multiple of a class map's mean that is boxed (1)")
    flag("--ratio", type=share, metavar="X", help="of the range of scores from which a class counts (0.5; "
         "COCO-Stuff 0.1)")  # fmt: skip
    flag("--cell_threshold", type=share, metavar="X", help="of a class map's range that is cropped (0.5)")
    flag("--crop_size", type=count, metavar="PIXELS", help="side of crops (what the model was trained at)")
    flag("--local_weight", type=share, metavar="X", help="of the score before the crop's (0.5)")
    flag("--diagonal_bias", type=float, metavar="X", help="on other patches in the last block (-100)")
    flag("--crop_bias", type=float, metavar="X", help="on patches outside the class in a crop (-1000)")
    flag("--cover_edge", action="store_true", default=None, help="let boxes and crops reach the grid's last "
         "row and column, which the public code cuts off")  # fmt: skip
    flag("--skip_empty_crops", action="store_true", default=None, help="pass over a class with an empty "
         "crop, where the public code leaves the image")  # fmt: skip
    flag("--position_rounding", choices=POSITION_ROUNDINGS, help="round the positional table to float16 "
         "(resampled)")  # fmt: skip
    flag("--round_weights", action="store_true", help="round matrix weights to float16, as the CAM steps do "
         "and published tags do not")  # fmt: skip
    flag("--max_patches", type=count, help="images with more are shrunk to this many (10000)")
    return parser


def blocks(text: str) -> int | str:
    """Argument type: a number of blocks, or all."""
    return text if text == "all" else count(text)


def settings_of(args: argparse.Namespace, benchmark: Benchmark) -> TagSettings:
    """What the flags say, else what is published for such a benchmark."""
    given = {field.name: getattr(args, field.name) for field in fields(TagSettings)}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("averaged") == "all":
        given["averaged"] = None
    return replace(usual_settings(benchmark), **given)


def rule_of(args: argparse.Namespace, settings: TagSettings) -> LabelRule:
    """What --label_rule and --label_threshold say.

    Raises:
        ValueError: they say nothing sensible.
    """
    threshold = args.label_threshold
    if args.label_rule == "relative":
        threshold = settings.ratio if threshold is None else threshold
        wanted, fits = "from 0 to 1", 0 <= threshold <= 1
    elif threshold is None:
        raise ValueError(f"--label_rule {args.label_rule} needs a --label_threshold")
    elif args.label_rule == "top":
        wanted, fits = "that is whole, 1 or more", threshold >= 1 and threshold.is_integer()
    else:
        wanted, fits = "that is finite", math.isfinite(threshold)
    if not fits:
        raise ValueError(
            f"--label_rule {args.label_rule} takes a --label_threshold {wanted}, not {threshold:g}"
        )
    return LabelRule(threshold, args.label_rule)


def job_of(
    args: argparse.Namespace,
    benchmark: Benchmark,
    image_root: str | Path,
    model: str | None,
    output: str,
    settings: TagSettings,
    round_weights: bool = False,
) -> TagJob:
    """The job of a command that has the flags of `pipeline.cams_cli.add_run_flags`."""
    return TagJob(
        benchmark=benchmark,
        image_root=str(image_root),
        model=model or benchmark.model or "ViT-B/16",
        device=args.device,
        precision=args.precision,
        round_weights=round_weights,
        output=output,
        settings=settings,
        flow=flow_of(args),
    )


def check_files(read: Sequence[str | None], written: Sequence[str | None]) -> None:
    """May these files be written?

    Raises:
        ValueError: one is a folder, is written twice, or also read: who reads predictions as the truth finds
            them true.
    """
    sources, targets = ([Path(file).resolve() for file in files if file] for files in (read, written))
    for file in targets:
        if file.is_dir():
            raise ValueError(f"{file} is a folder: name a file in it")
        if file in sources:
            raise ValueError(f"{file} is read, and would be overwritten: write to another file or folder")
        if targets.count(file) > 1:
            raise ValueError(f"{file} would be written twice: name two files")


def usual_settings(benchmark: Benchmark) -> TagSettings:
    """Those published for the kind of benchmark: with a background, or where every pixel has a class."""
    return PRESETS["tagclip" if benchmark.has_background else "cocostuff"]


def run_of(job: TagJob, name: str, overwrite: bool) -> dict[str, Any]:
    """What the output folder records, as arguments of `Run` and of `pipeline.run.check_folder`.

    Args:
        name: the benchmark's, as `segmentation.benchmark.load` takes it.
    """
    source = resolve(job.model)
    settings = {
        "benchmark": recorded(name),
        "names": job.benchmark.tag_names,
        "templates": job.templates,
        "precision": job.precision,
        "weights_rounded": job.round_weights,
        "conventions": source.conventions,
        **asdict(job.settings),
    }
    return {
        "settings": settings,
        "inputs": {"model": sha256(source.file)},
        "outputs": OUTPUTS,
        "overwrite": overwrite,
        "step": "tags",
    }


def tag(
    job: TagJob, run_settings: dict[str, Any], names: Sequence[str], rule: LabelRule, workers: int
) -> tuple[int, dict[str, np.ndarray]]:
    """Score the images and write the label file, in the job's output folder; of torchrun's ranks, one does.

    Args:
        run_settings: see `run_of`.
        names: of the images, in the order of the label file.
        workers: processes.

    Returns:
        The exit code; and image name -> (K,) scores in the order of `names`, for the rank that writes. Images
        that failed have none, and no line in the label file.
    """
    run = Run(job.output, **run_settings)
    run.map(generate, names, job, num_workers=workers, block=job.flow.look_ahead)
    code = run.finish()
    scores = {}
    if run.rank == 0:
        found = scoring.read_scores(job.output, len(job.benchmark.classes))
        scores = {name: found[name] for name in names if name in found}
        write_labels(Path(job.output) / LABELS, scores, rule)
    gather(None)  # no rank may read it before
    return code, scores


class Finder:
    """Finds the labels of a command that has the flags of `pipeline.cams_cli`, in the published way.

    Args:
        output: folder for scores and labels.
    """

    def __init__(self, args: argparse.Namespace, benchmark: Benchmark, image_root: str, output: str):
        settings = replace(usual_settings(benchmark), max_patches=args.max_patches)
        self.job = job_of(args, benchmark, image_root, args.model, output, settings)
        self.run_settings = run_of(self.job, args.benchmark, args.overwrite)
        self.workers, self.file = args.num_workers, Path(output) / LABELS
        self.split_file = args.split_file or benchmark.split_file

    def check(self) -> None:
        """May the folder be filled? Changes nothing.

        Raises:
            ValueError: see `pipeline.run.Run`, or the split file is the label file.
        """
        check_files([self.split_file], [str(self.file)])
        check_folder(self.job.output, **self.run_settings)

    def find(self, names: Sequence[str]) -> int:
        """Tag images and write `file`; returns the exit code.

        Raises:
            WorkFailed: no image could be tagged.
        """
        rule = LabelRule(self.job.settings.ratio)
        code, _ = tag(self.job, self.run_settings, names, rule, self.workers)
        with together():
            if not self.file.read_text():
                raise WorkFailed(f"no image could be tagged, see {self.file.with_name(FAILED)}")
        return code


def write_labels(file: str | Path, scores: dict[str, np.ndarray], rule: LabelRule) -> None:
    """Write lines `name index index ...`, which every script takes as --labels and as --split_file."""
    chosen = scoring.labels(np.stack([*scores.values()]), *rule) if scores else []
    lines = [" ".join([name, *map(str, row)]) + "\n" for name, row in zip(scores, chosen, strict=True)]
    with replacing(file) as stream:
        stream.write("".join(lines).encode())
    mean = sum(map(len, chosen)) / max(1, len(chosen))
    print(f"{file}: {len(lines)} images, {mean:.2f} labels each", file=sys.stderr)


def tell(
    scores: dict[str, np.ndarray],
    truth: labels.LabelReader | None,
    classes: Sequence[str],
    rule: LabelRule,
    json_file: str | None,
) -> None:
    """Print the metrics of images whose truth is known, as the public script does, and write them as JSON."""
    known, unknown = {}, []
    for name in scores if truth else ():
        try:
            known[name] = truth(name)
        except (ValueError, OSError) as error:
            unknown.append(f"{name}: {error}")
    if unknown:
        print(f"{len(unknown)} images without true labels are not scored: {some(unknown)}", file=sys.stderr)
    if not known:
        print("no true labels: nothing to score", file=sys.stderr)
        return
    values = np.stack([scores[name] for name in known])  # (n, K)
    there = np.zeros(values.shape, bool)
    for row, keys in zip(there, known.values(), strict=True):
        row[keys] = True
    result = scoring.evaluate(values, there, classes, scoring.choose(values, *rule))
    print(f"mAP: {result['mAP']:.6f}")
    absent = result["classes without positives"]
    if absent:
        rest = result["mAP of classes with positives"]
        print(f"mAP of classes with positives: {rest:.6f} ({absent} of {len(classes)} have none)")
    print(f"F1: {result['F1']:.6f}, Precision: {result['Precision']:.6f}, Recall: {result['Recall']:.6f}")
    if json_file:
        with replacing(json_file) as stream:
            content = {key: None if value != value else value for key, value in result.items()}  # NaN
            stream.write(json.dumps(content, indent=2).encode() + b"\n")


def truth_reader(
    benchmark: Benchmark, split: labels.Split, labels_file: str | None, image_root: str
) -> labels.LabelReader | None:
    """True labels: those of a file, of the split file, else the benchmark's; None where there are none.

    Raises:
        FileNotFoundError, ValueError: `labels_file` cannot be read, or a split names classes out of range.
    """
    if labels_file or any(split.values()):
        return labels.reader(replace(benchmark, labels="file"), split, labels_file)
    if benchmark.labels == "file":
        return None
    try:
        return labels.reader(beside(benchmark, Path(image_root)), split)
    except FileNotFoundError:  # the images came without annotation
        return None
