"""Step 2b: CAM files and images -> dense CRF -> pseudo masks, or their scores."""

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.evaluate import background, benchmark_scores, present, tell
from pipeline.processes import Outcome, attempt, device_of
from pipeline.run import Run, read_settings
from refinement.densecrf import PRESETS, Preset, densecrf_batch
from segmentation import camfile
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.images import find_image, read_rgb, shrunk
from segmentation.masks import read_mask, write_mask
from segmentation.metrics import confusion

MAX_PIXELS = 10_000_000  # of the CRF, which takes some 350 bytes for each
CONFIDENCE = 0.95  # of the CRF posterior; CLIP-ES (the paper's mu is on the CAM instead)


@dataclass(frozen=True)
class MaskJob:
    """Everything a process needs to make masks; pickled when there are several.

    Attributes:
        benchmark: the data set.
        cam_dir: folder of the CAM files.
        image_root: folder of the images.
        output: folder of the masks; None makes none, and scores the labels before the 255 rule.
        gt_root: folder of the ground-truth masks; None gives no scores.
        cam_type: maps to take from the CAM files.
        confidence: a pixel whose highest posterior is lower becomes 255.
        crf: how the dense CRF runs; its unary type is also the type the background is computed in.
        backend: what runs it, see `refinement.densecrf`.
        device: where, for the torch backend; see `pipeline.processes.device_of`.
        max_pixels: on a larger image the CRF runs at the size that has so many.
    """

    benchmark: Benchmark
    cam_dir: str
    image_root: str
    output: str | None
    gt_root: str | None = None
    cam_type: str = "attn_highres"
    confidence: float = CONFIDENCE
    crf: Preset = PRESETS["clip_es"]
    backend: str = "numba"
    device: str = "cpu"
    max_pixels: int = MAX_PIXELS


def refine_labels(
    image: np.ndarray, keys: np.ndarray, maps: np.ndarray, job: MaskJob, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of one image by the dense CRF.

    The background is 1 - the highest CAM, whichever exponent evaluates best; nothing is normalised.

    Args:
        image: (H, W, 3) uint8 RGB.
        keys: (K,) class indices.
        maps: (K, H, W) float16; (K + 1, H, W) if they have a background channel.
        device: for the torch backend.

    Returns:
        labels (H, W) uint8, as the benchmark's masks have them, and their posterior (H, W) float32.
    """
    values = mask_values(keys, job)
    probabilities = maps.astype(job.crf.unary_type)
    if len(values) > len(maps):
        rest = background(maps.max(axis=0, initial=0), 1, job.crf.unary_type)
        probabilities = np.concatenate([rest[None], probabilities])  # (C, H, W)
    (posterior,) = densecrf_batch([image], [probabilities], job.crf, job.backend, device)
    return values[posterior.argmax(axis=0)], posterior.max(axis=0)


def mask_values(keys: np.ndarray, job: MaskJob) -> np.ndarray:
    """(C,) uint8: what the benchmark's masks hold for each channel of the CRF; the background comes first.

    Raises:
        ValueError: a key is no class of the benchmark.
    """
    if max(keys, default=0) >= len(job.benchmark.classes):
        raise ValueError(f"the CAM file holds class {max(keys)}, which {job.benchmark.name} does not have")
    values = keys + int(job.benchmark.has_background)
    if job.benchmark.has_background or "bg" in job.cam_type:
        values = np.append(0, values)
    return values.astype(np.uint8)


def at_size(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at image size (H, W), where the CRF ran at a smaller one."""
    if labels.shape == size:
        return labels
    return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)


def make_images(
    names: Sequence[str], position: int, job: MaskJob
) -> Generator[Outcome, None, tuple[np.ndarray, np.ndarray]]:
    """Make the masks of `names` that are not there yet, and count their pixels; see `pipeline.processes`.

    Returns:
        hist (n, n) int64 [truth, prediction], and pixels (2,) int64: those of known truth that are 255
        (and left out), and all of known truth. Zero without ground truth.
    """
    channels = job.benchmark.channels
    hist, pixels = np.zeros((channels, channels), np.int64), np.zeros(2, np.int64)
    device = device_of(job.device, position) if job.backend == "torch" else "cpu"

    def crf_labels(name: str, notes: list[str], confidence: float = 0) -> tuple[np.ndarray, np.ndarray]:
        image = read_rgb(find_image(job.image_root, name))
        keys, maps = camfile.read(job.cam_dir, name, job.cam_type, job.max_pixels)
        small = shrunk(image, job.max_pixels)
        if small.shape != image.shape:
            notes.append(shrunk_note(job))
        labels, posterior = refine_labels(small, keys, maps, job, device)
        labels[posterior < confidence] = IGNORE
        return at_size(labels, image.shape[:2]), keys

    def make(name: str) -> list[str]:
        notes: list[str] = []
        if job.output is None:
            labels, _ = crf_labels(name, notes)
        else:
            file = Path(job.output) / f"{name}.png"
            if not file.is_file():
                labels, keys = crf_labels(name, notes, job.confidence)
                write_mask(file, labels, job.benchmark.palette, keys)
            elif job.gt_root is not None:
                labels = read_mask(file)
        if job.gt_root is None:
            return notes
        truth_file = Path(job.gt_root) / f"{name}.png"
        if not truth_file.is_file():  # evaluation alone has asked for it before
            return [*notes, "images without ground truth"]
        truth = read_mask(truth_file)
        hist[:] += confusion(truth, labels, channels)
        known = truth < channels
        pixels[:] += (int((labels[known] == IGNORE).sum()), int(known.sum()))
        return notes

    for name in names:
        yield attempt(name, make)
    return hist, pixels


