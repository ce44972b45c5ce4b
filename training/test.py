"""Command `test` of a method: masks of a split with and without CRF, their scores, and submissions."""

import argparse
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from foundation.cli import Parser
from foundation.files import below, replacing
from foundation.logs import log
from foundation.settings import add_flags, count, given, setting
from pipeline.evaluate import benchmark_scores, report_scores
from pipeline.processes import Outcome, attempt
from pipeline.run import SETTINGS, Record, Run, check_folder, read_settings
from pipeline.step import Decoded, Step
from refinement.densecrf import PRESETS
from segmentation.dataset import read_labels
from segmentation.distributed import rank_and_world, together
from segmentation.images import UNREADABLE, find_image, read_rgb
from segmentation.masks import check_class_pixels, read_mask, write_mask
from segmentation.metrics import ABSENT, confusion
from training.data import validation_split
from training.recipe import Recipe
from training.segmenter import Segmenter, Setup, add_network_flags, read_setup

MASKS, CRF_MASKS, LOGITS = "masks", "masks_crf", "logits"  # subfolders of the output folder
SUFFIXES = {MASKS: ".png", CRF_MASKS: ".png", LOGITS: ".npy"}
SCORES = {MASKS: "scores.json", CRF_MASKS: "scores_crf.json"}
LOGIT_TYPES = ("float32", "float16")
SUBMISSIONS = {"comp5": "comp5_test_cls", "comp6": "comp6_test_cls"}  # VOC competition -> folder name


@dataclass
class EvaluationInput(Decoded):
    """A decoded image (H, W, 3) uint8 RGB, and the subfolders in which its output is missing."""

    image: np.ndarray
    missing: list[str]


@dataclass
class Evaluation(Step):
    """Step 3b: writes the missing outputs of images, and scores their masks; see `pipeline.step.Step`.

    Attributes:
        setup: the network and how it is tested.
        image_root: folder of the images.
        gt_root: folder of the ground-truth masks; None computes no scores.
        output: folder of all outputs.
    """

    setup: Setup
    image_root: str
    gt_root: str | None
    output: str
    save_logits: str | None = setting(None, "also write logits/<id>.npy: the network's logits, before they "
                                      "are resized to the image size", choices=LOGIT_TYPES)  # fmt: skip
    absent: str = setting("drop", "how the mean IoU treats classes without ground truth: drop leaves them "
                          "out (as in deeplab-pytorch), zero counts them as 0 (as in SEAM), nan-mean counts "
                          "them as 0 if they are predicted and leaves them out otherwise",
                          choices=ABSENT)  # fmt: skip

    def __post_init__(self):
        if self.save_logits and 1 not in self.setup.protocol.scales:
            scales = self.setup.protocol.scales
            raise ValueError(f"--save_logits: requires scale 1, got {scales}: add 1.0 to --scales")
        self.scored = [MASKS, CRF_MASKS] if self.setup.crf else [MASKS]  # subfolders of masks
        self.folders = [*self.scored, LOGITS] if self.save_logits else self.scored
        channels = self.setup.benchmark.channels
        self.hists = np.zeros((len(self.scored), channels, channels), np.int64)

    def file(self, folder: str, name: str) -> Path:
        """Return the output file of an image in one of the subfolders."""
        return below(Path(self.output) / folder, f"{name}{SUFFIXES[folder]}")

    def archive(self, submission: str) -> Path:
        """Return the archive of a submission, which is a key of `SUBMISSIONS`."""
        return Path(self.output) / f"{SUBMISSIONS[submission]}.tgz"

    def is_done(self, name: str) -> bool:
        return not self._missing(name)

    def done_outcomes(self, name: str) -> Iterable[Outcome]:
        return [attempt(name, self._count, name, {}) or Outcome(name)]

    def start(self, worker_index: int) -> None:
        self.segmenter = Segmenter(self.setup, worker_index)

    def decode(self, name: str) -> EvaluationInput:
        return EvaluationInput(name, read_rgb(find_image(self.image_root, name)), self._missing(name))

    def compute(self, batch: list[EvaluationInput]) -> list[dict[str, np.ndarray]]:
        """Return subfolder -> missing output of each image: labels (H, W) uint8, logits (C, h, w)."""
        return [self._segment(decoded) for decoded in batch]

    def _segment(self, decoded: EvaluationInput) -> dict[str, np.ndarray]:
        segmented, outputs = self.segmenter(decoded.image), {}
        if LOGITS in decoded.missing:
            outputs[LOGITS] = segmented.logits.to(getattr(torch, self.save_logits)).cpu().numpy()
            if not np.isfinite(outputs[LOGITS]).all():
                raise ValueError("the logits are too large for float16: give --save_logits float32")
        if MASKS in decoded.missing:
            outputs[MASKS] = segmented.labels
        if CRF_MASKS in decoded.missing:
            outputs[CRF_MASKS] = self.segmenter.labels(decoded.image, segmented)
        return outputs

    def write(self, decoded: EvaluationInput, outputs: dict[str, np.ndarray]) -> None:
        for folder, output in outputs.items():
            file = self.file(folder, decoded.name)
            if folder == LOGITS:
                with replacing(file) as stream:
                    np.save(stream, output)
            else:
                write_mask(file, output, self.setup.benchmark.palette)
        self._count(decoded.name, outputs)

    def finish(self) -> np.ndarray:
        """Return counts (F, n, n) int64 [truth, prediction] of F mask subfolders; zeros without `gt_root`."""
        return self.hists

    def _missing(self, name: str) -> list[str]:
        """Return the subfolders in which the output of an image is missing or damaged."""
        return [folder for folder in self.folders if not _is_whole(self.file(folder, name))]

    def _count(self, name: str, outputs: dict[str, np.ndarray]) -> None:
        """Count the pixels of an image's masks, from `outputs` or files. If one fails, count none."""
        if self.gt_root is not None:
            masks = [
                outputs[folder] if folder in outputs else read_mask(self.file(folder, name))
                for folder in self.scored
            ]
            channels = self.setup.benchmark.channels
            truth = read_labels(self.gt_root, name, channels, masks[0].shape)
            self.hists += [confusion(truth, mask, channels) for mask in masks]


