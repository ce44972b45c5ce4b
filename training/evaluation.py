"""Test of a trained network: images -> masks, with and without CRF, their scores, submissions."""

import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.files import replacing
from common.settings import setting
from pipeline.evaluate import benchmark_scores, report_scores
from pipeline.processes import Outcome, attempt
from pipeline.run import SETTINGS, Record, Run, check_folder, read_settings
from pipeline.step import Decoded, Step
from refinement.densecrf import PRESETS
from segmentation.dataset import read_labels
from segmentation.distributed import rank_and_world, together
from segmentation.images import UNREADABLE, find_image, read_rgb
from segmentation.masks import read_mask, write_mask
from segmentation.metrics import ABSENT, confusion
from training.segmenter import Segmenter, Setup

MASKS, CRF_MASKS, LOGITS = "masks", "masks_crf", "logits"  # folders of a test
SUFFIXES = {MASKS: ".png", CRF_MASKS: ".png", LOGITS: ".npy"}
SCORES = {MASKS: "scores.json", CRF_MASKS: "scores_crf.json"}
LOGIT_TYPES = ("float32", "float16")
SUBMISSIONS = {"comp5": "comp5_test_cls", "comp6": "comp6_test_cls"}  # VOC's competitions, by training data


@dataclass
class EvaluationInput(Decoded):
    """A decoded image (H, W, 3) uint8 RGB, and the folders that lack its outputs."""

    image: np.ndarray
    missing: list[str]


@dataclass
class Evaluation(Step):
    """Step 3b, see `pipeline.step.Step`: writes missing outputs, then counts the pixels of the masks.

    Attributes:
        setup: the network.
        image_root: folder of the images.
        gt_root: folder of the ground-truth masks; None gives no scores.
        output: folder of all outputs.
    """

    setup: Setup
    image_root: str
    gt_root: str | None
    output: str
    save_logits: str | None = setting(None, "also write logits/<id>.npy, the network's logits before they "
                                      "are resized to the image", choices=LOGIT_TYPES)  # fmt: skip
    absent: str = setting("drop", "classes without ground truth are left out of the mean IoU (drop, as in "
                          "deeplab-pytorch), or count as 0 (zero, SEAM), or as 0 if predicted (nan-mean)",
                          choices=ABSENT)  # fmt: skip

    def __post_init__(self):
        if self.save_logits and 1 not in self.setup.protocol.scales:
            raise ValueError("saved logits are those of scale 1: add 1.0 to the scales")
        self.scored = [MASKS, CRF_MASKS] if self.setup.crf else [MASKS]  # folders of masks
        self.folders = [*self.scored, LOGITS] if self.save_logits else self.scored
        channels = self.setup.benchmark.channels
        self.hists = np.zeros((len(self.scored), channels, channels), np.int64)

    def file(self, folder: str, name: str) -> Path:
        """Return the output file of an image in one of the folders."""
        return Path(self.output) / folder / f"{name}{SUFFIXES[folder]}"

    def archive(self, submission: str) -> Path:
        """Return the file of a submission, a key of `SUBMISSIONS`."""
        return Path(self.output) / f"{SUBMISSIONS[submission]}.tgz"

    def is_done(self, name: str) -> bool:
        return not self._missing(name)

    def done_outcomes(self, name: str) -> Iterable[Outcome]:
        return [attempt(name, self._count, name) or Outcome(name)]

    def start(self, worker_index: int) -> None:
        self.segmenter = Segmenter(self.setup, worker_index)

    def decode(self, name: str) -> EvaluationInput:
        return EvaluationInput(name, read_rgb(find_image(self.image_root, name)), self._missing(name))

    def compute(self, batch: list[EvaluationInput]) -> list[dict[str, np.ndarray]]:
        """Return the missing outputs by folder: labels (H, W) uint8, logits (C, h, w)."""
        return [self._segment(decoded) for decoded in batch]

    def _segment(self, decoded: EvaluationInput) -> dict[str, np.ndarray]:
        segmented, outputs = self.segmenter(decoded.image), {}
        if LOGITS in decoded.missing:
            outputs[LOGITS] = segmented.logits.cpu().numpy().astype(self.save_logits)
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
        self._count(decoded.name)

    def finish(self) -> np.ndarray:
        """Return (F, n, n) int64 [truth, prediction] of the F folders of masks; zero without ground truth."""
        return self.hists

    def _missing(self, name: str) -> list[str]:
        """Return the folders in which the output of an image is missing or damaged."""
        return [folder for folder in self.folders if not _is_whole(self.file(folder, name))]

    def _count(self, name: str) -> None:
        """Count the pixels of an image's masks; in all folders or, if there is an error, in none."""
        if self.gt_root is not None:
            masks = [read_mask(self.file(folder, name)) for folder in self.scored]
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


