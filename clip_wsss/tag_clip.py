"""TagCLIP: predict the classes in an image with a frozen CLIP, without annotation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from clip.model import CLIP
from clip_wsss.images import ImageLike, as_list, check_names, split_settings, to_pillow
from pipeline.compute import ComputeSettings
from segmentation import benchmark as benchmarks
from tagclip import Tagger, Tags, TagSettings
from tagclip.classify import default_settings
from tagclip.model import TEMPLATES


class TagCLIP:
    """TagCLIP (Lin et al., AAAI 2024) with one model and one list of classes.

        tagger = TagCLIP("ViT-B/16", ["cat", "dog", "sofa"])
        tags = tagger("photo.jpg")
        tagger.names(tags)  # ["cat", "sofa"]
        tags.scores         # (3,) float32

    Args:
        model: checkpoint file, name of an OpenAI model or open_clip model:tag, see `clip.load`; or a loaded
            CLIP.
        classes: names that are scored; None: the classes of the benchmark.
        benchmark: name or YAML file. It gives the default classes, backgrounds and templates.
        backgrounds: further names, which compete with the classes but get no score; None: the benchmark's.
        settings: any field of `TagSettings` and `ComputeSettings`, such as ratio=0.4, device="cuda".

    Raises:
        FileNotFoundError, ValueError: the model does not exist, or a setting is outside its range.
        TypeError: a setting does not exist.
    """

    def __init__(
        self,
        model: str | CLIP = "ViT-B/16",
        classes: Sequence[str] | None = None,
        *,
        benchmark: str = "voc12",
        backgrounds: Sequence[str] | None = None,
        **settings: Any,
    ):
        data = benchmarks.load(benchmark)
        tag, compute = split_settings("TagCLIP", settings, TagSettings, ComputeSettings)
        self.settings = replace(default_settings(data), **tag)
        compute_settings = ComputeSettings(**compute)
        if not isinstance(model, CLIP):
            model = compute_settings.load(model, self.settings.round_weights)
        self.classes = check_names(data.classes if classes is None else classes, "classes")
        others = check_names(data.tag_backgrounds if backgrounds is None else backgrounds, "backgrounds")
        others = [name for name in others if name not in self.classes]
        templates = data.tag_templates or TEMPLATES
        self.tagger = Tagger(model, self.classes, others, templates, self.settings)

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Tags | list[Tags]:
        """Tag one image, or several.

        Args:
            images: path, Pillow image or (H, W, 3) uint8 array; or a list of them.

        Returns:
            `Tags`; a list of them for a list of images.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read or computed.
            TypeError: images have another type.
        """
        image_list, single = as_list(images)
        tags = [self.tagger(to_pillow(image)) for image in image_list]
        return tags[0] if single else tags

    def names(self, tags: Tags) -> list[str]:
        """Return the names of the predicted classes, at least one."""
        return self.tagger.names(tags)
