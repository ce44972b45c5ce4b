"""Step 1: images and their labels -> class activation maps, one file per image."""
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import clip
from clip.model import CLIP, HEAD_WIDTH, VisionTransformer
from common.files import replacing
from pipeline.decode import Decoder, Grid, Labelled, resized_views
from pipeline.flow import FlowSettings, flow
from pipeline.processes import Outcome, cores, device_of
from pytorch_grad_cam import text_cams
from pytorch_grad_cam.affinity import box_masks, refine
from pytorch_grad_cam.grad_cam import AFFINITY_LAYERS
from pytorch_grad_cam.last_block import LABELS_AT_ONCE
from pytorch_grad_cam.methods import min_max_normalize
from segmentation import camfile, labels
from segmentation.benchmark import Benchmark

REFINEMENTS = ("caa", "mhsa", "none")
INITIAL, REFINED = "highres", "attn_highres"  # CAM types, as the public files name them
MOST_AT_ONCE = 32  # images in a batch: by then a GPU is busy, and fewer are left over of rare shapes
AHEAD = 8  # batches that are decoded ahead, among which images of equal size are looked for
WRITERS = 4  # threads that write what a GPU makes: PNG and NumPy files at some thousand a second
RESNET_LEAST = 2  # stride-32 cells per side that a ResNet tower needs to attend over


@dataclass(frozen=True)
class CamSettings:
    """How CAMs are made; the defaults are those of CLIP-ES on VOC12.

    Attributes:
        refine: "caa" (affinity with class box masks), "mhsa" (affinity alone), "none" (initial CAM).
        method: how gradients weigh activations, see `pytorch_grad_cam.METHODS`.
        averaged: last blocks whose attention makes the affinity.
        leave_out_last: without the very last of them, see `text_cams`.
        box_threshold: lambda of the box masks.
        cover_edge: let box masks reach the grid's last row and column (the public code does not).
        scales, flip: views whose maps are averaged; the public code has one.
        keep_initial: store the initial CAM beside the refined one.
        position_rounding: see `clip.positions`.
        max_patches: a larger image is shrunk to this many.
    """

    refine: str = "caa"
    method: str = "gradcam"
    averaged: int = AFFINITY_LAYERS
    leave_out_last: bool = False
    box_threshold: float = 0.4
    cover_edge: bool = False
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    keep_initial: bool = False
    position_rounding: str = "always"
    max_patches: int = 10_000

    def __post_init__(self):
        if self.leave_out_last and self.averaged < 2 and self.refine != "none":
            raise ValueError(
                "without the last block none is left to average: give --averaged_blocks 2 or more, "
                "or --no-leave_out_last"
            )


def image_cams(
    model: CLIP, image: Image.Image, text: Tensor, backgrounds: Tensor, settings: CamSettings
) -> dict[str, np.ndarray]:
    """The CAMs of one image.

    Args:
        image: any mode and size.
        text: (K, E) features of its labels.
        backgrounds: (M, E) features of the background prompts.

    Returns:
        CAM type -> (K, h, w) float32 in [0, 1] on the patch grid (of the largest scale).
    """
    views = resized_views(image, grid_of(model), settings.scales, settings.max_patches)
    return batch_cams(model, [views], [text], backgrounds, settings)[0]


def grid_of(model: CLIP) -> Grid:
    """How a model divides images into patches."""
    return Grid(model.visual.patch_size, 1 if isinstance(model.visual, VisionTransformer) else RESNET_LEAST)


@torch.no_grad()
def batch_cams(
    model: CLIP,
    views: Sequence[tuple[np.ndarray, ...]],
    texts: Sequence[Tensor],
    backgrounds: Tensor,
    settings: CamSettings,
) -> list[dict[str, np.ndarray]]:
    """The CAMs of images whose views have the same sizes, all at once.

    Args:
        views: of each image, see `resized_views`.
        texts: (K, E) features of each image's labels; K may differ.
        backgrounds: (M, E) features of the background prompts.

    Returns:
        For each image CAM type -> (K, h, w) float32 in [0, 1] on the patch grid (of the largest scale).
    """
    counts = [len(text) for text in texts]
    padded = pad_sequence(list(texts), batch_first=True)  # (B, K, E)
    present = None
    if min(counts) < max(counts):
        present = torch.arange(max(counts)) < torch.tensor(counts)[:, None]  # (B, K)
        present = present.to(padded.device)
    found: list[dict[str, list[np.ndarray]]] = [{} for _ in views]
    for sized in zip(*views, strict=True):  # the images at one scale
        for name, maps in _view_cams(model, np.stack(sized), padded, present, backgrounds, settings).items():
            grids = maps.transpose(0, 1).cpu().numpy()  # (B, views, K, h, w)
            for types, count, grid in zip(found, counts, grids, strict=True):
                types.setdefault(name, []).extend(grid[:, :count])
    return [{name: _fuse(maps) for name, maps in types.items()} for types in found]


