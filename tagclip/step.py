"""Tagging as a step of the pipeline: image files -> shards of scores."""

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np

import clip
from pipeline.cams import grid_of, images_that_fit
from pipeline.decode import Grid, shrunk_notes
from pipeline.flow import FlowSettings, flow
from pipeline.processes import Outcome, device_of, failed
from segmentation.benchmark import Benchmark
from segmentation.images import find_image, read_image
from tagclip.config import TagSettings
from tagclip.model import Tagger, network_pixels
from tagclip.scores import read_scores, write_scores
from tagclip.templates import TEMPLATES

PERIOD = 30.0  # seconds of work that a killed run loses at most


@dataclass(frozen=True)
class TagJob:
    """Everything a process needs to tag images; pickled when there are several.

    Attributes:
        benchmark: its classes, and what tagging tells them from.
        image_root: folder of the images.
        model, device, precision, round_weights: see `clip.load`. The public code rounds no weights.
        output: folder of the shards.
    """

    benchmark: Benchmark
    image_root: str
    model: str
    device: str
    precision: str
    round_weights: bool
    output: str
    settings: TagSettings
    flow: FlowSettings = field(default_factory=FlowSettings)

    @property
    def templates(self) -> list[str]:
        """The prompts that names are read in."""
        return self.benchmark.tag_templates or list(TEMPLATES)


def generate(names: Sequence[str], position: int, job: TagJob) -> Generator[Outcome, None, None]:
    """Score the images that no shard has yet; see `pipeline.processes`.

    What is scored goes to a new shard every `PERIOD` seconds, and when the work ends, also by an error, or by
    Ctrl-C in this process.
    """
    scored = read_scores(job.output, len(job.benchmark.classes))
    missing = []
    for name in names:
        if name in scored:
            yield Outcome(name)
        else:
            missing.append(name)
    if not missing:  # and no model is needed
        return
    step = TagStep(job, position)
    saved = time.monotonic()
    try:
        for outcome in flow(missing, step.decoder(), step, step.flow):
            if time.monotonic() - saved > PERIOD:
                step.save()
                saved = time.monotonic()
            yield outcome
    finally:
        step.save()


@dataclass
class Resized:
    """A decoded image, see `pipeline.flow.Decoded`. Those of like size share a batch: `tag_images` computes
    equal ones at once, and the crops of all.

    Attributes:
        pixels: (H', W', 3) uint8.
        notes: what is worth counting.
        patches: how many it has.
    """

    name: str
    pixels: np.ndarray
    notes: list[str]
    patches: int

    @property
    def shape(self) -> str:
        """Such images need up to twice the memory of each other, squared for attention."""
        return f"up to {2 ** (self.patches - 1).bit_length()} patches"

    @property
    def cost(self) -> int:
        return self.patches


@dataclass(frozen=True)
class Decoder:
    """Image name -> resized pixels; pickled for decoding processes."""

    image_root: str
    grid: Grid
    max_patches: int

    def __call__(self, name: str) -> Resized | Outcome:
        try:
            image = read_image(find_image(self.image_root, name))
            pixels = network_pixels(image, self.grid.patch, self.max_patches)
            notes = shrunk_notes(image, self.grid, 1.0, self.max_patches)
            return Resized(name, pixels, notes, math.prod(pixels.shape[:2]) // self.grid.patch**2)
        except Exception as error:  # one bad image never loses a run
            return failed(name, error)


class TagStep:
    """Tagging with one model, see `pipeline.flow.Step`.

    Args:
        job: see there.
        position: of this process, see `pipeline.processes`.
    """

    def __init__(self, job: TagJob, position: int):
        self.job = job
        self.model = clip.load(job.model, device_of(job.device, position), job.precision, job.round_weights)
        classes, backgrounds = job.benchmark.classes, job.benchmark.tag_backgrounds
        self.tagger = Tagger(self.model, classes, backgrounds, job.templates, job.settings)
        self.model.forget_text_tower()
        self.flow = job.flow.on(self.model.device)
        self.unsaved: dict[str, np.ndarray] = {}

    def decoder(self) -> Decoder:
        return Decoder(self.job.image_root, grid_of(self.model), self.job.settings.max_patches)

    def batch_size(self, decoded: Resized) -> int:
        """See `pipeline.cams.CamStep.batch_size`."""
        if self.model.device.type == "cpu":
            return 1
        return images_that_fit(self.model, decoded.patches, self.flow.threads)

    def compute(self, batch: list[Resized]) -> list[np.ndarray]:
        return [tags.scores for tags in self.tagger.tag([decoded.pixels for decoded in batch])]

    def write(self, decoded: Resized, scores: np.ndarray) -> list[str]:
        self.unsaved[decoded.name] = scores
        return decoded.notes

    def save(self) -> None:
        """Write what was scored since the last time."""
        scores = {}
        while self.unsaved:  # which other threads go on filling
            name, values = self.unsaved.popitem()
            scores[name] = values
        if scores:
            write_scores(self.job.output, scores)
