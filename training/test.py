"""Command `test` of a method: masks of a split, their scores, submissions."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.flags import HelpFormatter, count
from segmentation.distributed import together
from segmentation.metrics import ABSENT
from training.data import validation_split
from training.evaluation import LOGIT_TYPES, SUBMISSIONS, Evaluation, evaluate
from training.recipe import Recipe
from training.segmenter import add_network_flags, read_setup


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {recipe.name}.test",
        description="Step 3b: what a trained network makes of a split: masks with and, if asked for, after a "
        "dense CRF, and the scores of both. A stopped run is continued by the same command.",
        formatter_class=HelpFormatter,
    )
    add_network_flags(parser, recipe)
    flag = parser.add_argument_group("on which images").add_argument
    flag("--split_file", help="image ids, one a line (without it: the configuration's data.val_split)")
    flag("--image_root", "--img_root", help="image folder (without it: the configuration's "
         "data.val_image_dir)")  # fmt: skip
    flag("--gt_root", help="folder of true masks (without it: the configuration's data.val_label_dir)")
    flag("--no_scores", action="store_true", help="there is no ground truth, as for VOC's test split")
    flag = parser.add_argument_group("what is made").add_argument
    flag("--output", "--out", metavar="DIR", help="folder for masks, masks_crf, scores.json and "
         "scores_crf.json (without it: `test` in the run's folder)")  # fmt: skip
    flag("--absent", choices=ABSENT, default="drop", help="classes without ground truth are left out of the "
         "mean IoU (drop, as deeplab-pytorch does), or count as 0 (zero, SEAM's), or as 0 if predicted "
         "(nan-mean)")  # fmt: skip
    flag("--submission", choices=SUBMISSIONS, help="pack the masks for VOC's evaluation server; comp6 allows "
         "training on other data than VOC's, comp5 does not")  # fmt: skip
    flag("--save_logits", choices=LOGIT_TYPES, help="also write logits/<id>.npy, the network's logits before "
         "they are brought to the image's size")  # fmt: skip
    flag("--overwrite", action="store_true", help="start anew in a folder filled with other settings")
    flag("--num_workers", type=count, default=1, help="processes; with several GPUs they take turns")
    args = parser.parse_intermixed_args(arguments)
    if not (args.output or args.run):
        parser.error("give --out DIR for the masks")
    with together():
        job, names = _asked(recipe, args)
    return evaluate(job, names, args.submission, args.overwrite, args.num_workers)


def _asked(recipe: Recipe, args: argparse.Namespace) -> tuple[Evaluation, list[str]]:
    """What the flags ask for, and the names of the images."""
    setup = read_setup(recipe, args)
    data = setup.config.data
    data = replace(
        data,
        val_split=args.split_file or data.val_split,
        val_image_dir=args.image_root or data.val_image_dir,
        val_label_dir=args.gt_root or data.val_label_dir,
    )
    if not data.val_split:
        raise ValueError("the configuration names no data.val_split: give --split_file")
    split = validation_split(replace(setup.config, data=data), setup.benchmark)
    job = Evaluation(
        setup=setup,
        image_root=split.image_dir,
        gt_root=None if args.no_scores else split.label_dir,
        output=args.output or str(Path(args.run) / "test"),
        logits=args.save_logits,
        absent=args.absent,
    )
    return job, split.names