def shrunk_note(job: MaskJob) -> str:
    """What is counted of images that are too large."""
    return f"images shrunk to {job.max_pixels} pixels for the CRF (--crf_max_pixels)"


def mask_settings(job: MaskJob, benchmark_name: str) -> dict:
    """What a mask folder records, see `pipeline.run.Run`."""
    return {
        "benchmark": benchmark_name,
        "cam_type": job.cam_type,
        "confidence": job.confidence,
        "crf": asdict(job.crf),
        "crf_max_pixels": job.max_pixels,
    }


def make_masks(
    job: MaskJob,
    names: Sequence[str],
    benchmark_name: str,
    json_file: str | Path | None = None,
    allow_missing: bool = False,
    overwrite: bool = False,
    num_workers: int = 1,
) -> int:
    """Make pseudo masks, or only score the CRF; print the scores, if there is ground truth; write JSON.

    With `job.output` the masks as written are scored, their pixels of 255 left out; without it, as the
    published numbers are, every pixel.

    Args:
        job: see there.
        names: image ids.
        benchmark_name: recorded in the mask folder, see `segmentation.benchmark.load`.
        json_file: where the scores are written, if anywhere.
        allow_missing: leave out images without CAM, and without ground truth where only scores are made.
        overwrite: remove the masks that are there.
        num_workers: processes; the files do not depend on it.

    Returns:
        The exit code: 1 if an image failed.

    Raises:
        FileNotFoundError: CAMs or folders are missing.
        ValueError: `job.output` is the folder of the CAMs, or holds masks made with other settings.
    """
    if job.output is not None and Path(job.output).resolve() == Path(job.cam_dir).resolve():
        raise ValueError(f"{job.output} holds the CAMs: give the masks a folder of their own")
    names, missing = present(names, job.cam_dir, allow_missing, "CAMs")
    if not Path(job.image_root).is_dir():
        raise FileNotFoundError(f"image folder {job.image_root} does not exist: give --image_root")
    if job.output is None:
        names, untrue = present(names, job.gt_root, allow_missing, "ground-truth masks")
        missing += untrue
    elif job.gt_root is not None and not Path(job.gt_root).is_dir():
        raise FileNotFoundError(
            f"ground-truth folder {job.gt_root} does not exist: give another --gt_root or none"
        )
    run = Run(
        job.output,
        settings=mask_settings(job, benchmark_name),
        info={"crf_backend": job.backend},
        inputs={"cams": fingerprint(read_settings(job.cam_dir))},
        outputs=("*.png",),
        overwrite=overwrite,
        step="masks",
    )
    parts = run.map(make_images, names, job, num_workers=num_workers)
    code = run.finish()
    if run.rank == 0 and job.gt_root is not None:
        hist, pixels = (sum(counts) for counts in zip(*parts, strict=True))
        report = {
            "benchmark": job.benchmark.name,
            "cam_type": job.cam_type,
            "confidence": None if job.output is None else job.confidence,
            "crf": asdict(job.crf),
            "images": len(names) - len(run.failures),
            "failed": [name for name, _ in run.failures],
            "missing": missing,
        }
        result = benchmark_scores(hist, job.benchmark)
        tell(report, (None,), [result], pixels, job.benchmark, json_file)
    return code


def fingerprint(record: Mapping[str, Any]) -> str:
    """sha256 of what CAMs were made with, from their folder's record; empty where nothing is recorded.

    The file format is left out, since no mask depends on it.
    """
    made = {key: dict(record[key]) for key in ("settings", "inputs") if key in record}
    made.get("settings", {}).pop("cam_format", None)
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest() if made else ""
