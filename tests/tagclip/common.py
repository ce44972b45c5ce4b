"""Shared by the tests of tagging: golden vectors, and the model and images with which they were made."""

from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import clip
from clip.model import CLIP
from tagclip.config import COCOSTUFF, TagSettings
from tests import conftest, weights

golden = partial(conftest.golden, system="tagclip")
NAMES = golden("classes.json")
STUFF = [entry["name"] for entry in NAMES["coco_stuff"]]

#: Set of golden vectors -> (number of classes, names, settings).
SETS = {
    "voc": (20, NAMES["voc"] + NAMES["voc_background"], TagSettings()),
    "coco": (80, NAMES["coco"] + NAMES["coco_background"], TagSettings()),
    "stuff": (171, STUFF, COCOSTUFF),
}

#: Image -> (H, W).
IMAGES = {
    "tagclip-0": (32, 48),
    "tagclip-1": (50, 33),
    "tagclip-2": (97, 130),
    "tagclip-3": (160, 112),
    "tagclip-4": (64, 64),
    "tagclip-5": (224, 224),
    "tagclip-6": (16, 64),
    "tagclip-7": (33, 100),
    "tagclip-8": (50, 70),  # gray
}

TINY12 = dict(weights.PRESETS["tiny"], image_resolution=224, vision_layers=12)
PLAIN = {"voc": TagSettings(affinity_layers=1, votes=4, crop_size=224),
         "stuff": TagSettings(affinity_layers=None, votes=4, crop_size=224, ratio=0.1)}  # fmt: skip


def image(name: str, size: tuple[int, int] | None = None) -> Image.Image:
    pixels = weights.parity_image(name, *(size or IMAGES[name]))
    return Image.fromarray(pixels[..., 0] if name == "tagclip-8" else pixels)


def resized(image: Image.Image, patch: int = 16) -> np.ndarray:
    """Return the input of the network, (H', W', 3) uint8."""
    return clip.resize_rgb(image, clip.target_size(image.height, image.width, patch))


def write_model(file: Path, preset="tiny12") -> Path:
    state = weights.clip_state_dict(TINY12 if preset == "tiny12" else preset, 0)
    torch.save({key: torch.as_tensor(value) for key, value in state.items()}, file)
    return file


def model_of(config: dict | str, folder: Path) -> CLIP:
    return clip.load(write_model(folder / "model.pt", config), "cpu", round_weights=False)


@cache
def model(folder: Path, preset="tiny12") -> CLIP:
    return model_of(preset, folder)
