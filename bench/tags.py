"""Step 0, from encoded JPEGs to class scores."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import clip
from bench import data, measure
from bench.cams import BENCHMARK, STAGED, Material, block_flop, race
from bench.measure import Setting
from bench.reference_tags import reference_tags
from clip.model import CLIP
from pipeline.label_scores import chosen_labels, read_scores
from pipeline.processes import Outcome
from pipeline.step import run_step
from segmentation.images import read_image
from tagclip import TagSettings
from tagclip.crops import Crop, candidates, class_tokens, crops, cut
from tagclip.model import TEMPLATES
from tagclip.patches import class_probabilities, patch_level, refined_probabilities
from tagclip.step import Resized, TagStep

CLASSES = len(BENCHMARK.classes)


@dataclass(frozen=True)
class TagMaterial(Material):
    """Inputs of both versions.

    Attributes:
        settings: settings of tagging, see `choose_ratio`.
    """

    settings: TagSettings = field(default_factory=TagSettings)

    def network(self, setting: Setting, precision: str) -> tuple[CLIP, Callable[[], Tensor]]:
        """Return the model, and a function that returns text features (C, E), cached after the first call."""
        model = clip.load(self.model, setting.device, precision, round_weights=False)
        templates = BENCHMARK.tag_templates or TEMPLATES
        return model, lambda: clip.text_features(model, BENCHMARK.tag_names, templates)

    def pixels(self, model: CLIP, name: str) -> Tensor:
        """Return a decoded and resized image, (H', W', 3) uint8."""
        image = read_image(self.image(name)).convert("RGB")
        size = clip.target_size(image.height, image.width, model.visual.patch_size)
        return torch.tensor(clip.resize_rgb(image, size))


@dataclass
class TimedStep(TagStep):
    """A step that also creates an empty file in `times` for each image.

    `measure.steady` needs one file per image, but a file of scores contains many images.
    """

    times: Path = Path()

    def write(self, decoded: Resized, scores: np.ndarray) -> list[str]:
        notes = super().write(decoded, scores)
        (self.times / decoded.name).touch()
        return notes


def ours(setting: Setting, material: TagMaterial, names: list[str], output: Path) -> Iterator[Outcome]:
    """Run our step 0."""
    output.mkdir()
    images, scores = str(material.folder / "images"), str(_scores(output))
    step = TimedStep(
        BENCHMARK, images, material.model, scores, material.settings, setting.compute, times=output
    )
    return run_step(names, 0, step)


def reference(setting: Setting, material: TagMaterial, names: list[str], output: Path) -> Iterator[Outcome]:
    """Run the reference in float32, with any `setting.precision`."""
    model, text_of = material.network(setting, "fp32")
    text = text_of()
    output.mkdir(exist_ok=True)
    for name in names:
        image = read_image(material.image(name)).convert("RGB")
        np.save(output / f"{name}.npy", reference_tags(model, image, text, CLASSES, material.settings))
        yield Outcome(name)


def run(setting: Setting) -> dict:
    """Measure; see `bench.measure.COMMON` for the results that every subcommand returns.

    "label_agreement" is the fraction of (image, class) pairs with the same decision, "equal_labels" the
    fraction of images with the same labels, "largest_difference" the largest difference of scores. "text_s"
    is the time in seconds to compute the text features of all names, "text_cached_s" to read them from the
    cache.
    """
    setting.limit_threads()
    with measure.scratch() as folder:
        material = TagMaterial.make(folder, setting)
        model, text_of = material.network(setting, setting.precision)
        start = time.perf_counter()
        text = text_of()
        features = {"text_s": time.perf_counter() - start, "text_cached_s": measure.seconds(text_of)}
        model.forget_text_tower()
        material, num_crops = choose_ratio(setting, material, model, text)
        result, done, ceiling = race(setting, material, ours, reference)
        result |= compared(folder, done, material.settings)
        result |= {"crops_per_image": num_crops, "ratio": material.settings.ratio, **features}
        flop = patch_flop(model) + num_crops * crop_flop(model, material.settings)
        rate = result["images_per_s"]
        result |= {
            "gflop_an_image": flop / 1e9,
            "gflop_per_s": flop * rate / 1e9,
            "matmul_gflop_per_s": ceiling / 1e9,
            "ceiling_share": flop * rate / ceiling,
        }
        result["stages"] = stages(setting, material, model, text, ceiling)
    return result


@torch.no_grad()
def choose_ratio(
    setting: Setting, material: TagMaterial, model: CLIP, text: Tensor
) -> tuple[TagMaterial, float]:
    """Choose `settings.ratio` so that images have about `setting.labels` crops on average.

    With random weights all classes have similar scores, so the published ratio would crop every class. The
    chosen ratio is the mean of two consecutive relative scores. On average, `setting.labels` classes of an
    image are above it.

    Returns:
        The material with that ratio, and the resulting number of crops per image.
    """
    positions, refined = [], []
    for name in material.timed(setting)[: data.DISTINCT]:
        pixels = material.pixels(model, name)[None].to(model.device)
        scores, grid = refine(model, pixels, text, material.settings)
        low, high = scores.aminmax()
        positions += ((scores[0, :, :CLASSES].amax(0) - low) / (high - low)).tolist()
        refined.append(scores[0])
    positions = sorted(positions, reverse=True)
    count = round(setting.labels * len(refined))
    settings = replace(material.settings, ratio=(positions[count - 1] + positions[count]) / 2)
    total = sum(len(crops_of(scores, grid, settings)) for scores in refined)
    return replace(material, settings=settings), total / len(refined)


def refine(
    model: CLIP, pixels: Tensor, text: Tensor, settings: TagSettings
) -> tuple[Tensor, tuple[int, int]]:
    """Return the refined scores (B, n, C) of images (B, H', W', 3), and the grid."""
    images = clip.normalize(pixels, model.config.mean, model.config.std)
    tokens, attention, grid = patch_level(model.visual, images, settings)
    coarse = class_probabilities(tokens[:, 1:], text, model.logit_scale)
    return refined_probabilities(coarse, attention, grid, settings), grid


def crops_of(refined: Tensor, grid: tuple[int, int], settings: TagSettings) -> list[Crop]:
    """Return the crops of an image with refined scores (n, C)."""
    return crops(refined, grid, candidates(refined, CLASSES, settings.ratio), settings)


def compared(folder: Path, names: list[str], settings: TagSettings) -> dict[str, float]:
    """Return the agreement of scores and labels of both versions."""
    scores_of = read_scores(_scores(folder / "ours0"), CLASSES)
    ours = np.stack([scores_of[name] for name in names])  # (n, K)
    theirs = np.stack([np.load(folder / "reference" / f"{name}.npy") for name in names])
    chosen = [chosen_labels(scores, settings.ratio) for scores in (ours, theirs)]
    differing = [len(set(a) ^ set(b)) for a, b in zip(*chosen, strict=True)]
    return {
        "label_agreement": 1 - sum(differing) / ours.size,
        "equal_labels": differing.count(0) / len(names),
        "largest_difference": float(np.abs(ours - theirs).max()),
    }


def patch_flop(model: CLIP) -> float:
    """Return the FLOP of the pass over one drawn image."""
    size = clip.target_size(data.HEIGHT, data.WIDTH, model.visual.patch_size)
    return model.visual.layers * block_flop(model, [side // model.visual.patch_size for side in size])


def crop_flop(model: CLIP, settings: TagSettings) -> float:
    """Return the FLOP of the pass over one crop."""
    side = (settings.crop_size or model.config.image_resolution) // model.visual.patch_size
    return model.visual.layers * block_flop(model, (side, side))


@torch.no_grad()
def stages(
    setting: Setting, material: TagMaterial, model: CLIP, text: Tensor, ceiling: float
) -> list[dict]:
    """Time the stages, each on the output of the stage before.

    Args:
        ceiling: FLOP/s of a large matrix product.
    """
    kind, settings, visual = setting.kind, material.settings, model.visual
    names = material.names[: STAGED[kind]]
    rows = []

    def timed(name: str, work: Callable, amount: float, unit: str, most: float):
        rows.append(measure.stage(name, measure.seconds(work, kind=kind) / len(names), amount, unit, most))
        return work()

    def decode() -> Tensor:
        return torch.stack([material.pixels(model, name) for name in names])

    def patches() -> tuple[Tensor, Tensor, tuple[int, int]]:
        tokens, attention, grid = patch_level(visual, images, settings)
        return class_probabilities(tokens[:, 1:], text, model.logit_scale), attention, grid

    def refinement() -> list[list[Crop]]:
        refined = refined_probabilities(coarse, attention, grid, settings)
        return [crops_of(scores, grid, settings) for scores in refined]

    def reidentify() -> Tensor:
        size = settings.crop_size or model.config.image_resolution
        pairs = zip(images, cropped, strict=True)
        views = [cut(image, crop, visual.patch_size, size) for image, part in pairs for crop in part]
        pixels, cells = (torch.stack(part) for part in zip(*views, strict=True))
        tokens = class_tokens(visual, pixels, cells, settings)
        return class_probabilities(tokens, text, model.logit_scale)

    one_jpeg = measure.jpeg_rate(material.image(names[0]))
    pixels = timed("decode and resize", decode, 1, "images/s", one_jpeg).to(model.device)
    images = clip.normalize(pixels, model.config.mean, model.config.std)  # (B, 3, H', W')
    amount = patch_flop(model) / 1e9
    coarse, attention, grid = timed("patch pass", patches, amount, "GFLOP/s", ceiling / 1e9)
    products = 2 * 2 * coarse.shape[1] ** 2 * len(text) / 1e9  # always in float32
    exact = ceiling if setting.precision == "fp32" else measure.matmul_rate(kind, "fp32")
    cropped = timed("refinement", refinement, products, "GFLOP/s", exact / 1e9)
    num_crops = sum(map(len, cropped)) / len(names)
    if num_crops:
        amount = num_crops * crop_flop(model, settings) / 1e9
        timed(f"crops ({num_crops:g})", reidentify, amount, "GFLOP/s", ceiling / 1e9)
    return rows


def _scores(output: Path) -> Path:
    """Return the folder of our scores."""
    return output.with_name(f"{output.name}_scores")
