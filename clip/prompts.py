"""Class names -> text features, computed once per model and class list and cached on disk."""
import hashlib
import io
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip.model import CLIP
from clip.tokenizer import tokenize
from foundation.files import replacing
from foundation.logs import log
from foundation.untrusted import parse_npy

PROMPTS_PER_BATCH = 256
DIGEST_BYTES = 32  # sha256


@torch.no_grad()
def encode_prompts(model: CLIP, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return class features (N, E) float32.

    The feature of each filled template is normalized; their mean over templates is normalized again.

    Args:
        names: N class names as used in the prompts.
        templates: texts with one `{}`, which is replaced by the class name.

    Raises:
        ValueError: a filled template has more tokens than the model's context, or a feature is not finite.
    """
    texts = [template.format(name) for name in names for template in templates]
    tokens = tokenize(texts, model.config.context_length).to(model.device)
    features = torch.cat([model.encode_text(batch) for batch in tokens.split(PROMPTS_PER_BATCH)])
    features = F.normalize(features.float(), dim=-1)
    features = features.view(len(names), len(templates), features.shape[-1])  # (N, T, E)
    features = F.normalize(features.mean(1), dim=-1)
    valid = are_unit_vectors(features)
    if not valid.all():
        name = names[int(valid.int().argmin())]
        raise ValueError(
            f"the text feature of {name!r} is 0 or not finite: use an undamaged checkpoint"
        )
    return features


def are_unit_vectors(features: Tensor) -> Tensor:
    """Return (N,) bool: whether the features (N, E) are finite and have the length 1, up to rounding."""
    return (features.norm(dim=-1) - 1).abs() < 1e-3


def text_features(model: CLIP, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the result of `encode_prompts`, cached on disk.

    The environment variable CLIP_WSSS_CACHE names the cache folder; the default is ~/.cache/clip-wsss.
    """
    recipe = json.dumps([fingerprint(model), list(templates), list(names)])
    folder = cache_folder()
    file = folder and folder / f"text-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.npy"
    features = _read(file, (len(names), model.config.embed_dim)) if file else None
    if features is None:
        features = encode_prompts(model, names, templates)
        with suppress(OSError):  # if the cache is not writable, nothing is cached
            if file:
                _write(file, features.cpu().numpy())
    return features.to(model.device)


def cache_folder() -> Path | None:
    """Return the folder of the cache, see `text_features`; None if the user has no home folder."""
    if folder := os.environ.get("CLIP_WSSS_CACHE"):
        return Path(folder)
    try:
        return Path.home() / ".cache" / "clip-wsss"
    except RuntimeError:
        return None


def _read(file: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return the features (N, E) in a file; None if there is none, or if it is damaged."""
    try:
        with open(file, "rb") as stream:
            content = stream.read(4 * shape[0] * shape[1] + 2**16)  # a larger file is damaged
    except OSError:
        return None
    with suppress(ValueError):
        array, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if hashlib.sha256(array).digest() != digest:
            raise ValueError("it has no sha256 of its content")
        features = parse_npy(array)
        if features.dtype != np.float32 or features.shape != shape:
            raise ValueError("it has other features")
        features = torch.from_numpy(features)
        if are_unit_vectors(features).all():
            return features
    log.info("%s is damaged or was written by an earlier version: the text features are computed again", file)
    return None


def _write(file: Path, features: np.ndarray) -> None:
    """Write features as an .npy file, and the sha256 of its content after it, which `numpy.load` ignores."""
    stream = io.BytesIO()
    np.save(stream, features)
    with replacing(file) as target:
        target.write(stream.getvalue() + hashlib.sha256(stream.getvalue()).digest())


def fingerprint(model: CLIP) -> str:
    """Return the sha256 of the model's configuration and of the text tower's weights in memory."""
    digest = hashlib.sha256(repr(model.config).encode())
    for key, value in model.state_dict().items():
        if not key.startswith("visual."):
            digest.update(key.encode())
            digest.update(value.contiguous().cpu().numpy())
    return digest.hexdigest()
