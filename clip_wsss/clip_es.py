"""CLIP-ES: class activation maps and masks from an image and the names of its classes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clip
from clip.model import CLIP
from clip_wsss.images import ImageLike, as_list, check_names, split_settings, to_pillow
from clip_wsss.result import Result
from pipeline.cams import ROUND_WEIGHTS, Affinity, CamSettings, batch_cams
from pipeline.compute import ComputeSettings, images_that_fit
from pipeline.decode import Grid, LabeledImage, resized_views
from pipeline.flow import flow
from pipeline.masks import MaskSettings, crf_posterior, posterior_labels, resize_mask
from pipeline.step import Step
from segmentation import benchmark as benchmarks
from segmentation import camfile
from segmentation.images import shrunk


class ClipES:
    """CLIP-ES (Lin et al., CVPR 2023) with one model.

        model = ClipES("ViT-B/16")
        result = model("photo.jpg", ["cat", "sofa"])
        results = model(["a.jpg", "b.jpg"], [["cat"], ["dog", "person"]])

    Args:
        model: checkpoint file, name of an OpenAI model or open_clip model:tag, see `clip.load`; or a loaded
            CLIP.
        benchmark: name or YAML file. It gives the prompts of its classes ("person with clothes,people,human"
            for "person" on voc12) and the defaults of box threshold, templates and backgrounds. Masks have a
            background class if the benchmark has one.
        backgrounds: prompts that compete with the labels; None: the benchmark's. A background that is also a
            label is left out.
        affinity: function: normalized images (B, 3, H', W') -> affinities (B, n, n) between the n patches of
            each image. It replaces CLIP's attention in the refinement of CAMs.
        settings: any field of `CamSettings`, `MaskSettings` and `ComputeSettings`, such as
            affinity_layers=6, confidence=0.9, device="cuda".

    Raises:
        FileNotFoundError, ValueError: the model does not exist, or a setting is outside its range.
        TypeError: a setting does not exist.
    """

    def __init__(
        self,
        model: str | CLIP = "ViT-B/16",
        *,
        benchmark: str = "voc12",
        backgrounds: Sequence[str] | None = None,
        affinity: Affinity | None = None,
        **settings: Any,
    ):
        self.benchmark = benchmarks.load(benchmark)
        cam, mask, compute = split_settings("ClipES", settings, CamSettings, MaskSettings, ComputeSettings)
        self.settings = CamSettings(**{"box_threshold": self.benchmark.box_threshold, **cam})
        self.compute_settings = ComputeSettings(**compute)
        rounding = ROUND_WEIGHTS[self.settings.round_weights]
        self.clip = model if isinstance(model, CLIP) else self.compute_settings.load(model, rounding)
        self.mask_settings = MaskSettings(**mask).on(str(self.clip.device))
        names = self.benchmark.backgrounds if backgrounds is None else backgrounds
        self.backgrounds = check_names(names, "backgrounds")
        self.affinity = affinity
        self._features: dict[str, Tensor] = {}  # by prompt

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        labels: Sequence[str] | Sequence[Sequence[str]],
    ) -> Result | list[Result]:
        """Segment one image, or several.

        Args:
            images: path, Pillow image or (H, W, 3) uint8 array; or a list of them.
            labels: names of the classes in the image; for a list of images, one list of names for all images
                or one list per image.

        Returns:
            A `Result`; a list of them for a list of images.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read or computed, or has no labels.
            TypeError: images or labels have another type.
        """
        image_list, single = as_list(images)
        names = self._names(labels, len(image_list), single)
        step = _InMemory(self, image_list, names)
        for outcome in flow(range(len(image_list)), step):
            if outcome.failure:
                raise ValueError(f"image number {outcome.name} (from 0): {outcome.failure}")
        return step.results[0] if single else [step.results[index] for index in range(len(image_list))]

    def prompts(self, names: Sequence[str]) -> list[str]:
        """Return the prompt of each class name: the benchmark's prompt for its classes, else the name."""
        published = dict(zip(self.benchmark.classes, self.benchmark.prompts, strict=True))
        return [published.get(name, name) for name in names]

    def features(self, prompts: Sequence[str]) -> Tensor:
        """Return text features (K, E) of unit length; each prompt is encoded once."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        if missing:
            features = clip.encode_prompts(self.clip, missing, self.benchmark.templates)
            self._features |= dict(zip(missing, features, strict=True))
        if not prompts:
            return torch.empty(0, self.clip.config.embed_dim, device=self.clip.device)
        return torch.stack([self._features[prompt] for prompt in prompts])

    @staticmethod
    def _names(labels: Any, count: int, single: bool) -> list[list[str]]:
        """Return one list of names for each image."""
        is_list = isinstance(labels, Sequence) and not isinstance(labels, str)
        if single or not is_list or all(isinstance(name, str) for name in labels):
            names = [check_names(labels, "labels")] * count
        else:
            names = [check_names(item, "labels of each image") for item in labels]
        if len(names) != count:
            raise ValueError(f"{len(names)} lists of labels for {count} images: give one for each or for all")
        if not all(names):
            raise ValueError("an image has no labels: give at least one class that it contains")
        return names


class _InMemory(Step):
    """Step 1 and the dense CRF on images in memory; samples are indices into a list of images."""

    def __init__(self, model: ClipES, images: Sequence[ImageLike], names: Sequence[Sequence[str]]):
        self.model, self.images, self.names = model, images, names
        self.results: dict[int, Result] = {}
        self.flow = model.compute_settings.flow().on(model.clip.device)
        if len(images) == 1:  # compute in the calling thread, with all of PyTorch's threads
            self.flow = replace(self.flow, threads=0, decode_workers=0, write_workers=0)
        for prompts in names:  # encode all prompts now: `features` is not thread-safe
            model.features([*model.prompts(prompts), *model.backgrounds])

    def decode(self, index: int) -> LabeledImage:
        image, settings, names = to_pillow(self.images[index]), self.model.settings, self.names[index]
        return LabeledImage(
            index,
            class_ids=list(range(len(names))),
            size=(image.height, image.width),
            views=resized_views(image, Grid.of(self.model.clip), settings.cam_scales, settings.max_patches),
            image=np.asarray(image.convert("RGB")),
            # All images of a batch must have the same backgrounds, which depend on their labels.
            group=tuple(name for name in self.model.backgrounds if name not in names),
        )

    def decoder(self) -> Callable:
        return self.decode

    def batch_size(self, decoded: LabeledImage) -> int:
        clip, views = self.model.clip, 1 + self.model.settings.flip
        return images_that_fit(clip, decoded.patches(clip), self.flow.threads, views)

    def compute(self, batch: list[LabeledImage]) -> list[dict[str, np.ndarray]]:
        model = self.model
        return batch_cams(
            model.clip,
            [decoded.views for decoded in batch],
            [model.features(model.prompts(self.names[decoded.name])) for decoded in batch],
            model.features(batch[0].group),
            model.settings,
            model.affinity,
        )

    def write(self, decoded: LabeledImage, cams: dict[str, np.ndarray]) -> None:
        settings, size = self.model.mask_settings, decoded.size
        has_background = self.model.benchmark.has_background
        grid = cams[self.model.settings.cam_type]  # (K, h, w)
        full = camfile.resize(grid, size).astype(np.float16)
        image = shrunk(decoded.image, settings.crf_max_pixels)
        sized = full
        if image.shape != decoded.image.shape:
            sized = camfile.resize(grid, image.shape[:2]).astype(np.float16)
        device = str(self.model.clip.device)
        posterior = crf_posterior(image, sized, settings, has_background, device)
        values = np.arange(len(posterior), dtype=np.uint8)
        mask = resize_mask(posterior_labels(posterior, values, settings.confidence), size)
        if sized is not full:
            posterior = camfile.resize(posterior, size)
        names = self.names[decoded.name]
        self.results[decoded.name] = Result(names, mask, posterior, decoded.image, full, has_background)
