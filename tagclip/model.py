"""Images -> class scores, by the three stages of TagCLIP: class `Tagger`, function `tag_images`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import clip
from clip.model import CLIP, VisionTransformer
from clip.templates import IMAGENET_TEMPLATES, SCENE_TEMPLATES
from pipeline.label_scores import chosen_labels
from tagclip.config import TagSettings
from tagclip.crops import Crop, candidates, class_tokens, crops, cut
from tagclip.patches import class_probabilities, patch_level, refined_probabilities

TEMPLATES = (*IMAGENET_TEMPLATES, *SCENE_TEMPLATES)  # prompt templates, as published
CROPS_AT_ONCE = 32


class Tags(NamedTuple):
    """The scores of an image.

    Attributes:
        scores: (K,) float32, not in a fixed range. Scores of cropped classes are averages of the patch score
            and the probability in the crop.
        maps: (K, h, w) float32, the refined patch scores.
        reidentified: class index -> probability in its crop.
    """

    scores: np.ndarray
    maps: np.ndarray
    reidentified: dict[int, float]


class Tagger:
    """TagCLIP with one model and one list of names: `tagger(image)` scores the classes of an image.

    Args:
        model: CLIP with a ViT tower, loaded with unrounded weights as in the reference implementation.
        classes: names that are scored.
        backgrounds: further names, which compete with the classes in the softmax but get no score.
        templates: prompts with one `{}` for the name.
        settings: see `TagSettings`.

    Raises:
        ValueError: the model has no ViT tower, or the settings do not fit the tower.
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
            raise ValueError("a ResNet tower has no attention between patches; tagging needs it: use a ViT")
        self.model, self.classes, self.settings = model, list(classes), settings or TagSettings()
        self.settings.check(model.visual.layers, model.visual.patch_size)
        self.text_features = clip.text_features(model, [*classes, *backgrounds], templates)

    def __call__(self, image: Image.Image) -> Tags:
        """Tag an image of any mode and size."""
        return self.tag([network_pixels(image, self.model.visual.patch_size, self.settings.max_patches)])[0]

    def tag(self, images: Sequence[np.ndarray]) -> list[Tags]:
        """Tag several images, each in the form that `network_pixels` returns."""
        return tag_images(self.model, images, self.text_features, len(self.classes), self.settings)

    def names(self, tags: Tags) -> list[str]:
        """Return the predicted classes; if none is above the threshold, the class with the highest score."""
        (class_ids,) = chosen_labels(tags.scores[None], self.settings.ratio)
        return [self.classes[class_id] for class_id in class_ids]


def network_pixels(image: Image.Image, patch: int, most: int) -> np.ndarray:
    """Return an image resized to multiples of the patch: (H', W', 3) uint8.

    Images are converted to RGB before they are resized; the CAM step converts after resizing.

    Args:
        image: of any mode.
        patch: side of a patch in pixels.
        most: maximum number of patches; larger images are shrunk.
    """
    if image.mode != "L":  # for gray images the order makes no difference
        image = image.convert("RGB")
    return clip.resize_rgb(image, clip.target_size(image.height, image.width, patch, most=most))


@torch.no_grad()
def tag_images(
    model: CLIP, images: Sequence[np.ndarray], text_features: Tensor, num_classes: int, settings: TagSettings
) -> list[Tags]:
    """Tag images: one batch for each image size, then the crops of all images in common batches.

    Args:
        model: see `Tagger`.
        images: see `network_pixels`.
        text_features: (C, E) of the names, classes first; see `clip.text_features`.
        num_classes: number of names that are scored.
        settings: must fit the model, see `TagSettings.check`.

    Raises:
        ValueError: the model's features are not finite.
    """
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    visual, size = model.visual, settings.crop_size or model.config.image_resolution
    tags: list[Tags | None] = [None] * len(images)
    cropped: list[tuple[int, Crop]] = []
    views: list[tuple[Tensor, Tensor]] = []
    for indices in by_size.values():
        pixels = torch.from_numpy(np.stack([images[index] for index in indices])).to(model.device)
        batch = clip.normalize(pixels, model.config.mean, model.config.std)  # (B, 3, H', W')
        tokens, attention, grid = patch_level(visual, batch, settings)
        coarse = _finite(class_probabilities(tokens[:, 1:], text_features, model.logit_scale))  # (B, n, C)
        refined = _finite(refined_probabilities(coarse, attention, grid, settings))  # (B, n, C)
        for index, image, scores in zip(indices, batch, refined, strict=True):
            maps = scores[:, :num_classes].T.unflatten(-1, grid).cpu().numpy()
            tags[index] = Tags(maps.max((1, 2)), maps, {})
            class_ids = candidates(scores, num_classes, settings.ratio)
            for crop in crops(scores, grid, class_ids, settings):
                cropped.append((index, crop))
                views.append(cut(image, crop, visual.patch_size, size))
    for start in range(0, len(cropped), CROPS_AT_ONCE):
        batch = slice(start, start + CROPS_AT_ONCE)
        pixels, cells = (torch.stack(parts) for parts in zip(*views[batch], strict=True))
        tokens = class_tokens(visual, pixels, cells, settings)  # (M, E)
        probabilities = _finite(class_probabilities(tokens, text_features, model.logit_scale)).cpu()  # (M, C)
        for (index, crop), row in zip(cropped[batch], probabilities, strict=True):
            tags[index].reidentified[crop.class_id] = float(row[crop.class_id])
    for scores, _, reidentified in tags:
        for class_id, probability in reidentified.items():
            local = settings.local_weight * scores[class_id]
            scores[class_id] = local + np.float32((1 - settings.local_weight) * probability)
    return tags


def _finite(probabilities: Tensor) -> Tensor:
    if not probabilities.isfinite().all():
        raise ValueError("the model's features are not finite: give undamaged weights, or --precision fp32")
    return probabilities
