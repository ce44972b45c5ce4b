"""Images -> scores of classes, by the three stages in turn: `Tagger`, and `tag_images` beneath it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import clip
from clip.model import CLIP, VisionTransformer
from tagclip.config import TagSettings
from tagclip.crops import Crop, candidates, class_tokens, crops, cut
from tagclip.patches import class_probabilities, patch_level, refined_probabilities
from tagclip.scores import labels
from tagclip.templates import TEMPLATES

CROPS_AT_ONCE = 32


class Tags(NamedTuple):
    """What an image seems to show.

    Attributes:
        scores: (K,) float32, of no fixed scale: what was looked at again is averaged with a probability.
        maps: (K, h, w) float32, the refined patch scores.
        reidentified: class index -> probability in its crop.
    """

    scores: np.ndarray
    maps: np.ndarray
    reidentified: dict[int, float]


class Tagger:
    """TagCLIP with one model and one list of names: `tagger(image)` tells what an image seems to show.

    Args:
        model: with a ViT tower. The public code rounds none of its weights.
        classes: the names that are scored.
        backgrounds: what they are told from.
        templates: texts with one `{}`, in which names are read.
        settings: see there.

    Raises:
        ValueError: the model has no ViT tower, or the settings do not fit it.
    """

    def __init__(
        self,
        model: CLIP,
        classes: Sequence[str],
        backgrounds: Sequence[str] = (),
        templates: Sequence[str] = TEMPLATES,
        settings: TagSettings | None = None,
    ):
        if not isinstance(model.visual, VisionTransformer):
            raise ValueError("a ResNet tower has no attention between patches to tag by: give a ViT")
        self.model, self.classes, self.settings = model, list(classes), settings or TagSettings()
        self.settings.check(model.visual.layers, model.visual.patch_size)
        self.text = clip.text_features(model, [*classes, *backgrounds], templates)

    def __call__(self, image: Image.Image) -> Tags:
        """Tag an image of any mode and size."""
        return self.tag([network_pixels(image, self.model.visual.patch_size, self.settings.max_patches)])[0]

    def tag(self, images: Sequence[np.ndarray]) -> list[Tags]:
        """Tag images as `network_pixels` gives them, several at once."""
        return tag_images(self.model, images, self.text, len(self.classes), self.settings)

    def names(self, tags: Tags) -> list[str]:
        """The classes that the scores say are there; the best one if they say none."""
        return [self.classes[key] for key in labels(tags.scores[None], self.settings.ratio)[0]]


def network_pixels(image: Image.Image, patch: int, most: int) -> np.ndarray:
    """An image as the tower divides it: (H', W', 3) uint8, sides multiples of the patch.

    Unlike in the CAM step, palettes and the like are turned to RGB before they are resized.

    Args:
        most: patches it may have altogether.
    """
    if image.mode != "L":  # which is the same before and after
        image = image.convert("RGB")
    return clip.resize_rgb(image, clip.target_size(image.height, image.width, patch, most=most))


@torch.no_grad()
def tag_images(
    model: CLIP, images: Sequence[np.ndarray], text: Tensor, classes: int, settings: TagSettings
) -> list[Tags]:
    """Tag images, those of equal size at once, and crops of all images at once.

    Args:
        model: see `Tagger`.
        images: see `network_pixels`.
        text: (C, E) features of the names, those of the classes first; see `clip.text_features`.
        classes: how many of the names are scored.
        settings: see there; `TagSettings.check` tells whether they fit the model.

    Raises:
        ValueError: a precision does not hold the model's numbers.
    """
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    visual, size = model.visual, settings.crop_size or model.config.image_resolution
    tags: list[Tags | None] = [None] * len(images)
    found: list[tuple[int, Crop]] = []
    views: list[tuple[Tensor, Tensor]] = []
    for indices in by_size.values():
        pixels = torch.from_numpy(np.stack([images[index] for index in indices])).to(model.device)
        batch = clip.normalize(pixels, model.config.mean, model.config.std)  # (B, 3, H', W')
        tokens, attention, grid = patch_level(visual, batch, settings)
        coarse = _finite(class_probabilities(tokens[:, 1:], text, model.logit_scale))  # (B, n, C)
        refined = refined_probabilities(coarse, attention, grid, settings)  # (B, n, C)
        for index, image, scores in zip(indices, batch, refined, strict=True):
            maps = scores[:, :classes].T.unflatten(-1, grid).cpu().numpy()
            tags[index] = Tags(maps.max((1, 2)), maps, {})
            keys = candidates(scores, classes, settings.ratio)
            for crop in crops(scores, grid, keys, settings):
                found.append((index, crop))
                views.append(cut(image, crop, visual.patch_size, size))
    for start in range(0, len(found), CROPS_AT_ONCE):
        some = slice(start, start + CROPS_AT_ONCE)
        pixels, cells = (torch.stack(parts) for parts in zip(*views[some], strict=True))
        tokens = class_tokens(visual, pixels, cells, settings)  # (M, E)
        probabilities = _finite(class_probabilities(tokens, text, model.logit_scale)).cpu()  # (M, C)
        for (index, crop), row in zip(found[some], probabilities, strict=True):
            tags[index].reidentified[crop.key] = float(row[crop.key])
    for scores, _, reidentified in tags:
        for key, probability in reidentified.items():
            local = settings.local_weight * scores[key]
            scores[key] = local + np.float32((1 - settings.local_weight) * probability)
    return tags


def _finite(probabilities: Tensor) -> Tensor:
    if not probabilities.isfinite().all():
        raise ValueError("the model's features are not finite: its weights are damaged, or it needs fp32")
    return probabilities
