"""Step 3b: a trained network and images -> masks, with and without CRF, their scores, submissions."""

import tarfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from clip.download import sha256
from deeplab.trained import Segmenter, Setup
from pipeline.cams_cli import recorded
from pipeline.evaluate import tell
from pipeline.processes import Outcome, attempt
from pipeline.run import Run
from refinement.densecrf import PRESETS
from segmentation.dataset import check_values
from segmentation.files import replacing
from segmentation.images import find_image, read_rgb
from segmentation.masks import read_mask, write_mask
from segmentation.metrics import confusion, scores

MASKS, CRF_MASKS, LOGITS = "masks", "masks_crf", "logits"  # folders of a test
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
    if any(not file.is_file() for name in names for file in job.files(name).values()):
        segmenter = Segmenter(job.setup, position)

    def make(name: str) -> None:
        truth_file = truth = None
        if job.gt_root is not None:
            truth_file = Path(job.gt_root) / f"{name}.png"
            if not truth_file.is_file():
                raise FileNotFoundError(f"mask {truth_file} does not exist")
            truth = read_mask(truth_file)
            check_values(truth, channels, truth_file)
        files = job.files(name)
        missing = {folder for folder, file in files.items() if not file.is_file()}
        labels = {folder: read_mask(files[folder]) for folder in job.scored if folder not in missing}
        if missing:
            image = read_rgb(find_image(job.image_root, name))
            if truth is not None:
                _same_size(truth_file, truth.shape, image.shape[:2])
            labels |= segment(segmenter, image, {folder: files[folder] for folder in missing}, job.logits)
        if truth is not None:
            for folder in job.scored:
                _same_size(truth_file, truth.shape, labels[folder].shape)
            # Only when all is computed may anything be added: a bad image must not be half counted.
            hists[:] += [confusion(truth, labels[folder], channels) for folder in job.scored]

    for name in names:
        yield attempt(name, make)
    return hists


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
        overwrite: remove what is there instead of going on with it.
        num_workers: processes.

    Returns:
        The exit code: 1 if an image failed. Nothing is packed then.

    Raises:
        ValueError: a folder holds what another network, or other settings, made.
        OSError: a folder is missing.
    """
    for what, folder in (("image", job.image_root), ("ground-truth", job.gt_root)):
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"{what} folder {folder} does not exist")
    if job.gt_root is not None and not any((Path(job.gt_root) / f"{name}.png").is_file() for name in names):
        raise FileNotFoundError(
            f"{job.gt_root} holds the mask of none of the {len(names)} images: give another --gt_root, or "
            "--no_scores where there is no ground truth"
        )
    run = settled(job, overwrite)
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


def settled(job: Evaluation, overwrite: bool) -> Run:
    """The run of a test, after each folder that it fills has been found empty or of the same settings."""
    setup = job.setup
    model = asdict(setup.config.model)
    del model["init"]  # the weights that the training started from
    settings = {
        "benchmark": recorded(setup.config.data.benchmark),
        "model": model,
        "protocol": asdict(setup.protocol),
        "precision": setup.precision,
    }
    inputs = {"checkpoint": sha256(setup.checkpoint)}
    own = {
        MASKS: ("*.png", {}),
        CRF_MASKS: ("*.png", {"crf": setup.crf and asdict(PRESETS[setup.crf])}),
        LOGITS: ("*.npy", {"type": job.logits}),
    }
    for folder in [*job.scored, *([LOGITS] if job.logits else [])]:
        pattern, more = own[folder]
        Run(
            Path(job.output) / folder,
            settings | more,
            inputs,
            outputs=(pattern,),
            overwrite=overwrite,
            step=f"deeplab.test {folder}",
        )
    return Run(job.output, settings | {"crf": setup.crf}, inputs, step="deeplab.test")


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
    file = Path(job.output) / ("scores_crf.json" if crf else "scores.json")
    pixels = np.array([0, hist.sum()])  # none is predicted 255
    tell(report, (None,), [scores(hist, job.absent)], pixels, setup.benchmark, file)


def pack(job: Evaluation, names: Sequence[str], submission: str) -> Path:
    """Pack the masks for VOC's evaluation server, and say where.

    Returns:
        A .tgz file that holds results/VOC2012/Segmentation/<competition>/<name>.png.
    """
    competition = SUBMISSIONS[submission]
    target = Path(job.output) / f"{competition}.tgz"
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
