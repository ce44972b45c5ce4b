"""Frozen CLIP: checkpoints, image and text towers, prompts, image preprocessing."""
from clip.checkpoint import PRECISIONS, load, pick_device
from clip.images import normalize, preprocess, resize_rgb, target_size
from clip.model import CLIP, Config
from clip.prompts import encode_prompts, text_features
from clip.tokenizer import tokenize

__all__ = [
    "CLIP",
    "PRECISIONS",
    "Config",
    "encode_prompts",
    "load",
    "normalize",
    "pick_device",
    "preprocess",
    "resize_rgb",
    "target_size",
    "text_features",
    "tokenize",
]
