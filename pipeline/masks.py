"""Step 2b: pseudo masks, or their scores, from CAM files and images by a dense CRF."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from foundation.files import below
from foundation.settings import Settings, setting
from pipeline.evaluate import ScoringStep, background, count_mask, files_present, read_truth
from pipeline.processes import device_of
from pipeline.run import Record, Run, fingerprint, read_settings
from pipeline.step import Decoded
from refinement.densecrf import BACKENDS, IMAGE_MODES, PRESETS, UNARY_TYPES, Preset, densecrf_batch
from segmentation import camfile
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.images import find_image, read_rgb, shrunk
from segmentation.masks import check_class_pixels, is_complete, read_mask, write_mask


@dataclass(frozen=True)
class MaskSettings(Settings):
    """How the dense CRF makes masks from CAMs; the defaults are those of CLIP-ES."""

    confidence: float = setting(
        0.95,  # threshold on the CRF posterior; the paper applies its mu to the CAM
        "pixels with a lower CRF posterior become 255 (ignored); 0 ignores no pixel",
        least=0,
        most=1,
    )
    crf_backend: str = setting(
        "auto",
        "numba (CPU), torch (batches of images on a GPU) or pydensecrf (reference implementation); auto: "
        "torch on a GPU, else numba. All backends give the same labels",
        choices=("auto", *BACKENDS),
    )
    crf_image: str = setting(
        PRESETS["clip_es"].image_mode,
        "input image of the CRF: wrapped (mean-subtracted and wrapped to 8 bits, as for published numbers), "
        "or unchanged in RGB (raw) or BGR (bgr)",
        choices=IMAGE_MODES,
    )
    crf_unary: str = setting(
        PRESETS["clip_es"].unary_type,
        "number type of the unary energies; published numbers use float16",
        choices=UNARY_TYPES,
    )
    crf_max_pixels: int = setting(
        10_000_000,
        "images with more pixels are shrunk to this many for the CRF, which needs 350 bytes per pixel",
        least=1,
    )

    @property
    def crf(self) -> Preset:
        """The settings of the dense CRF; the background is computed in its unary type too."""
        return replace(PRESETS["clip_es"], image_mode=self.crf_image, unary_type=self.crf_unary)

    def on(self, device: str) -> "MaskSettings":
        """Return the settings with `crf_backend` "auto" resolved for a device, "cpu" or "cuda..."."""
        if self.crf_backend != "auto":
            return self
        return replace(self, crf_backend="torch" if device.startswith("cuda") else "numba")

    def record(self, benchmark: str, cam_type: str) -> dict:
        """Return the settings that a mask folder records, see `pipeline.run.Record`."""
        return {
            "benchmark": benchmark,
            "cam_type": cam_type,
            "confidence": self.confidence,
            "crf": asdict(self.crf),
            "crf_max_pixels": self.crf_max_pixels,
        }


# Published method -> default of --confidence, and benchmarks on which --exclude_last_layer is set by default.
PUBLISHED = {
    "clip_es": {"confidence": MaskSettings.confidence, "exclude_last_layer": ()},
    # TagCLIP's copy of CLIP-ES; only its VOC script averages the attention maps [-8:-1].
    "cls_seg": {"confidence": 0.0, "exclude_last_layer": ("voc12",)},
}


def add_preset_flag(flag: Callable) -> None:
    """Add --preset, which sets the defaults of --confidence and --exclude_last_layer."""
    flag("--preset", choices=PUBLISHED, default="clip_es", help="use the defaults of a published method: "
         "CLIP-ES, or CLS-SEG (segmentation without labels, from the paper of TagCLIP). CLS-SEG ignores no "
         "pixel of a mask, and sets --exclude_last_layer on voc12. Other flags take precedence")  # fmt: skip


def mask_defaults(preset: str) -> MaskSettings:
    """Return the mask settings of a preset."""
    return MaskSettings(confidence=PUBLISHED[preset]["confidence"])


def crf_posterior(
    image: np.ndarray, cams: np.ndarray, settings: MaskSettings, add_background: bool, device: str = "cpu"
) -> np.ndarray:
    """Return the class posteriors of the dense CRF for one image. The background is 1 - the highest CAM.

    Args:
        image: (H, W, 3) uint8 RGB.
        cams: (C, H, W) float16.
        add_background: insert a background channel before `cams`.
        device: of the torch backend.

    Returns:
        (C, H, W) float32, or (1 + C, H, W) with the background first; they sum to 1 over channels.
    """
    probabilities = cams.astype(settings.crf.unary_type)
    if add_background:
        first = background(cams.max(axis=0, initial=0), 1, settings.crf.unary_type)
        probabilities = np.concatenate([first[None], probabilities])
    return densecrf_batch([image], [probabilities], settings.crf, settings.crf_backend, device)[0]


def posterior_labels(posterior: np.ndarray, values: np.ndarray, confidence: float = 0) -> np.ndarray:
    """Return the most probable labels (H, W) uint8, 255 where the posterior is below `confidence`.

    Args:
        posterior: (C, H, W).
        values: (C,) uint8, see `mask_values`.
    """
    labels = values[posterior.argmax(axis=0)]
    if confidence:
        labels[posterior.max(axis=0) < confidence] = IGNORE
    return labels


def crf_labels(
    image: np.ndarray, cams: np.ndarray, values: np.ndarray, settings: MaskSettings, device: str = "cpu"
) -> np.ndarray:
    """Return the mask (H, W) uint8 of the dense CRF for CAMs, see `crf_posterior` and `mask_values`."""
    posterior = crf_posterior(image, cams, settings, len(values) > len(cams), device)
    return posterior_labels(posterior, values, settings.confidence)


def mask_values(class_ids: Sequence[int], benchmark: Benchmark, cam_type: str = "") -> np.ndarray:
    """Return the mask value of each channel of the CRF, (C,) uint8; the background is the first channel.

    Args:
        class_ids: (K,) class indices.
        cam_type: CAM types with "bg" in their name contain a background channel.

    Raises:
        ValueError: a class index is outside the benchmark.
    """
    class_ids = np.asarray(class_ids, np.int64)
    if max(class_ids, default=0) >= len(benchmark.classes):
        raise ValueError(
            f"the CAM file contains class {max(class_ids)}, but {benchmark.name} has the classes "
            f"0..{len(benchmark.classes) - 1}: give the --benchmark that the CAMs were made for"
        )
    values = class_ids + int(benchmark.has_background)
    if benchmark.has_background or "bg" in cam_type:
        values = np.append(0, values)
    return values.astype(np.uint8)


def resize_mask(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a mask (h, w) resized to the image size (H, W), for a CRF that ran at a smaller size."""
    if labels.shape == size:
        return labels
    return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)