def _view_cams(
    model: CLIP,
    pixels: np.ndarray,
    text: Tensor,
    present: Tensor | None,
    backgrounds: Tensor,
    settings: CamSettings,
) -> dict[str, Tensor]:
    """Images (B, H', W', 3) -> CAM type -> (1 or, with the flipped view turned back, 2, B, K, h, w)."""
    images = clip.normalize(_on(model.device, pixels), model.config.mean, model.config.std)  # (B, 3, H', W')
    if settings.flip:
        images, text = torch.cat([images, images.flip(-1)]), text.repeat(2, 1, 1)
        present = None if present is None else present.repeat(2, 1)
    result = text_cams(
        model,
        images,
        text,
        backgrounds,
        present,
        method=settings.method,
        affinity_layers=settings.averaged,
        exclude_last_layer=settings.leave_out_last,
        position_rounding=settings.position_rounding,
    )
    maps = {}
    if settings.refine == "none" or settings.keep_initial:
        maps[INITIAL] = result.cams
    if settings.refine != "none":
        caa = settings.refine == "caa"
        masks = box_masks(result.cams, settings.box_threshold, settings.cover_edge) if caa else None
        maps[REFINED] = min_max_normalize(refine(result.cams, result.affinity, masks))
    views = {name: cams.unflatten(0, (-1, len(pixels))) for name, cams in maps.items()}
    return {name: torch.cat([cams[:1], cams[1:].flip(-1)]) for name, cams in views.items()}


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    """The array as tensor; to a GPU it is copied while that computes another thread's batch."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    with torch.cuda.device(device):  # pinning would set up the first GPU otherwise
        return tensor.pin_memory().to(device, non_blocking=True)


def _fuse(views: list[np.ndarray]) -> np.ndarray:
    """Mean of (K, h, w) maps on the largest of their grids, scaled to [0, 1] again."""
    if len(views) == 1:
        return views[0]
    grid = max((view.shape[1:] for view in views), key=np.prod)
    mean = np.mean([camfile.resize(view, grid) for view in views], axis=0)
    return min_max_normalize(torch.from_numpy(mean)).numpy()


@dataclass(frozen=True)
class CamJob:
    """Everything a process needs to make CAM files; pickled when there are several. Without `output` they go
    elsewhere than to a folder; with format "none" there are none. Without `labels` images bring theirs."""

    benchmark: Benchmark
    image_root: str
    labels: labels.LabelReader | None
    model: str
    device: str
    precision: str
    round_weights: bool | None
    output: str | None
    format: str
    settings: CamSettings
    flow: FlowSettings = field(default_factory=FlowSettings)


def flow_settings(
    device: str,
    processes: int = 1,
    batch_size: int | None = None,
    look_ahead: int | None = None,
    threads: int | None = None,
    decode_workers: int | None = None,
) -> FlowSettings:
    """How images flow on a device, where the user does not say: a GPU is fed by all other cores.

    Args:
        device: see `pipeline.processes.device_of`.
        processes: that share this machine.
        batch_size, look_ahead, threads, decode_workers: what the user says, see `FlowSettings`.
    """
    gpu = clip.pick_device(device).type == "cuda"
    most = batch_size or (MOST_AT_ONCE if gpu else 1)
    if decode_workers is None:
        decode_workers = max(1, cores() // processes - 1) if gpu else 0
    return FlowSettings(
        batch_size=batch_size,
        look_ahead=look_ahead or (AHEAD * most if most > 1 else 1),
        threads=threads,
        decode_workers=decode_workers,
        write_workers=WRITERS,
    )


def generate(names: Sequence[str], position: int, job: CamJob) -> Generator[Outcome, None, None]:
    """Make the CAM files of `names` that are not there yet, and those whose labels have changed; see
    `pipeline.processes`."""
    missing = []
    for name in names:
        if is_made(job, name):
            yield Outcome(name)
        else:
            missing.append(name)
    if missing:  # otherwise no model is needed
        step = CamStep(job, position)
        yield from flow(missing, step.decoder(), step, step.flow)


def is_made(job: CamJob, name: str) -> bool:
    """Is there a whole CAM file of the labels that the image has now?"""
    try:
        made = camfile.keys(job.output, name)
        return made is not None and made == job.labels(name)
    except (ValueError, OSError):
        return False  # a damaged file is made anew; labels that cannot be read fail when they are needed


Store = Callable[[str, dict[str, bytes]], None]  # image name, file suffix -> content


class CamStep:
    """Step 1 with one model, see `pipeline.flow.Step`.

    Args:
        job: see there.
        position: of this process, see `pipeline.processes`.
        store: where files go; None: to the job's output folder.
    """

    def __init__(self, job: CamJob, position: int, store: Store | None = None):
        self.job = job
        self.store = store or partial(store_files, job.output)
        self.model = clip.load(job.model, device_of(job.device, position), job.precision, job.round_weights)
        if job.settings.refine != "none" and not isinstance(self.model.visual, VisionTransformer):
            raise ValueError(
                "a ResNet tower has no attention between places to refine CAMs with: use --refine none"
            )
        templates = job.benchmark.templates
        self.text = clip.text_features(self.model, job.benchmark.prompts, templates)
        self.backgrounds = clip.text_features(self.model, job.benchmark.backgrounds, templates)
        self.model.forget_text_tower()
        self.flow = job.flow.on(self.model.device)

    def decoder(self, kept_pixels: int | None = None) -> Decoder:
        """See `pipeline.decode.Decoder`."""
        job, settings = self.job, self.job.settings
        return Decoder(
            labels=job.labels,
            classes=len(job.benchmark.classes),
            image_root=job.image_root,
            stale=tuple((job.output, suffix) for suffix in camfile.FORMATS.values()) if job.output else (),
            grid=grid_of(self.model),
            scales=settings.scales,
            max_patches=settings.max_patches,
            kept_pixels=kept_pixels,
        )

    def batch_size(self, decoded: Labelled) -> int:
        """On a GPU what is likely to fit; on a CPU one, because its cores are busy with one image of usual
        size, and results are then equal to the last bit whatever a resumed run has left to do."""
        if self.model.device.type == "cpu":
            return 1
        patches = max(math.prod(shape) for shape in decoded.shape) // self.model.visual.patch_size**2
        return images_that_fit(self.model, patches, self.flow.threads, 1 + self.job.settings.flip)

    def compute(self, batch: list[Labelled]) -> list[dict[str, np.ndarray]]:
        texts = [self.text[decoded.keys] for decoded in batch]
        views = [decoded.views for decoded in batch]
        return batch_cams(self.model, views, texts, self.backgrounds, self.job.settings)

    def write(self, decoded: Labelled, maps: dict[str, np.ndarray]) -> list[str]:
        self.store(decoded.name, self.files(decoded, maps))
        return decoded.notes + self.notes(maps)

    def files(self, decoded: Labelled, maps: dict[str, np.ndarray]) -> dict[str, bytes]:
        """File suffix -> content."""
        content = camfile.encode(decoded.keys, maps, decoded.size, self.job.format)
        return {camfile.FORMATS[self.job.format]: content}

    def notes(self, maps: dict[str, np.ndarray]) -> list[str]:
        """What is worth counting of an image's CAMs."""
        final = maps[INITIAL if self.job.settings.refine == "none" else REFINED]
        return [] if final.any((1, 2)).all() else ["images with an all-zero CAM"]