def _is_whole(file: Path) -> bool:
    try:
        if file.suffix == ".npy":
            np.load(file, mmap_mode="r")
        else:
            read_mask(file)
    except UNREADABLE:
        return False
    return True


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        prog=f"python -m {recipe.name}.test",
        description="Test a trained network on a split: write its masks and their scores; with --crf, also "
        "the masks and scores after a dense CRF. The same command continues a stopped run.",
    )
    add_network_flags(parser, recipe)
    flag = parser.add_argument_group("images").add_argument
    flag("--split_file", help="image ids, one per line (default: the configuration's data.val_split)")
    flag("--image_root", "--img_root", help="image folder (default: the configuration's data.val_image_dir)")
    flag("--gt_root", help="folder of ground-truth masks (default: the configuration's data.val_label_dir)")
    flag("--no_scores", action="store_true", help="compute no scores, as for VOC's test split")
    group = parser.add_argument_group("outputs")
    flag = group.add_argument
    flag("--output", "--out", metavar="DIR", help="folder for masks, masks_crf, scores.json and "
         "scores_crf.json (default: `test` in the run folder)")  # fmt: skip
    add_flags(group, Evaluation)
    flag("--submission", choices=SUBMISSIONS, help="pack the masks for VOC's evaluation server; comp5 is for "
         "training on VOC data only, comp6 allows other data")  # fmt: skip
    flag("--overwrite", action="store_true", help="remove all outputs of an earlier test first")
    flag("--num_workers", type=count, default=1, help="number of processes, which are divided among the GPUs")
    args = parser.parse_intermixed_args(arguments)
    if not (args.output or args.run):
        parser.error("give --output DIR for the masks")
    with together():
        step, names = _step_of(recipe, args)
        _check_inputs(step, names)
    run = _start(step, args.overwrite)
    if args.submission and run.rank == 0:
        step.archive(args.submission).unlink(missing_ok=True)  # it would not match the new masks
    hists = run.map(step, names, num_workers=args.num_workers)
    code = run.finish()
    if run.rank == 0:
        if step.gt_root is not None:
            failed = [name for name, _ in run.failures]
            for folder, hist in zip(step.scored, sum(hists), strict=True):
                _report(step, folder, hist, len(names), failed)
        if args.submission and code == 0:
            _pack(step, names, args.submission)
        elif args.submission:
            log.warning("no submission was packed, because images failed")
    return code


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