def shrunk_note(settings: MaskSettings) -> str:
    """Return the note on images that are too large for the CRF."""
    return f"images shrunk to {settings.crf_max_pixels} pixels for the CRF (--crf_max_pixels)"


@dataclass
class MaskInput(Decoded):
    """A decoded image: size, class indices, shrunk pixels and CAMs; or only its mask, if that file exists."""

    size: tuple[int, int] = (0, 0)
    class_ids: np.ndarray | None = None
    image: np.ndarray | None = None
    cams: np.ndarray | None = None
    mask: np.ndarray | None = None


@dataclass
class MaskStep(ScoringStep):
    """Step 2b: makes masks, and scores them if `gt_root` is given.

    Attributes:
        output: folder of the masks; None writes no masks and scores labels of any confidence.
        gt_root: folder of the ground-truth masks; None computes no scores.
        cam_type: CAM type to read from the files.
        device: device of the torch backend, see `pipeline.processes.device_of`.
    """

    benchmark: Benchmark
    cam_dir: str
    image_root: str
    output: str | None
    gt_root: str | None = None
    cam_type: str = "attn_highres"
    settings: MaskSettings = field(default_factory=MaskSettings)
    device: str = "cpu"

    def is_done(self, name: str) -> bool:
        """Return whether the mask exists undamaged and needs no scoring."""
        return self.output is not None and self.gt_root is None and is_complete(self._file(name))

    def start(self, worker_index: int) -> None:
        needs_device = self.settings.crf_backend in ("auto", "torch")
        self.device = device_of(self.device, worker_index) if needs_device else "cpu"
        self.settings = self.settings.on(self.device)

    def decode(self, name: str) -> MaskInput:
        if self.output is not None and is_complete(self._file(name)):
            return MaskInput(name, mask=read_mask(self._file(name)))
        image = read_rgb(find_image(self.image_root, name))
        most, size = self.settings.crf_max_pixels, image.shape[:2]
        class_ids, cams = camfile.read(self.cam_dir, name, self.cam_type, most, size=size)
        small = shrunk(image, most)
        notes = [] if small.shape == image.shape else [shrunk_note(self.settings)]
        return MaskInput(name, size, class_ids, small, cams, notes=notes)

    def compute(self, batch: list[MaskInput]) -> list[np.ndarray]:
        """Return the index mask (H, W) uint8 of each image; without an output folder no pixel is 255."""
        (decoded,) = batch
        if decoded.mask is not None:
            return [decoded.mask]
        settings = replace(self.settings, confidence=0) if self.output is None else self.settings
        values = mask_values(decoded.class_ids, self.benchmark, self.cam_type)
        labels = crf_labels(decoded.image, decoded.cams, values, settings, self.device)
        return [resize_mask(labels, decoded.size)]

    def write(self, decoded: MaskInput, mask: np.ndarray) -> list[str]:
        if self.output is not None and decoded.mask is None:
            write_mask(self._file(decoded.name), mask, self.benchmark.palette, decoded.class_ids)
        if self.gt_root is None:
            return decoded.notes
        # With --eval_only all images have ground truth here, see `make_masks`.
        if not (Path(self.gt_root) / f"{decoded.name}.png").is_file():
            return [*decoded.notes, "images without ground truth"]
        truth = read_truth(self.gt_root, decoded.name, self.benchmark.channels, mask.shape)
        self.count(*count_mask(truth, mask, self.benchmark.channels))
        return decoded.notes

    def _file(self, name: str) -> Path:
        return below(self.output, f"{name}.png")


