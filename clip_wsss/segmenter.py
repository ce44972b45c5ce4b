"""A trained network: masks of images without labels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_wsss.images import ImageLike, as_list, split_settings, to_pillow
from clip_wsss.result import Result
from deeplab.recipe import RECIPE as DEEPLAB
from pipeline.run import read_settings
from segmentation.checkpoints import FINAL
from training import segmenter as trained
from training.config import CONFIG, TestConfig, read
from training.segmenter import Setup

RECIPES = {"deeplab.train": DEEPLAB}  # step recorded in the run folder -> recipe


class Segmenter:
    """A trained network, loaded from the folder of its training run.

        result = Segmenter("output/voc12/deeplab")("photo.jpg")

    Args:
        run: run folder of `python -m deeplab.train`.
        checkpoint: file of weights; None: the final weights of the run.
        precision: number type of the network's matrix products, one of `segmentation.inference.PRECISIONS`.
        device: "auto", "cpu", "cuda" or "cuda:i".
        settings: any field of `TestConfig`: scales, flip, crf; the defaults are the settings of the run.

    Raises:
        FileNotFoundError, ValueError: the run does not exist, or a setting is outside its range.
        TypeError: a setting does not exist.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        checkpoint: str | Path | None = None,
        precision: str = "fp32",
        device: str = "auto",
        **settings: Any,
    ):
        (test,) = split_settings("Segmenter", settings, TestConfig)
        recipe = RECIPES.get(read_settings(run).get("step", ""))
        if recipe is None:
            raise ValueError(f"{run} is not the folder of a training run: give the run.output of a training")
        config = read(recipe.config, Path(run) / CONFIG)
        config.test = replace(config.test, **test)
        setup = Setup(recipe, config, str(checkpoint or Path(run) / FINAL), precision, device)
        self.benchmark = setup.benchmark
        self.network = trained.Segmenter(setup)

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Result | list[Result]:
        """Segment one image, or several.

        Args:
            images: path, Pillow image or (H, W, 3) uint8 array; or a list of them.

        Returns:
            A `Result`; a list of them for a list of images.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read.
            TypeError: images have another type.
        """
        image_list, single = as_list(images)
        results = [self._segment(np.asarray(to_pillow(image).convert("RGB"))) for image in image_list]
        return results[0] if single else results

    def _segment(self, image: np.ndarray) -> Result:
        segmented = self.network(image)
        mask = self.network.labels(image, segmented)
        benchmark, posterior = self.benchmark, segmented.probabilities.cpu().numpy()
        return Result(
            benchmark.classes, mask, posterior, image, None, benchmark.has_background, benchmark.palette
        )
