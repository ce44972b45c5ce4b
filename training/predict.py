"""Command `predict` of a method: masks and overlays for images without labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from foundation.cli import Parser
from foundation.files import replacing
from foundation.settings import add_flags, count, given, setting
from pipeline.masks import resize_mask
from pipeline.run import Record, Run, check_folder, read_settings
from pipeline.step import Decoded, Step
from segmentation.distributed import together
from segmentation.figures import labeled_overlay
from segmentation.images import image_files, read_rgb
from segmentation.inference import resize_by
from segmentation.masks import write_mask
from training.recipe import Recipe
from training.segmenter import Segmenter, Setup, add_network_flags, read_setup

AGAIN = "the same command starts from the beginning"
SIZE = 513  # longer side that an image is resized to, as in deeplab-pytorch's demo
MASKS, OVERLAYS = "masks", "overlays"  # subfolders of the output folder


@dataclass
class DecodedFile(Decoded):
    """An image file, `name`, and its pixels (H, W, 3) uint8 RGB."""

    image: np.ndarray


@dataclass
class Prediction(Step):
    """Step 3c: segments image files, see `pipeline.step.Step`.

    Attributes:
        setup: the network and how it is applied.
        output: folder of the masks and overlays.
        size: see `predict`.
    """

    setup: Setup
    output: str
    size: int = setting(SIZE, "longer side, in pixels, that images are resized to for the network; 0 keeps "
                        "their size", least=0)  # fmt: skip

    def files(self, image_file: str) -> dict[str, Path]:
        """Return subfolder -> output file of an image file."""
        name = f"{Path(image_file).stem}.png"
        return {folder: Path(self.output) / folder / name for folder in (MASKS, OVERLAYS)}

    def start(self, worker_index: int) -> None:
        self.segmenter = Segmenter(self.setup, worker_index)

    def decode(self, file: str) -> DecodedFile:
        return DecodedFile(file, read_rgb(file))

    def compute(self, batch: list[DecodedFile]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the result of `predict` for each image."""
        return [predict(self.segmenter, decoded.image, self.size) for decoded in batch]

    def write(self, decoded: DecodedFile, result: tuple[np.ndarray, np.ndarray]) -> None:
        (resized, labels), files, benchmark = result, self.files(decoded.name), self.setup.benchmark
        write_mask(files[MASKS], resize_mask(labels, decoded.image.shape[:2]), benchmark.palette)
        names = ["background"] * benchmark.has_background + list(benchmark.classes)
        figure = labeled_overlay(resized, labels, names, benchmark.palette, benchmark.has_background)
        with replacing(files[OVERLAYS]) as stream:
            Image.fromarray(figure).save(stream, format="PNG")


def predict(segmenter: Segmenter, image: np.ndarray, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return the resized image (h, w, 3) uint8 RGB and its labels (h, w) uint8.

    If the setup has a dense CRF, the labels are those after the CRF.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: longer side to resize to, in pixels; 0 keeps the image's size.
    """
    if size:
        image = resize_by(image, size / max(image.shape[:2]))
    return image, segmenter.labels(image, segmenter(image))


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        prog=f"python -m {recipe.name}.predict",
        description="Segment your own images: write an index mask and an overlay of classes for each image.",
    )
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", help="an image, or a folder of images")
    add_network_flags(parser, recipe)
    group = parser.add_argument_group("outputs")
    add_flags(group, Prediction)
    flag = group.add_argument
    flag("--output", "--out", metavar="DIR", help="folder for masks/<name>.png, at the size of the image, "
         "and overlays/<name>.png (default: `predict` in the run folder)")  # fmt: skip
    flag("--num_workers", type=count, default=1, help="number of processes, which are divided among the GPUs")
    args = parser.parse_intermixed_args(arguments)
    if not (args.output or args.run):
        parser.error("give --output DIR for the masks and overlays")
    with together():
        files = image_files(args.images)
        output = args.output or str(Path(args.run) / "predict")
        step = Prediction(read_setup(recipe, args), output, **given(Prediction, args))
        record = check_output(step, files)
    run = Run(step.output, record)
    run.map(step, files, num_workers=args.num_workers)
    code = run.finish()
    if run.rank == 0:
        print(f"{Path(step.output) / MASKS}, {Path(step.output) / OVERLAYS}")
    return code


def check_output(step: Prediction, image_files: Sequence[str]) -> Record:
    """Return the record of the run. Raise ValueError if the output folder contains the input images or
    files of unknown origin."""
    outputs = {output.resolve() for file in image_files for output in step.files(file).values()}
    if outputs & {Path(file).resolve() for file in image_files}:
        raise ValueError(f"--output: the images in {step.output} would be replaced: give another folder")
    settings, inputs = step.setup.record()
    settings |= {"crf": step.setup.crf, "size": step.size}
    # This command always computes all images again, so it may replace its own earlier outputs. It may not
    # replace files of unknown origin.
    patterns = () if read_settings(step.output) else (f"{MASKS}/*.png", f"{OVERLAYS}/*.png")
    record = Record(f"{step.setup.recipe.name}.predict", settings, inputs, patterns)
    check_folder(step.output, record)
    return record