def store_files(folder: str, name: str, files: dict[str, bytes]) -> None:
    """Write the files of one image; each appears whole or not at all."""
    for suffix, content in files.items():
        with replacing(Path(folder) / f"{name}{suffix}") as stream:
            stream.write(content)


def bytes_per_image(model: CLIP, patches: int) -> int:
    """An estimate, on the safe side, of the memory that a batch needs for each image.

    Quadratic in the patches are the last block's attention of all heads, their sum, and what one head
    needs; linear are the widest activations, which the gradient holds for several labels.
    """
    if not isinstance(model.visual, VisionTransformer):
        return patches * 2**20  # its early stages, 64 places of each stride-32 cell at hundreds of channels
    width = model.config.vision_width
    heads = width // HEAD_WIDTH
    return 4 * patches**2 * (heads + 6) + 4 * patches * width * (12 * LABELS_AT_ONCE + 40)


def images_that_fit(model: CLIP, patches: int, threads: int, views: int = 1) -> int:
    """Images of so many patches, each in so many views, that a GPU is likely to hold for one of `threads`."""
    room = _free_memory(model.device) / threads
    return int(min(MOST_AT_ONCE, max(1, room // (views * bytes_per_image(model, patches)))))


def _free_memory(device: torch.device) -> float:
    """Bytes of a GPU that a batch may take, with a fifth left alone."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 0.8 * (torch.cuda.mem_get_info(device)[0] + unused)
