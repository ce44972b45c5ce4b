"""Inputs of the benchmarks: random JPEGs, labels, masks and CAMs."""

import io
import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pipeline.cams import store_files
from segmentation import camfile
from segmentation.benchmark import IGNORE, voc_palette
from segmentation.masks import write_mask

HEIGHT, WIDTH = 375, 500  # most frequent image size in VOC
GRID = (24, 32)  # number of its patches of 16 x 16 pixels
CLASSES = 20
DISTINCT = 64  # number of different images; further images repeat them
SHAPES = 20  # ellipses per image


def scene(random: np.random.Generator) -> bytes:
    """Return a random JPEG. Decoding, resizing and a dense CRF take as long for it as for a photograph.

    It shows ellipses of one color each, under slowly varying light, and texture in some places.
    """
    pixels = _waves(random, 2, 12, 3)
    for _ in range(SHAPES):
        center = (int(random.integers(WIDTH)), int(random.integers(HEIGHT)))
        axes = (int(random.integers(20, 120)), int(random.integers(20, 120)))
        shape = np.zeros((HEIGHT, WIDTH), np.uint8)
        cv2.ellipse(shape, center, axes, float(random.integers(180)), 0, 360, 1, -1)
        pixels[shape > 0] = random.normal(0, 60, 3)
    for level in (3, 4, 5):  # half the size, half the amplitude
        pixels += _waves(random, level, 50 / 2**level, 1)
    texture = _waves(random, 7, 40, 1) + random.normal(0, 40, (HEIGHT, WIDTH, 1)).astype(np.float32)
    places = cv2.resize(random.random((6, 8), np.float32), (WIDTH, HEIGHT))
    pixels += texture * places[..., None] ** 2
    stream = io.BytesIO()
    image = Image.fromarray(np.clip(pixels + 120, 0, 255).astype(np.uint8))
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _waves(random: np.random.Generator, level: int, amplitude: float, channels: int) -> np.ndarray:
    """Return noise (H, W, channels) float32 with 2 ** (level + 1) random values along the longer side."""
    size = (3 * 2 ** (level - 1), 4 * 2 ** (level - 1), channels)
    coarse = random.normal(0, amplitude, size).astype(np.float32)
    smooth = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return smooth.reshape(HEIGHT, WIDTH, channels)


def labels_of(index: int, mean: float) -> list[int]:
    """Return the classes of image `index`; consecutive images have about `mean` of them on average."""
    count = math.floor((index + 1) * mean) - math.floor(index * mean)
    return [(3 * index + 7 * label) % CLASSES for label in range(count)]


def write_images(folder: Path, count: int, mean: float) -> list[str]:
    """Write `count` JPEGs and their labels, `labels.txt`; return the names."""
    random = np.random.default_rng(0)
    names = [f"{index:06}" for index in range(count)]
    encoded = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        file = folder / "images" / f"{name}.jpg"
        if index < DISTINCT:
            encoded.append(scene(random))
        file.write_bytes(encoded[index % DISTINCT])
    lines = (
        f"{name} {' '.join(map(str, labels_of(index, mean)))}\n" for index, name in enumerate(names)
    )
    (folder / "labels.txt").write_text("".join(lines))
    return names


def random_cams(random: np.random.Generator, labels: int) -> np.ndarray:
    """Return random CAMs (K, h, w) float32 in [0, 1] on the patch grid, with a few smooth maxima each."""
    noise = random.random((labels, *GRID), np.float32)
    smooth = np.stack([cv2.GaussianBlur(plane, (0, 0), 2.5) for plane in noise])
    smooth -= smooth.min((1, 2), keepdims=True)
    return smooth / smooth.max((1, 2), keepdims=True)


def write_cams(folder: Path, count: int, mean: float) -> list[str]:
    """Write CAM files (folders `compact` and `full`) and ground truth (folder `truth`); return the names.

    The CAMs agree with the ground truth on more than half of the pixels.
    """
    random = np.random.default_rng(0)
    names = [f"{index:06}" for index in range(count)]
    for index, name in enumerate(names):
        class_ids = labels_of(index, mean)
        maps = random_cams(random, len(class_ids))
        for format, suffix in camfile.FORMATS.items():
            content = camfile.encode(class_ids, {"attn_highres": maps}, (HEIGHT, WIDTH), format)
            store_files(folder / format, name, {suffix: content})
        best = camfile.resize(maps, (HEIGHT, WIDTH))
        best = np.concatenate([np.full((1, HEIGHT, WIDTH), 0.55, np.float32), best])
        truth = np.append(0, np.add(class_ids, 1))[best.argmax(0)].astype(np.uint8)
        edges = cv2.morphologyEx(truth, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8))
        truth[edges > 0] = IGNORE
        write_mask(folder / "truth" / f"{name}.png", truth, voc_palette())
    return names