def evaluate(
    step: Evaluation,
    names: Sequence[str],
    submission: str | None = None,
    overwrite: bool = False,
    num_workers: int = 1,
) -> int:
    """Write the masks, print and write their scores, pack a submission.

    Args:
        step: see there.
        names: image ids.
        submission: a key of `SUBMISSIONS`: packs the masks, those after the CRF if there is one, as VOC's
            server needs them.
        overwrite: remove everything that an earlier test left there instead of continuing it.
        num_workers: processes.

    Returns:
        The exit code: 1 if an image failed; nothing is packed then.

    Raises:
        ValueError: a folder holds the outputs of another network or of other settings.
        OSError: a folder is missing.
    """
    run = start_run(step, names, overwrite)
    if submission and run.rank == 0:
        step.archive(submission).unlink(missing_ok=True)  # an old one must not be mistaken for this one
    hists = run.map(step, names, num_workers=num_workers)
    code = run.finish()
    if run.rank == 0:
        if step.gt_root is not None:
            for folder, hist in zip(step.scored, sum(hists), strict=True):
                print_scores(step, folder, hist, len(names), [name for name, _ in run.failures])
        if submission and code == 0:
            pack(step, names, submission)
        elif submission:
            print("no submission was packed, because images failed")
    return code


def start_run(step: Evaluation, names: Sequence[str], overwrite: bool) -> Run:
    """Return the run of a test, after a check that each folder it fills is empty or of the same settings.

    `overwrite` removes everything that a test left, also in folders that this one does not fill, because
    their files would be taken for this network's. Nothing is removed if there is an error.
    """
    root = Path(step.output)
    with together():
        _check_inputs(step, names)
        records = _records(step)
        stale = []
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
            with suppress(OSError):  # not empty: it also holds other files
                folder.rmdir()
    for folder in step.folders:
        Run(root / folder, records[folder], overwrite)
    return Run(root, records[""], overwrite)


def _check_inputs(step: Evaluation, names: Sequence[str]) -> None:
    for kind, folder in (("image", step.image_root), ("ground-truth", step.gt_root)):
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"{kind} folder {folder} does not exist")
    if step.gt_root is not None and not any((Path(step.gt_root) / f"{name}.png").is_file() for name in names):
        raise FileNotFoundError(
            f"{step.gt_root} holds the mask of none of the {len(names)} images: give another --gt_root, or "
            "--no_scores if there is no ground truth"
        )


def _records(step: Evaluation) -> dict[str, Record]:
    """Return what each folder of a test records; the key "" is the root of all."""
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


def print_scores(
    step: Evaluation, folder: str, hist: np.ndarray, num_images: int, failed: Sequence[str]
) -> None:
    """Print the scores of a folder of masks, and write them beside it."""
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
        "failed": list(failed),
    }
    file = Path(step.output) / SCORES[folder]
    pixels = np.array([0, hist.sum()])  # none is predicted 255
    result = benchmark_scores(hist, setup.benchmark, step.absent)
    report_scores(report, (None,), [result], pixels, setup.benchmark, file)


def pack(step: Evaluation, names: Sequence[str], submission: str) -> None:
    """Write the masks as a .tgz file for VOC's evaluation server, and print its name.

    It holds results/VOC2012/Segmentation/<competition>/<name>.png.
    """
    target, folder = step.archive(submission), step.scored[-1]
    with replacing(target) as stream, tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name in sorted(names):
            member = f"results/VOC2012/Segmentation/{SUBMISSIONS[submission]}/{name}.png"
            archive.add(step.file(folder, name), member, filter=_without_user)
    print(f"\n{target}: {len(names)} masks of {Path(step.output) / folder}, for VOC's evaluation server")


def _without_user(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove user and time from an archive member."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
