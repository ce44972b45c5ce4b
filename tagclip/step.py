"""Tagging as a step of the pipeline: image files -> files of scores."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from foundation.files import DiskFull
from foundation.logs import log
from pipeline.compute import ComputeSettings, images_that_fit
from pipeline.decode import Grid, shrunk_notes
from pipeline.label_scores import read_scores, write_scores
from pipeline.processes import Outcome
from pipeline.step import Decoded, Step
from segmentation.benchmark import Benchmark
from segmentation.images import find_image, read_image
from tagclip.config import TagSettings
from tagclip.model import TEMPLATES, Tagger, network_pixels

PERIOD = 30.0  # seconds between two files of scores: a killed run loses at most this much work


@dataclass
class Resized(Decoded):
    """A decoded image (H', W', 3) uint8, and its number of patches.

    Images of similar size share a batch, because their crops can be computed together, see `tag_images`.
    """

    pixels: np.ndarray
    patches: int

    @property
    def shape(self) -> str:
        """Key of a batch: patches differ by a factor of up to 2, memory of the attention by up to 4."""
        return f"up to {2 ** (self.patches - 1).bit_length()} patches"

    @property
    def cost(self) -> int:
        return self.patches


def decode(image_root: str, grid: Grid, max_patches: int, name: str) -> Resized:
    """Return the resized pixels of an image; also called in decoding processes."""
    image = read_image(find_image(image_root, name))
    pixels = network_pixels(image, grid.patch, max_patches)
    notes = shrunk_notes(image, grid, 1.0, max_patches)
    return Resized(name, pixels, math.prod(pixels.shape[:2]) // grid.patch**2, notes=notes)


@dataclass
class TagStep(Step):
    """Step 0, see `pipeline.step.Step`. Writes a new file of scores every `PERIOD` seconds and at the end.

    Attributes:
        benchmark: contains the names of the classes and backgrounds.
        image_root: folder of the images.
        model: see `clip.load`.
        output: folder of the scores.
    """

    benchmark: Benchmark
    image_root: str
    model: str
    output: str
    settings: TagSettings = field(default_factory=TagSettings)
    compute_settings: ComputeSettings = field(default_factory=ComputeSettings)

    def __post_init__(self):
        self.flow = self.compute_settings.flow()
        self.scored: dict[str, np.ndarray] | None = None  # scores of earlier runs; None before they are read
        self.unsaved: dict[str, np.ndarray] = {}

    @property
    def templates(self) -> list[str]:
        """The prompt templates of the names."""
        return self.benchmark.tag_templates or list(TEMPLATES)

    def is_done(self, name: str) -> bool:
        if self.scored is None:
            self.scored = read_scores(self.output, len(self.benchmark.classes))
        return name in self.scored

    def start(self, worker_index: int) -> None:
        self.clip = self.compute_settings.load(self.model, self.settings.round_weights, worker_index)
        classes, backgrounds = self.benchmark.classes, self.benchmark.tag_backgrounds
        self.tagger = Tagger(self.clip, classes, backgrounds, self.templates, self.settings)
        self.clip.forget_text_tower()
        self.flow = self.flow.on(self.clip.device)
        self.saved = time.monotonic()

    def decoder(self) -> Callable[[str], Resized]:
        return partial(decode, self.image_root, Grid.of(self.clip), self.settings.max_patches)

    def batch_size(self, decoded: Resized) -> int:
        return images_that_fit(self.clip, decoded.patches, self.flow.threads)

    def compute(self, batch: list[Resized]) -> list[np.ndarray]:
        return [tags.scores for tags in self.tagger.tag([decoded.pixels for decoded in batch])]

    def write(self, decoded: Resized, scores: np.ndarray) -> list[str]:
        self.unsaved[decoded.name] = scores
        return decoded.notes

    def outcomes(self, names: Sequence[str]) -> Iterator[Outcome]:
        for outcome in super().outcomes(names):
            if time.monotonic() - self.saved > PERIOD:
                self.saved = time.monotonic()
                try:
                    self.finish()
                except DiskFull:
                    raise
                except OSError as error:  # it may be temporary, on a network drive for example
                    log.warning("%s; the scores are kept in memory and written later", error)
            yield outcome

    def finish(self) -> None:
        """Write the scores that are not yet written. If that fails, they remain to be written."""
        scores = {}
        while self.unsaved:  # not a loop over items: other threads may add items during it
            name, values = self.unsaved.popitem()
            scores[name] = values
        if scores:
            try:
                write_scores(self.output, scores)
            except BaseException:
                self.unsaved.update(scores)
                raise
