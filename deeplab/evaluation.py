"""Step 3b: a trained network and images -> masks, with and without CRF, their scores, submissions."""

import tarfile
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.files import replacing
from deeplab.trained import Segmenter, Setup, record
from pipeline.evaluate import benchmark_scores, tell
from pipeline.processes import Outcome, attempt
from pipeline.run import SETTINGS, Run, check_folder, read_settings
from refinement.densecrf import PRESETS
from segmentation.dataset import check_values
from segmentation.distributed import rank_and_world, together
from segmentation.images import UNREADABLE, find_image, read_rgb
from segmentation.masks import read_mask, write_mask
from segmentation.metrics import confusion

STEP = "deeplab.test"
MASKS, CRF_MASKS, LOGITS = "masks", "masks_crf", "logits"  # folders of a test
PATTERNS = {MASKS: "*.png", CRF_MASKS: "*.png", LOGITS: "*.npy"}
SCORES = {MASKS: "scores.json", CRF_MASKS: "scores_crf.json"}
LOGIT_TYPES = ("float32", "float16")
SUBMISSIONS = {"comp5": "comp5_test_cls", "comp6": "comp6_test_cls"}  # VOC's names of what was trained on


@dataclass(frozen=True)
class Evaluation:
    """What is tested, and what of it is kept; pickled when there are several processes.

    Attributes:
        setup: the network.
        image_root: folder of the images.
        gt_root: folder of the ground-truth masks; None gives no scores.
        output: folder of everything that is written.
        logits: keep the network's logits in this type; None keeps none.
        absent: what happens to classes without ground truth, see `segmentation.metrics.scores`.
    """

    setup: Setup
    image_root: str
    gt_root: str | None
    output: str
    logits: str | None = None
    absent: str = "drop"

    def __post_init__(self):
        if self.logits and 1 not in self.setup.protocol.scales:
            raise ValueError("saved logits are those of the unscaled image: add 1.0 to the scales")

    @property
    def scored(self) -> list[str]:
        """The folders of masks."""
        return [MASKS, CRF_MASKS] if self.setup.crf else [MASKS]

    def files(self, name: str) -> dict[str, Path]:
        """What there is to be of an image, by folder."""
        files = {folder: Path(self.output) / folder / f"{name}.png" for folder in self.scored}
        if self.logits:
            files[LOGITS] = Path(self.output) / LOGITS / f"{name}.npy"
        return files

    def archive(self, submission: str) -> Path:
        """The file of a submission, a key of `SUBMISSIONS`."""
        return Path(self.output) / f"{SUBMISSIONS[submission]}.tgz"


def evaluate_images(
    names: Sequence[str], position: int, job: Evaluation
) -> Generator[Outcome, None, np.ndarray]:
    """Write what is not there yet of `names`, and count the pixels; see `pipeline.processes`.

    Returns:
        (F, n, n) int64 [truth, prediction] of the F folders of masks; zero without ground truth.
    """
    channels = job.setup.benchmark.channels
    hists = np.zeros((len(job.scored), channels, channels), np.int64)
    segmenter = None

    def make(name: str, done: dict[str, np.ndarray]) -> None:
        truth_file = truth = None
        if job.gt_root is not None:
            truth_file = Path(job.gt_root) / f"{name}.png"
            if not truth_file.is_file():
                raise FileNotFoundError(f"mask {truth_file} does not exist")
            truth = read_mask(truth_file)
            check_values(truth, channels, truth_file)
        labels = done
        missing = {folder: file for folder, file in job.files(name).items() if folder not in done}
        if missing:
            image = read_rgb(find_image(job.image_root, name))
            if truth is not None:
                _same_size(truth_file, truth.shape, image.shape[:2])
            labels = done | segment(segmenter, image, missing, job.logits)
        if truth is not None:
            for folder in job.scored:
                _same_size(truth_file, truth.shape, labels[folder].shape)
            # Only when all is computed may anything be added: a bad image must not be half counted.
            hists[:] += [confusion(truth, labels[folder], channels) for folder in job.scored]

    for name in names:
        done = finished(job.files(name))
        if segmenter is None and len(done) < len(job.files(name)):
            segmenter = Segmenter(job.setup, position)
        yield attempt(name, make, done)
    return hists


def finished(files: dict[str, Path]) -> dict[str, np.ndarray]:
    """What is there, and whole, of the files of an image (by folder, see `Evaluation.files`).

    Returns:
        By folder, (H, W) uint8 labels or logits that are not read yet.
    """
    found = {}
    for folder, file in files.items():
        with suppress(*UNREADABLE):  # a damaged file is made anew
            found[folder] = np.load(file, mmap_mode="r") if folder == LOGITS else read_mask(file)
    return found


def segment(
    segmenter: Segmenter, image: np.ndarray, files: dict[str, Path], logits: str | None
) -> dict[str, np.ndarray]:
    """Segment an image (H, W, 3) uint8 RGB and write `files` (by folder, see `Evaluation.files`).

    Returns:
        The (H, W) uint8 labels by folder, of the masks among the files.
    """
    segmented, labels = segmenter(image), {}
    if LOGITS in files:
        with replacing(files[LOGITS]) as stream:
            np.save(stream, segmented.logits.cpu().numpy().astype(logits))  # (C, h, w)
    if MASKS in files:
        labels[MASKS] = segmented.labels
    if CRF_MASKS in files:
        labels[CRF_MASKS] = segmenter.crf_labels(image, segmented.probabilities)
    for folder, mask in labels.items():
        write_mask(files[folder], mask, segmenter.setup.benchmark.palette)
    return labels


