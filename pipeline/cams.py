"""Step 1: images and their labels -> class activation maps, one file per image."""
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import clip
from clip.model import CLIP, VisionTransformer
from pipeline.processes import Outcome, attempt, device_of
from pytorch_grad_cam import text_cams
from pytorch_grad_cam.affinity import box_masks, refine
from pytorch_grad_cam.grad_cam import AVERAGED_BLOCKS
from pytorch_grad_cam.methods import scale
from segmentation import camfile, labels
from segmentation.benchmark import Benchmark
from segmentation.images import find_image, read_image

REFINEMENTS = ("caa", "mhsa", "none")
INITIAL, REFINED = "highres", "attn_highres"  # CAM types, as the public files name them
RESNET_LEAST = 2  # stride-32 cells per side that a ResNet tower needs to attend over


@dataclass(frozen=True)
class CamSettings:
    """How CAMs are made; the defaults are those of CLIP-ES on VOC12.

    Attributes:
        refine: "caa" (affinity with class box masks), "mhsa" (affinity alone), "none" (initial CAM).
        method: how gradients weigh activations, see `pytorch_grad_cam.METHODS`.
        averaged: last blocks whose attention makes the affinity.
        box_threshold: lambda of the box masks.
        cover_edge: let box masks reach the grid's last row and column (the public code does not).
        scales, flip: views whose maps are averaged; the public code has one.
        keep_initial: store the initial CAM beside the refined one.
        position_rounding: see `clip.positions`.
        max_patches: a larger image is shrunk to this many.
    """

    refine: str = "caa"
    method: str = "gradcam"
    averaged: int = AVERAGED_BLOCKS
    box_threshold: float = 0.4
    cover_edge: bool = False
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    keep_initial: bool = False
    position_rounding: str = "always"
    max_patches: int = 10_000


@torch.no_grad()
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
    views: dict[str, list[np.ndarray]] = {}
    for factor in settings.scales:
        for name, maps in _view_cams(model, image, factor, text, backgrounds, settings).items():
            views.setdefault(name, []).extend(maps.cpu().numpy())
    return {name: _fuse(maps) for name, maps in views.items()}


def _view_cams(
    model: CLIP, image: Image.Image, factor: float, text: Tensor, backgrounds: Tensor, settings: CamSettings
) -> dict[str, Tensor]:
    """CAM type -> (views, K, h, w) at one scale, the flipped view turned back."""
    size = _size(model, image, factor, settings.max_patches)
    pixels = clip.preprocess(image, size, model.config.mean, model.config.std)
    pixels = pixels[None].to(model.device)  # (1, 3, H', W')
    if settings.flip:
        pixels = torch.cat([pixels, pixels.flip(-1)])
    result = text_cams(
        model,
        pixels,
        text.expand(len(pixels), -1, -1),
        backgrounds,
        method=settings.method,
        averaged=settings.averaged,
        position_rounding=settings.position_rounding,
    )
    maps = {}
    if settings.refine == "none" or settings.keep_initial:
        maps[INITIAL] = result.cams
    if settings.refine != "none":
        caa = settings.refine == "caa"
        masks = box_masks(result.cams, settings.box_threshold, settings.cover_edge) if caa else None
        maps[REFINED] = scale(refine(result.cams, result.attention, masks))
    return {name: torch.cat([cams[:1], cams[1:].flip(-1)]) for name, cams in maps.items()}


def _size(model: CLIP, image: Image.Image, factor: float, most: int | None = None) -> tuple[int, int]:
    """(H', W') that the image is resized to, see `clip.target_size`."""
    least = 1 if isinstance(model.visual, VisionTransformer) else RESNET_LEAST
    return clip.target_size(image.height, image.width, model.visual.patch_size, factor, least, most)


def _fuse(views: list[np.ndarray]) -> np.ndarray:
    """Mean of (K, h, w) maps on the largest of their grids, scaled to [0, 1] again."""
    if len(views) == 1:
        return views[0]
    grid = max((view.shape[1:] for view in views), key=np.prod)
    mean = np.mean([camfile.resize(view, grid) for view in views], axis=0)
    return scale(torch.from_numpy(mean)).numpy()


@dataclass(frozen=True)
class CamJob:
    """Everything a process needs to make CAM files; pickled when there are several."""

    benchmark: Benchmark
    image_root: str
    labels: labels.LabelReader
    model: str
    device: str
    precision: str
    round_weights: bool | None
    output: str
    format: str
    settings: CamSettings


def generate(names: Sequence[str], position: int, job: CamJob) -> Generator[Outcome, None, None]:
    """Make the CAM files of `names` that are not there yet, and those whose labels have changed; see
    `pipeline.processes`."""
    maker = None  # loads the model, which a finished run does not need
    for name in names:
        if _is_made(job, name):
            yield Outcome(name)
        else:
            maker = maker or _Maker(job, position)
            yield attempt(name, maker)


class _Maker:
    """Makes one CAM file after the other with one model."""

    def __init__(self, job: CamJob, position: int):
        self.job = job
        self.model = clip.load(job.model, device_of(job.device, position), job.precision, job.round_weights)
        if job.settings.refine != "none" and not isinstance(self.model.visual, VisionTransformer):
            raise ValueError(
                "a ResNet tower has no attention between places to refine CAMs with: use --refine none"
            )
        templates = job.benchmark.templates
        self.text = clip.text_features(self.model, job.benchmark.prompts, templates)
        self.backgrounds = clip.text_features(self.model, job.benchmark.backgrounds, templates)

    def __call__(self, name: str) -> list[str]:
        """Make the file of one image; returns notes worth counting."""
        job, settings = self.job, self.job.settings
        keys = job.labels(name)
        if not keys:
            stale = camfile.find(job.output, name)  # of labels that it no longer has
            if stale:
                stale.unlink()
            return ["images without labels"]
        image = read_image(find_image(job.image_root, name))
        maps = image_cams(self.model, image, self.text[keys], self.backgrounds, settings)
        camfile.write(job.output, name, keys, maps, (image.height, image.width), job.format)
        notes = []
        final = maps[INITIAL if settings.refine == "none" else REFINED]
        if not final.any((1, 2)).all():
            notes.append("images with an all-zero CAM")
        largest = max(settings.scales)
        if _size(self.model, image, largest, settings.max_patches) != _size(self.model, image, largest):
            notes.append(f"images shrunk to {settings.max_patches} patches (--max_patches)")
        return notes


def _is_made(job: CamJob, name: str) -> bool:
    try:
        made = camfile.keys(job.output, name)
        return made is not None and made == job.labels(name)
    except (ValueError, OSError):
        return False  # a damaged file is made anew; labels that cannot be read fail when they are needed
