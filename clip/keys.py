"""Names of the weights in checkpoint files -> OpenAI's names. Pure functions that read no files.

Training code adds prefixes: wrappers such as DataParallel, and the attribute of a module that holds the CLIP.
The transformers package has its own names, and separate weights of queries, keys and values.
"""
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# Attributes under which DataParallel, torch.compile, FSDP and activation checkpointing store a module.
WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# A weight that every CLIP has, in the names of OpenAI or of transformers; what precedes it is a prefix.
PATCHES = "vision_model.embeddings.patch_embedding.weight"
FIRST = re.compile(rf"(^|.*\.)(visual\.conv1\.weight|{re.escape(PATCHES)})")
# Names of transformers -> OpenAI's; "" for the two towers' prefixes. Blocks are converted by `_block`.
TOWERS = {"vision_model.": "visual.", "text_model.": ""}
OUTSIDE_BLOCKS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    PATCHES: "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
IN_BLOCKS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def clean_keys(state: Mapping[str, Tensor], file: Path | str = "state dict") -> dict[str, Tensor]:
    """Return the tensors of a state dict under OpenAI's names.

    Prefixes of all names are removed, and names of transformers are converted. Tensors that belong to no CLIP
    keep their names.

    Args:
        file: shown in errors.

    Raises:
        ValueError: the state dict contains several CLIPs, or the same weight under two names.
    """
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    tensors = _renamed(tensors, {key: WRAPPERS.sub("", str(key)) for key in tensors}, file)
    prefixes = [match[1] for key in tensors if (match := FIRST.fullmatch(key))]
    if len(prefixes) > 1:
        raise ValueError(
            f"{file} contains {len(prefixes)} CLIPs, with the prefixes {prefixes[:3]}: save only one of them"
        )
    prefix = prefixes[0] if prefixes else ""
    names = {key: key.removeprefix(prefix).removeprefix("text.") for key in tensors}
    tensors = _renamed(tensors, names, file)
    return _from_transformers(tensors) if PATCHES in tensors else tensors


def _renamed(tensors: dict[str, Tensor], names: dict[str, str], file: Path | str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if names[key] in renamed:
            raise ValueError(f"{file} contains {names[key]} with and without a prefix: save only one of them")
        renamed[names[key]] = value
    return renamed


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of `CLIPModel` of transformers under OpenAI's names."""
    result, packed = {}, {}
    for key, value in state.items():
        match = re.fullmatch(r"(vision_model\.|text_model\.)encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in OUTSIDE_BLOCKS:
            result[OUTSIDE_BLOCKS[key]] = value
        elif key in TRANSPOSED and value.ndim == 2:
            result[TRANSPOSED[key]] = value.mT
        elif match is None:
            result[key] = value
        else:
            tower, index, part, leaf = match.groups()
            block = f"{TOWERS[tower]}transformer.resblocks.{index}."
            if part in IN_BLOCKS:
                result[f"{block}{IN_BLOCKS[part]}.{leaf}"] = value
            elif part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                packed.setdefault(f"{block}attn.in_proj_{leaf}", {})[part[-6]] = value
            else:
                result[key] = value
    for key, parts in packed.items():
        shapes = {part.shape for part in parts.values()}
        if len(parts) == 3 and len(shapes) == 1 and shapes != {()}:  # else the packed weight is missing
            result[key] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return result