def make_masks(
    step: MaskStep,
    names: Sequence[str],
    benchmark_name: str,
    json_file: str | Path | None = None,
    allow_missing: bool = False,
    overwrite: bool = False,
    num_workers: int = 1,
) -> int:
    """Make pseudo masks and, if `step.gt_root` is given, score them: print the scores and write JSON.

    If `step.output` is given, the written masks are scored, without their ignored pixels (255). If it is
    None, no mask is written and every pixel is scored, as for the published numbers.

    Args:
        names: image ids.
        benchmark_name: name or file that the mask folder records, see `segmentation.benchmark.load`.
        json_file: file for the scores; None writes none.
        allow_missing: leave out images without CAMs; if `step.output` is None, also images without ground
            truth.
        overwrite: remove existing masks.

    Returns:
        The exit code: 1 if an image failed, else 0.

    Raises:
        FileNotFoundError: CAMs or folders are missing.
        ValueError: `step.output` is the folder of the CAMs, or contains masks made with other settings; or no
            ground-truth mask has a pixel of a class, and not all are background.
    """
    if step.settings.crf_backend == "auto":  # resolved here, because the folder records it
        step = replace(step, settings=step.settings.on(device_of(step.device)))
    if step.output is not None and Path(step.output).resolve() == Path(step.cam_dir).resolve():
        raise ValueError(f"{step.output} is the folder of the CAMs: give another --output")
    names, missing = files_present(names, step.cam_dir, allow_missing, "CAMs")
    if not Path(step.image_root).is_dir():
        raise FileNotFoundError(f"image folder {step.image_root} does not exist: give --image_root")
    if step.output is None:
        names, without_truth = files_present(names, step.gt_root, allow_missing, "ground-truth masks")
        missing += without_truth
    elif step.gt_root is not None and not Path(step.gt_root).is_dir():
        raise FileNotFoundError(
            f"ground-truth folder {step.gt_root} does not exist: give another --gt_root, or leave it out"
        )
    if step.gt_root is not None:
        check_class_pixels(step.gt_root, names, step.benchmark, allow_background=True)
    record = Record(
        step="masks",
        settings=step.settings.record(benchmark_name, step.cam_type),
        inputs={"cams": fingerprint(read_settings(step.cam_dir))},
        outputs=("*.png",),
        info={"crf_backend": step.settings.crf_backend},
    )
    run = Run(step.output, record, overwrite)
    parts = run.map(step, names, num_workers)
    code = run.finish()
    if run.rank == 0 and step.gt_root is not None:
        confidence = None if step.output is None else step.settings.confidence
        details = {"confidence": confidence, "crf": asdict(step.settings.crf)}
        step.report(run, parts, names, missing, details, json_file)
    return code
