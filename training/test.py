"""Command `test` of a method: masks of a split, their scores, submissions."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.settings import add_flags, count, given
from pipeline.flags import HelpFormatter
from segmentation.distributed import together
from training.data import validation_split
from training.evaluation import SUBMISSIONS, Evaluation, evaluate
from training.recipe import Recipe
from training.segmenter import add_network_flags, read_setup


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {recipe.name}.test",
        description="Test a trained network on a split: write its masks and their scores, with --crf also "
        "after a dense CRF. The same command continues a stopped run.",
        formatter_class=HelpFormatter,
    )
    add_network_flags(parser, recipe)
    flag = parser.add_argument_group("images").add_argument
    flag("--split_file", help="image ids, one per line (default: the configuration's data.val_split)")
    flag("--image_root", "--img_root", help="image folder (default: the configuration's data.val_image_dir)")
    flag("--gt_root", help="folder of ground-truth masks (default: the configuration's data.val_label_dir)")
    flag("--no_scores", action="store_true", help="there is no ground truth, as for VOC's test split")
    group = parser.add_argument_group("outputs")
    flag = group.add_argument
    flag("--output", "--out", metavar="DIR", help="folder for masks, masks_crf, scores.json and "
         "scores_crf.json (default: `test` in the run's folder)")  # fmt: skip
    add_flags(group, Evaluation)
    flag("--submission", choices=SUBMISSIONS, help="pack the masks for VOC's evaluation server; comp6 allows "
         "training on other data than VOC's, comp5 does not")  # fmt: skip
    flag("--overwrite", action="store_true", help="start anew in a folder filled with other settings")
    flag("--num_workers", type=count, default=1, help="processes; several GPUs are divided among them")
    args = parser.parse_intermixed_args(arguments)
    if not (args.output or args.run):
        parser.error("give --output DIR for the masks")
    with together():
        step, names = _step_of(recipe, args)
    return evaluate(step, names, args.submission, args.overwrite, args.num_workers)


def _step_of(recipe: Recipe, args: argparse.Namespace) -> tuple[Evaluation, list[str]]:
    """Return the step that the flags describe, and the image ids."""
    setup = read_setup(recipe, args)
    data = setup.config.data
    data = replace(
        data,
        val_split=args.split_file or data.val_split,
        val_image_dir=args.image_root or data.val_image_dir,
        val_label_dir=args.gt_root or data.val_label_dir,
    )
    split = validation_split(replace(setup.config, data=data), setup.benchmark)
    gt_root = None if args.no_scores else split.label_dir
    output = args.output or str(Path(args.run) / "test")
    return Evaluation(setup, split.image_dir, gt_root, output, **given(Evaluation, args)), split.names
