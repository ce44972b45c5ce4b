"""Class names -> text features, computed once per model and class list and cached on disk."""
import hashlib
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

PROMPTS_PER_BATCH = 256


@torch.no_grad()
def encode_prompts(model: CLIP, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return class features (N, E) float32.

    The feature of each filled template is normalized; their mean over templates is normalized again.

    Args:
        names: N class names as used in the prompts.
        templates: texts with one `{}`, which is replaced by the class name.

    Raises:
        ValueError: a filled template has more tokens than the model's context.
    """
    texts = [template.format(name) for name in names for template in templates]
    tokens = tokenize(texts, model.config.context_length).to(model.device)
    features = torch.cat([model.encode_text(batch) for batch in tokens.split(PROMPTS_PER_BATCH)])
    features = F.normalize(features.float(), dim=-1)
    features = features.view(len(names), len(templates), features.shape[-1])  # (N, T, E)
    return F.normalize(features.mean(1), dim=-1)


def text_features(model: CLIP, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the result of `encode_prompts`, cached on disk.

    The environment variable CLIP_WSSS_CACHE names the cache folder; the default is ~/.cache/clip-wsss.
    """
    recipe = json.dumps([fingerprint(model), list(templates), list(names)])
    folder = Path(os.environ.get("CLIP_WSSS_CACHE") or Path.home() / ".cache" / "clip-wsss")
    file = folder / f"text-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.npy"
    with suppress(OSError, ValueError, EOFError):  # the file is missing or damaged, or contains a pickle
        features = np.load(file)
        if features.shape == (len(names), model.config.embed_dim):
            return torch.from_numpy(features).to(model.device)
    features = encode_prompts(model, names, templates)
    with suppress(OSError), replacing(file) as stream:  # if the cache is not writable, nothing is cached
        np.save(stream, features.cpu().numpy())
    return features


def fingerprint(model: CLIP) -> str:
    """Return the sha256 of the model's configuration and of the text tower's weights in memory."""
    digest = hashlib.sha256(repr(model.config).encode())
    for key, value in model.state_dict().items():
        if not key.startswith("visual."):
            digest.update(key.encode())
            digest.update(value.contiguous().cpu().numpy())
    return digest.hexdigest()
