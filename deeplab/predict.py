"""Segment pictures of one's own: python -m deeplab.predict --help"""

import argparse
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import replacing
from deeplab.trained import Segmenter, Setup, add_flags, read_setup, record
from pipeline.flags import HelpFormatter, count, workers
from pipeline.masks import at_size
from pipeline.processes import Outcome, attempt
from pipeline.run import Run, check_folder, command, read_settings
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.distributed import together
from segmentation.images import image_files, read_rgb
from segmentation.inference import resize_by
from segmentation.masks import overlay, write_mask

SIZE = 513  # longer side that an image is brought to; deeplab-pytorch's demo
OPACITY = 0.5  # of the classes over the picture; the same demo's
MASKS, OVERLAYS = "masks", "overlays"  # folders of the output
TEXT, SWATCH, MARGIN, ROW = 15, 14, 8, 24  # pixels of the legend


@dataclass(frozen=True)
class Prediction:
    """What is predicted; pickled when there are several processes.

    Attributes:
        setup: the network.
        output: folder of the masks and overlays.
        size: see `predict`.
    """

    setup: Setup
    output: str
    size: int = SIZE


def predict(segmenter: Segmenter, image: np.ndarray, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Segment a picture, after the dense CRF if the setup has one.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: the longer side it is resized to; 0 leaves it as it is.

    Returns:
        The picture (h, w, 3) uint8 that was segmented, and its labels (h, w) uint8.
    """
    if size:
        image = resize_by(image, size / max(image.shape[:2]))
    segmented = segmenter(image)
    if segmenter.setup.crf:
        return image, segmenter.crf_labels(image, segmented.probabilities)
    return image, segmented.labels


def predict_images(files: Sequence[str], position: int, job: Prediction) -> Generator[Outcome, None, None]:
    """Write mask and overlay of each image file; see `pipeline.processes`."""
    segmenter, benchmark = Segmenter(job.setup, position), job.setup.benchmark

    def make(file: str) -> None:
        image, name = read_rgb(file), Path(file).stem
        shown, labels = predict(segmenter, image, job.size)
        mask = at_size(labels, image.shape[:2])
        write_mask(Path(job.output) / MASKS / f"{name}.png", mask, benchmark.palette)
        with replacing(Path(job.output) / OVERLAYS / f"{name}.png") as stream:
            Image.fromarray(explained(shown, labels, benchmark)).save(stream, format="PNG")

    for file in files:
        yield attempt(file, make)


def explained(image: np.ndarray, labels: np.ndarray, benchmark: Benchmark) -> np.ndarray:
    """A picture with its classes painted over it, outlined in their colours, and their names below.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8.

    Returns:
        (H + legend, W or what the longest name needs, 3) uint8 RGB.
    """
    clear = [0, IGNORE] if benchmark.has_background else [IGNORE]
    painted = overlay(image, labels, benchmark.palette, OPACITY, clear)
    square = np.ones((3, 3), np.uint8)
    edge = (cv2.dilate(labels, square) != cv2.erode(labels, square)) & ~np.isin(labels, clear)
    painted[edge] = benchmark.palette[labels[edge]]  # the legend's colours, which paint over colours is not
    classes = ["background"] * benchmark.has_background + list(benchmark.classes)
    found = [index for index in np.unique(labels) if index not in clear]
    entries = [(classes[index], tuple(benchmark.palette[index].tolist())) for index in found]
    return with_legend(painted, entries or [("nothing but background", (255, 255, 255))])


def with_legend(image: np.ndarray, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> np.ndarray:
    """A picture (H, W, 3) uint8 with rows of coloured squares and names below, on white."""
    font = ImageFont.load_default(TEXT)
    widths = [round(font.getlength(name)) + SWATCH + 3 * MARGIN for name, _ in entries]
    height, width = image.shape[0], max(image.shape[1], *(entry + MARGIN for entry in widths))
    places, x, y = [], MARGIN, height + MARGIN
    for entry in widths:
        if x + entry > width and x > MARGIN:  # the next row
            x, y = MARGIN, y + ROW
        places.append((x, y))
        x += entry
    canvas = Image.new("RGB", (width, y + ROW), "white")
    canvas.paste(Image.fromarray(image))
    draw = ImageDraw.Draw(canvas)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y, x + SWATCH, y + SWATCH), fill=colour, outline=(120, 120, 120))
        draw.text((x + SWATCH + MARGIN, y + SWATCH / 2), name, "black", font, anchor="lm")
    return np.asarray(canvas)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deeplab.predict",
        description="Segment pictures: an index mask of each, and the picture with its classes painted over.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", help="an image, or a folder of images")
    add_flags(parser)
    flag = parser.add_argument_group("what is made").add_argument
    flag("--out", metavar="DIR", help="folder for masks/<name>.png, which have the size of the image, and "
         "overlays/<name>.png (without it: `predict` in the run's folder)")  # fmt: skip
    flag("--size", type=workers, default=SIZE, help="longer side that images are resized to before the "
         "network sees them; 0 leaves them as they are")  # fmt: skip
    flag("--num_workers", type=count, default=1, help="processes; with several GPUs they take turns")
    args = parser.parse_intermixed_args(arguments)
    if not (args.out or args.run):
        parser.error("give --out DIR for the pictures")
    with together():
        files = image_files(args.images)
        job = Prediction(read_setup(args), args.out or str(Path(args.run) / "predict"), args.size)
        arguments = _settings(job, files)
    run = Run(job.output, **arguments)
    run.map(predict_images, files, job, num_workers=args.num_workers)
    code = run.finish()
    if run.rank == 0:
        print(f"{Path(job.output) / MASKS}, {Path(job.output) / OVERLAYS}")
    return code


def _settings(job: Prediction, files: Sequence[str]) -> dict[str, Any]:
    """What the run records of itself (arguments of `Run`), if its folder may be taken.

    Raises:
        ValueError: the folder holds the images themselves, or what others made.
    """
    own = {(Path(job.output) / folder / f"{Path(file).stem}.png").resolve()
           for folder in (MASKS, OVERLAYS) for file in files}  # fmt: skip
    if own & {Path(file).resolve() for file in files}:
        raise ValueError(f"the images themselves would be replaced in {job.output}: give another --out")
    found = record(job.setup)
    found["settings"] |= {"crf": job.setup.crf, "size": job.size}
    mine = read_settings(job.output)  # else what lies in such folders there is not to be replaced
    outputs = () if mine else (f"{MASKS}/*.png", f"{OVERLAYS}/*.png")
    arguments = {**found, "outputs": outputs, "overwrite": False, "step": "deeplab.predict"}
    check_folder(job.output, **arguments)
    return arguments


if __name__ == "__main__":
    command(main, again="the same command starts anew")