def _check_inputs(step: Evaluation, names: Sequence[str]) -> None:
    for kind, folder, flag in (
        ("image", step.image_root, "--image_root"),
        ("ground-truth", step.gt_root, "--gt_root"),
    ):
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"{kind} folder {folder} does not exist: give another {flag}")
    if step.gt_root is not None and not any((Path(step.gt_root) / f"{name}.png").is_file() for name in names):
        raise FileNotFoundError(
            f"ground-truth folder {step.gt_root} contains the mask of none of the {len(names)} images: give "
            "another --gt_root, or --no_scores if there is no ground truth"
        )
    if step.gt_root is not None:
        check_class_pixels(step.gt_root, names, step.setup.benchmark, allow_background=True)


def _records(step: Evaluation) -> dict[str, Record]:
    """Return the record of each subfolder; the key "" is the output folder itself."""
    name, crf = f"{step.setup.recipe.name}.test", step.setup.crf
    settings, inputs = step.setup.record()
    settings["images"] = str(Path(step.image_root).absolute())
    crf_settings = {"crf": crf and asdict(PRESETS[crf])}
    further = {MASKS: {}, CRF_MASKS: crf_settings, LOGITS: {"type": step.save_logits}}
    records = {
        folder: Record(f"{name} {folder}", settings | further[folder], inputs, (f"*{suffix}",))
        for folder, suffix in SUFFIXES.items()
    }
    return records | {"": Record(name, settings | {"crf": crf}, inputs)}


def _start(step: Evaluation, overwrite: bool) -> Run:
    """Check all folders of a test and write their records. `overwrite` removes the outputs of earlier tests.

    These include outputs in subfolders that this test does not fill, because they would not match its record.
    If there is an error, nothing is removed.
    """
    root, stale = Path(step.output), []
    with together():
        records = _records(step)
        for folder, record in records.items():
            if folder in step.folders or folder == "":
                check_folder(root / folder, record, overwrite)
            elif overwrite and read_settings(root / folder).get("step") == record.step:
                stale += [*check_folder(root / folder, record, overwrite), root / folder / SETTINGS]
        if overwrite and read_settings(root).get("step") == records[""].step:
            stale += [root / file for file in SCORES.values()] + [step.archive(key) for key in SUBMISSIONS]
    if rank_and_world()[0] == 0:
        for file in stale:
            file.unlink(missing_ok=True)
        for folder in {file.parent for file in stale} - {root}:
            with suppress(OSError):  # not empty: other files remain
                folder.rmdir()
    return Run(root, records[""], overwrite, {root / folder: records[folder] for folder in step.folders})


def _report(step: Evaluation, folder: str, hist: np.ndarray, num_images: int, failed: list[str]) -> None:
    """Print the scores of a subfolder of masks, and write them to the output folder."""
    setup, crf = step.setup, step.setup.crf if folder == CRF_MASKS else None
    print(f"\nwith CRF ({crf}):" if crf else "\nwithout CRF:")
    report = {
        "benchmark": setup.benchmark.name,
        "checkpoint": setup.checkpoint,
        "protocol": asdict(setup.protocol),
        "precision": setup.precision,
        "crf": crf,
        "absent": step.absent,
        "images": num_images - len(failed),
        "failed": failed,
    }
    file = Path(step.output) / SCORES[folder]
    pixels = np.array([0, hist.sum()])  # networks never predict 255
    result = benchmark_scores(hist, setup.benchmark, step.absent)
    report_scores(report, (None,), [result], pixels, setup.benchmark, file)


def _pack(step: Evaluation, names: Sequence[str], submission: str) -> None:
    """Write the masks as a .tgz file for VOC's evaluation server; with a CRF, the masks after it."""
    target, folder = step.archive(submission), step.scored[-1]
    with replacing(target) as stream, tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name in sorted(names):
            member = f"results/VOC2012/Segmentation/{SUBMISSIONS[submission]}/{name}.png"
            archive.add(step.file(folder, name), member, filter=_without_user)
    print(f"\n{target}: {len(names)} masks of {Path(step.output) / folder}, for VOC's evaluation server")


def _without_user(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an archive member without user and time."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
