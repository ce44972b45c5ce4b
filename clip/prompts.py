"""Class names -> text features, made once per model and class list and kept on disk."""
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip.model import CLIP
from clip.tokenizer import tokenize

PROMPTS_PER_BATCH = 256


def feature_cache() -> Path:
    """`CLIP_WSSS_CACHE`, or ~/.cache/clip-wsss."""
    return Path(os.environ.get("CLIP_WSSS_CACHE") or Path.home() / ".cache" / "clip-wsss")


@torch.no_grad()
def encode_prompts(model: CLIP, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Class features: each filled template encoded and normalized, their mean normalized again.

    Args:
        names: N class names as the prompts have them.
        templates: texts with one `{}`.

    Returns:
        (N, E) float32, rows of unit length.

    Raises:
        ValueError: a filled template is longer than the model's context.
    """
    texts = [template.format(name) for name in names for template in templates]
    tokens = tokenize(texts, model.config.context_length).to(model.device)
    features = torch.cat([model.encode_text(batch) for batch in tokens.split(PROMPTS_PER_BATCH)])
    features = F.normalize(features.float(), dim=-1)
    features = features.view(len(names), len(templates), features.shape[-1])  # (N, T, E)
    return F.normalize(features.mean(1), dim=-1)


def text_features(model: CLIP, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """`encode_prompts`, kept in `feature_cache` under (text weights, templates, names)."""
    recipe = json.dumps([fingerprint(model), list(templates), list(names)])
    file = feature_cache() / f"text-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.npy"
    try:
        features = np.load(file)  # refuses pickles
        if features.shape == (len(names), model.config.embed_dim):
            return torch.from_numpy(features).to(model.device)
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or damaged: make it
    features = encode_prompts(model, names, templates)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.stem}.{os.getpid()}.npy")
        np.save(partial, features.cpu().numpy())
        partial.replace(file)
    except OSError:
        pass  # a cache that cannot be written costs time, not results
    return features


def fingerprint(model: CLIP) -> str:
    """sha256 over the text tower's weights, as they are in memory."""
    digest = hashlib.sha256(repr(model.config).encode())
    for key, value in model.state_dict().items():
        if not key.startswith("visual."):
            digest.update(key.encode())
            digest.update(value.contiguous().cpu().numpy())
    return digest.hexdigest()