def _same_size(file: Path, truth: tuple[int, int], image: tuple[int, int]) -> None:
    if truth != image:
        raise ValueError(f"mask {file} is {truth} but its image {image} (height, width)")


def evaluate(
    job: Evaluation,
    names: Sequence[str],
    submission: str | None = None,
    overwrite: bool = False,
    num_workers: int = 1,
) -> int:
    """Make the masks, print and write their scores, pack a submission.

    Args:
        job: see there.
        names: image ids.
        submission: a key of `SUBMISSIONS`; packs the masks, after the CRF if there is one, as VOC's server
            takes them.
        overwrite: remove all that a test has left there instead of going on with it.
        num_workers: processes.

    Returns:
        The exit code: 1 if an image failed. Nothing is packed then.

    Raises:
        ValueError: a folder holds what another network, or other settings, made.
        OSError: a folder is missing.
    """
    with together():
        _check_inputs(job, names)
    run = settled(job, overwrite)
    if submission and run.rank == 0:
        job.archive(submission).unlink(missing_ok=True)  # lest one of before be taken for this one
    parts = run.map(evaluate_images, names, job, num_workers=num_workers)
    code = run.finish()
    if run.rank == 0:
        if job.gt_root is not None:
            for folder, hist in zip(job.scored, sum(parts), strict=True):
                tell_scores(job, folder, hist, len(names), run.failures)
        if submission and code == 0:
            pack(job, names, submission)
        elif submission:
            print("no submission was packed, since images failed")
    return code


def _check_inputs(job: Evaluation, names: Sequence[str]) -> None:
    for what, folder in (("image", job.image_root), ("ground-truth", job.gt_root)):
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"{what} folder {folder} does not exist")
    if job.gt_root is not None and not any((Path(job.gt_root) / f"{name}.png").is_file() for name in names):
        raise FileNotFoundError(
            f"{job.gt_root} holds the mask of none of the {len(names)} images: give another --gt_root, or "
            "--no_scores where there is no ground truth"
        )


def settled(job: Evaluation, overwrite: bool) -> Run:
    """The run of a test, after each folder that it fills has been found empty or of the same settings.

    To overwrite is to remove all that a test has left, also in folders that this one does not fill, whose
    files would be taken for this network's. Nothing is removed if there is an error.
    """
    root, crf = Path(job.output), job.setup.crf
    with together():
        common = record(job.setup)
        common["settings"]["images"] = str(Path(job.image_root).absolute())
        more = {MASKS: {}, CRF_MASKS: {"crf": crf and asdict(PRESETS[crf])}, LOGITS: {"type": job.logits}}
        records, stale = {}, []
        if overwrite and read_settings(root).get("step") == STEP:
            stale += [root / file for file in SCORES.values()] + [job.archive(key) for key in SUBMISSIONS]
        filled = [*job.scored, *([LOGITS] if job.logits else [])]
        for folder, pattern in PATTERNS.items():
            settings = common["settings"] | more[folder]
            arguments = {**common, "settings": settings, "outputs": (pattern,), "overwrite": overwrite,
                         "step": f"{STEP} {folder}"}  # fmt: skip
            if folder in filled:
                check_folder(root / folder, **arguments)
                records[folder] = arguments
            elif overwrite and read_settings(root / folder).get("step") == arguments["step"]:
                stale += [*check_folder(root / folder, **arguments), root / folder / SETTINGS]
        common["settings"]["crf"] = crf
        check_folder(root, **common, outputs=(), overwrite=overwrite, step=STEP)
    if rank_and_world()[0] == 0:
        for file in stale:
            file.unlink(missing_ok=True)
        for folder in {file.parent for file in stale} - {root}:
            with suppress(OSError):  # it also holds what others put there
                folder.rmdir()
    for folder, arguments in records.items():
        Run(root / folder, **arguments)
    return Run(root, **common, step=STEP)


def tell_scores(
    job: Evaluation, folder: str, hist: np.ndarray, images: int, failures: Sequence[tuple[str, str]]
) -> None:
    """Print the scores of a folder of masks, and write them beside it."""
    setup, crf = job.setup, folder == CRF_MASKS
    print(f"\nwith CRF ({setup.crf}):" if crf else "\nwithout CRF:")
    report = {
        "benchmark": setup.benchmark.name,
        "checkpoint": setup.checkpoint,
        "protocol": asdict(setup.protocol),
        "precision": setup.precision,
        "crf": setup.crf if crf else None,
        "absent": job.absent,
        "images": images - len(failures),
        "failed": [name for name, _ in failures],
    }
    file = Path(job.output) / SCORES[folder]
    pixels = np.array([0, hist.sum()])  # none is predicted 255
    result = benchmark_scores(hist, setup.benchmark, job.absent)
    tell(report, (None,), [result], pixels, setup.benchmark, file)


def pack(job: Evaluation, names: Sequence[str], submission: str) -> Path:
    """Pack the masks for VOC's evaluation server, and say where.

    Returns:
        A .tgz file that holds results/VOC2012/Segmentation/<competition>/<name>.png.
    """
    competition = SUBMISSIONS[submission]
    target = job.archive(submission)
    folder = job.scored[-1]
    with replacing(target) as stream, tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name in sorted(names):
            inside = f"results/VOC2012/Segmentation/{competition}/{name}.png"
            archive.add(job.files(name)[folder], inside, filter=_anonymous)
    print(f"\n{target}: {len(names)} masks of {Path(job.output) / folder}, for the evaluation server of VOC")
    return target


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Who packed it, and when, is nobody's business."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
