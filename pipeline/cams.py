"""Step 1: class activation maps from images and their labels, one file per image."""
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import clip
from clip.model import CLIP, VisionTransformer
from clip.positions import POSITION_ROUNDINGS
from foundation.files import below, write_file
from foundation.settings import Settings, setting
from pipeline.compute import ComputeSettings, images_that_fit
from pipeline.decode import Decoder, Grid, LabeledImage, resized_views
from pipeline.step import Step
from pytorch_grad_cam import METHODS, text_cams
from pytorch_grad_cam.affinity import box_masks, refine
from pytorch_grad_cam.grad_cam import AFFINITY_LAYERS
from pytorch_grad_cam.methods import min_max_normalize
from segmentation import camfile, labels
from segmentation.benchmark import Benchmark

REFINEMENTS = ("caa", "mhsa", "none")
INITIAL, REFINED = "highres", "attn_highres"  # CAM types, named as in CLIP-ES's files
ROUND_WEIGHTS = {"auto": None, "on": True, "off": False}

# Normalized images (B, 3, H', W') -> (B, n, n) non-negative affinities between the n patches of each image.
Affinity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CamSettings(Settings):
    """How CAMs are made; the defaults are those of CLIP-ES on VOC12."""

    refine: str = setting(
        "caa",
        "affinity with class boxes (caa), affinity alone (mhsa), or the initial CAM (none)",
        choices=REFINEMENTS,
    )
    keep_initial: bool = setting(False, f"also store the initial CAM, as CAM type {INITIAL}")
    cam_method: str = setting(
        "gradcam", "method that computes the weights of the activations from gradients", choices=METHODS
    )
    cam_scales: tuple[float, ...] = setting(
        (1.0,), "image scales whose CAMs are averaged, such as 0.5,1,1.5", least=0.1, most=10
    )
    flip: bool = setting(False, "average with the CAMs of the mirrored image")
    affinity_layers: int = setting(
        AFFINITY_LAYERS,
        "number of last blocks whose attention is averaged for the affinity",
        least=1,
        aliases=["--averaged_blocks"],
    )
    exclude_last_layer: bool = setting(
        False,
        "leave the last block out of this average: --affinity_layers 8 then averages the 7 blocks before the "
        "last",
        aliases=["--leave_out_last"],
    )
    box_threshold: float = setting(
        0.4,
        "class boxes enclose patches above this fraction of the CAM's maximum (lambda in the paper)",
        least=0,
        most=1,
    )
    include_edge: bool = setting(
        False,
        "let class boxes include the last row and column of patches, which the reference implementation "
        "leaves out",
        aliases=["--cover_edge"],
    )
    position_rounding: str = setting(
        "always",
        "when the positional embedding is rounded to float16; always: as in the reference implementation; "
        "resampled: if the patch grid differs from that of CLIP's training",
        choices=POSITION_ROUNDINGS,
    )
    round_weights: str = setting(
        "auto",
        "round matrix weights to float16; auto: only the weights of files in OpenAI's layout, as in the "
        "reference implementation",
        choices=ROUND_WEIGHTS,
    )
    max_patches: int = setting(10_000, "images with more patches are shrunk to this many patches", least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.exclude_last_layer and self.affinity_layers < 2 and self.refine != "none":
            raise ValueError(
                "--exclude_last_layer leaves no block to average when --affinity_layers is 1: give "
                "--affinity_layers 2 or more, or --no_exclude_last_layer"
            )

    @property
    def cam_type(self) -> str:
        """The CAM type that masks are made from."""
        return INITIAL if self.refine == "none" else REFINED

    def record(self) -> dict:
        """Return the settings that an output folder records, without `round_weights`: the folder records its
        resolved value as `weights_rounded`."""
        return {name: value for name, value in asdict(self).items() if name != "round_weights"}


def image_cams(
    model: CLIP,
    image: Image.Image,
    text_features: Tensor,
    background_features: Tensor,
    settings: CamSettings,
    affinity: Affinity | None = None,
) -> dict[str, np.ndarray]:
    """Return the CAMs of one image, see `batch_cams`.

    Args:
        image: of any mode and size.
        text_features: (K, E), of the labels.
    """
    views = resized_views(image, Grid.of(model), settings.cam_scales, settings.max_patches)
    return batch_cams(model, [views], [text_features], background_features, settings, affinity)[0]


@torch.no_grad()
def batch_cams(
    model: CLIP,
    views: Sequence[tuple[np.ndarray, ...]],
    text_features: Sequence[Tensor],
    background_features: Tensor,
    settings: CamSettings,
    affinity: Affinity | None = None,
) -> list[dict[str, np.ndarray]]:
    """Return the CAMs of a batch of images whose views have the same sizes.

    Args:
        views: the views of each image, see `resized_views`.
        text_features: for each image, the features (K, E) of its labels; K may differ between images.
        background_features: (M, E), of the background prompts.
        affinity: replaces the attention of the model's own blocks.

    Returns:
        For each image, CAM type -> (K, h, w) float32 in [0, 1] on the patch grid of the largest scale.

    Raises:
        ValueError: a CAM is not finite.
    """
    counts = [len(features) for features in text_features]
    padded = pad_sequence(list(text_features), batch_first=True)  # (B, K, E)
    valid = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(padded.device)  # (B, K)
    cams: list[dict[str, list[np.ndarray]]] = [{} for _ in views]
    for same_scale in zip(*views, strict=True):
        by_type = _view_cams(
            model, np.stack(same_scale), padded, valid, background_features, settings, affinity
        )
        for cam_type, grids in by_type.items():
            of_images = grids.transpose(0, 1).cpu().numpy()  # (B, views, K, h, w)
            for image_cams, count, grid in zip(cams, counts, of_images, strict=True):
                image_cams.setdefault(cam_type, []).extend(grid[:, :count])
    return [{cam_type: _average(grids) for cam_type, grids in by_type.items()} for by_type in cams]


def _view_cams(
    model: CLIP,
    pixels: np.ndarray,
    text_features: Tensor,
    valid: Tensor,
    background_features: Tensor,
    settings: CamSettings,
    affinity: Affinity | None,
) -> dict[str, Tensor]:
    """Return CAM type -> (V, B, K, h, w) for images (B, H', W', 3). V is 1. With `settings.flip` V is 2, and
    index 1 contains the CAMs of the mirrored images, flipped back."""
    images = clip.normalize(_to_device(pixels, model.device), model.config.mean, model.config.std)
    if settings.flip:  # images are (B, 3, H', W')
        images = torch.cat([images, images.flip(-1)])
        text_features, valid = text_features.repeat(2, 1, 1), valid.repeat(2, 1)
    result = text_cams(
        model,
        images,
        text_features,
        background_features,
        valid,
        method=settings.cam_method,
        affinity_layers=settings.affinity_layers,
        exclude_last_layer=settings.exclude_last_layer,
        position_rounding=settings.position_rounding,
        affinity=affinity,
    )
    initial, cams = _finite(result.cams), {}
    if settings.refine == "none" or settings.keep_initial:
        cams[INITIAL] = initial
    if settings.refine != "none":
        boxes = None
        if settings.refine == "caa":
            boxes = box_masks(initial, settings.box_threshold, settings.include_edge)
        cams[REFINED] = min_max_normalize(_finite(refine(initial, result.affinity, boxes)))
    views = {cam_type: grids.unflatten(0, (-1, len(pixels))) for cam_type, grids in cams.items()}
    return {cam_type: torch.cat([grids[:1], grids[1:].flip(-1)]) for cam_type, grids in views.items()}


def _finite(cams: Tensor) -> Tensor:
    if not cams.isfinite().all():
        raise ValueError("the CAM is not finite: give undamaged weights, or --precision fp32")
    return cams


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return the array as a tensor on the device. The copy to a GPU is asynchronous: the GPU can compute the
    batch of another thread meanwhile."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    with torch.cuda.device(device):  # without this, pin_memory creates a context on the first GPU
        return tensor.pin_memory().to(device, non_blocking=True)


def _average(views: list[np.ndarray]) -> np.ndarray:
    """Return the mean of (K, h, w) maps, resized to the largest of their grids and normalized to [0, 1]."""
    if len(views) == 1:
        return views[0]
    grid = max((view.shape[1:] for view in views), key=np.prod)
    mean = np.mean([camfile.resize(view, grid) for view in views], axis=0)
    return min_max_normalize(torch.from_numpy(mean)).numpy()


def store_files(folder: str, name: str, files: dict[str, bytes]) -> None:
    """Write the files of one image, given as suffix -> content. Each file is replaced atomically."""
    for suffix, content in files.items():
        write_file(below(folder, f"{name}{suffix}"), content)


@dataclass
class CamStep(Step):
    """Step 1: computes the CAMs of images and writes them.

    Attributes:
        labels: reader of the images' labels; None: every sample contains its labels, see `Sample`.
        model: see `clip.load`.
        output: folder of the CAM files; None if `store` receives them, or if they are not kept.
        format: see `segmentation.camfile`; "none" if CAMs are not kept.
        affinity: replaces the attention of the model's own blocks; must be a module-level function if there
            are several processes.
        store: function (image name, file suffix -> content) that receives the files; None writes them to
            `output`.
    """

    benchmark: Benchmark
    image_root: str
    labels: labels.LabelReader | None
    model: str
    output: str | None
    format: str
    settings: CamSettings = field(default_factory=CamSettings)
    compute_settings: ComputeSettings = field(default_factory=ComputeSettings)
    affinity: Affinity | None = None
    store: Callable[[str, dict[str, bytes]], None] | None = None

    def __post_init__(self):
        self.flow = self.compute_settings.flow()

    def is_done(self, name: str) -> bool:
        """Return whether an undamaged CAM file with the current labels of the image exists."""
        try:
            class_ids = camfile.class_ids_of(self.output, name)
            return class_ids is not None and class_ids == self.labels(name)
        except (ValueError, OSError):
            return False  # a damaged file is made again; for unreadable labels, the decoder raises the error

    def start(self, worker_index: int) -> None:
        rounding = ROUND_WEIGHTS[self.settings.round_weights]
        self.clip = self.compute_settings.load(self.model, rounding, worker_index)
        has_affinity = self.affinity is not None or isinstance(self.clip.visual, VisionTransformer)
        if self.settings.refine != "none" and not has_affinity:
            raise ValueError(
                "a ResNet tower has no attention between patches, which refinement needs: use --refine none"
            )
        templates = self.benchmark.templates
        self.text_features = clip.text_features(self.clip, self.benchmark.prompts, templates)
        self.background_features = clip.text_features(self.clip, self.benchmark.backgrounds, templates)
        self.clip.forget_text_tower()
        self.flow = self.flow.on(self.clip.device)

    def decoder(self, kept_pixels: int | None = None) -> Decoder:
        return Decoder(
            labels=self.labels,
            num_classes=len(self.benchmark.classes),
            image_root=self.image_root,
            stale=tuple((self.output, suffix) for suffix in camfile.FORMATS.values()) if self.output else (),
            grid=Grid.of(self.clip),
            scales=self.settings.cam_scales,
            max_patches=self.settings.max_patches,
            kept_pixels=kept_pixels,
        )

    def batch_size(self, decoded: LabeledImage) -> int:
        views = 1 + self.settings.flip
        return images_that_fit(self.clip, decoded.patches(self.clip), self.flow.threads, views)

    def compute(self, batch: list[LabeledImage]) -> list[dict[str, np.ndarray]]:
        views = [decoded.views for decoded in batch]
        texts = [self.text_features[decoded.class_ids] for decoded in batch]
        return batch_cams(self.clip, views, texts, self.background_features, self.settings, self.affinity)

    def write(self, decoded: LabeledImage, cams: dict[str, np.ndarray]) -> list[str]:
        self.save(decoded.name, self.files(decoded, cams))
        return decoded.notes + self.notes(cams)

    def save(self, name: str, files: dict[str, bytes]) -> None:
        """Pass an image's files to `store`, or write them to `output`."""
        if self.store is None:
            store_files(self.output, name, files)
        else:
            self.store(name, files)

    def files(self, decoded: LabeledImage, cams: dict[str, np.ndarray]) -> dict[str, bytes]:
        """Return file suffix -> content of an image; {} if CAMs are not kept."""
        if self.format == "none":
            return {}
        content = camfile.encode(decoded.class_ids, cams, decoded.size, self.format)
        return {camfile.FORMATS[self.format]: content}

    def notes(self, cams: dict[str, np.ndarray]) -> list[str]:
        """Return the notes on an image's CAMs, which the run counts, see `Decoded`."""
        return [] if cams[self.settings.cam_type].any((1, 2)).all() else ["images with an all-zero CAM"]
