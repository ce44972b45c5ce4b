"""Checkpoint files -> CLIP.

Supported files: OpenAI's TorchScript archives, state dicts (also with prefixes, or inside a training
checkpoint), state dicts of open_clip and transformers, and safetensors. Loading a file never runs its code,
see `foundation.tensors`.
"""
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clip.download import resolve
from clip.keys import clean_keys
from clip.model import CLIP, HEAD_WIDTH, Config, matrices
from clip.resnet import STRIDE
from foundation.tensors import read_tensors

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Entries of training checkpoints that contain the state dict. "module" is DeepSpeed's.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# Entries of CLIP checkpoints that are not weights: three numbers in OpenAI's files; the causal mask and the
# bias of logits in open_clip's files, which changes no softmax; position numbers in transformers' files; and
# the resampled positions of CLIP-ES's reference implementation.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "logit_bias", "position_ids",
               "positional_embedding_new")  # fmt: skip
LARGEST_LOGIT_SCALE = 88  # float32 has no exponential of larger numbers; CLIP's is 4.6
MAX_BLOCKS = 1000  # of a tower or stage
VOCABULARY = 49408  # token ids of the tokenizer


def load(
    name: str | Path,
    device: str = "auto",
    precision: str = "fp32",
    round_weights: bool | None = None,
    compile: bool = False,
) -> CLIP:
    """Return a frozen CLIP in eval mode.

    Args:
        name: a checkpoint file or a model name, see `clip.download.resolve`.
        device: "auto" (CUDA if available), "cpu", "cuda" or "cuda:i".
        precision: precision of the image tower: "fp32", "tf32" (fp32 with TF32 products on CUDA), "bf16" or
            "fp16". The text tower stays float32, because its features are computed only once.
        round_weights: round matrix weights to float16 and back. The reference implementation of CLIP-ES
            does this for every file, also on a CPU. Without rounding, CAMs of a float32 checkpoint differ by
            about 1e-2. None rounds the weights of all files except open_clip's.
        compile: compile the image tower's blocks with torch.compile at their first call. This takes up to a
            minute, and on a CPU requires a C++ compiler.

    Raises:
        FileNotFoundError: the file does not exist, or the name is unknown.
        ValueError: the precision or device is unknown, or the file is not a CLIP checkpoint.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    source = resolve(str(name))
    state = clean_keys(read_state(source.file), source.file)
    model = from_state_dict(state, source.file, **source.conventions)
    if source.weights_rounded(round_weights):
        for parameter in matrices(model):
            parameter.data = parameter.data.half().float()
        cure = "load it without rounding (--round_weights off), or use another checkpoint"
        _check_finite(model.named_parameters(), f"{source.file}, rounded to float16,", cure)
    target = pick_device(device)
    if PRECISIONS[precision] != torch.float32:
        model.visual_precision(PRECISIONS[precision])
        cure = "use --precision fp32 or bf16"
        _check_finite(model.visual.named_parameters(), f"{source.file} in --precision {precision}", cure)
    if target.type == "cuda":  # by default torch uses TF32 in convolutions
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if compile:
        model.compile_blocks()
    return model.eval().requires_grad_(False).to(target)


def pick_device(device: str) -> torch.device:
    """Return the device "cpu", "cuda" or "cuda:i"; "auto" is CUDA if available, else the CPU.

    Raises:
        ValueError: the name is not one of these, or the GPU does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {device!r} is not supported: use auto, cpu, cuda or cuda:0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if picked.type == "cuda" and (picked.index or 0) >= count:
        raise ValueError(
            f"--device: {device!r} does not exist: torch detects {count} GPUs; use cpu or another index"
        )
    return picked


def from_state_dict(state: dict[str, Tensor], file: Path | str = "state dict", **conventions) -> CLIP:
    """Return the CLIP of a cleaned state dict, in float32.

    Args:
        file: shown in errors.
        conventions: fields of `Config` that cannot be inferred from weights: activation, mean, std.

    Raises:
        ValueError: keys, shapes or types do not match a CLIP.
    """
    config = replace(infer_config(state, file), **conventions)
    with torch.device("meta"):
        model = CLIP(config)
    expected, weights = model.state_dict(), {}
    for key, value in state.items():
        if key.split(".")[-1] in NOT_WEIGHTS:
            continue
        shape = expected[key].shape if key in expected else value.shape
        if key == "logit_scale" and value.shape == (1,):
            value = value[0]
        if value.shape != shape:
            raise ValueError(
                f"{file} is not a CLIP checkpoint: {key} has shape {tuple(value.shape)}, expected "
                f"{tuple(shape)}"
            )
        if not (value.is_floating_point() or key.endswith("num_batches_tracked")):
            raise ValueError(
                f"{file} is not a CLIP checkpoint: {key} has type {value.dtype}, expected floating point"
            )
        weights[key] = value.float() if value.is_floating_point() else value
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(
            f"{file} is not a complete CLIP checkpoint: {len(missing)} weights are missing"
            f"{_first(missing)} and {len(unexpected)} are unknown{_first(unexpected)}"
        )
    _check_finite(weights.items(), str(file), "use another checkpoint")
    return model


def _check_finite(weights: Iterable[tuple[str, Tensor]], file: str, cure: str) -> None:
    """Raise ValueError if a weight would make all results invalid: NaN, infinity, or a negative variance.

    The check takes about as long as to copy the weights.
    """
    for key, value in weights:
        low, high = value.aminmax() if value.numel() else (value.sum(),) * 2
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"{file} has NaN or infinity in {key}: {cure}")
        if key.endswith("running_var") and low < 0:
            raise ValueError(f"{file} has variances below 0 in {key}: {cure}")
        if key == "logit_scale" and high > LARGEST_LOGIT_SCALE:
            raise ValueError(
                f"{file} has the logit_scale {float(high):g}, of which the exponential function is used: it "
                f"must be at most {LARGEST_LOGIT_SCALE}; store the logarithm of the scale"
            )


def _first(keys: list[str]) -> str:
    shown = [" ".join(key.split())[:80] for key in sorted(keys)[:3]]
    return f" ({', '.join(shown)}{', ...' if len(keys) > 3 else ''})" if keys else ""


def infer_config(state: dict[str, Tensor], file: Path | str = "state dict") -> Config:
    """Return the configuration of a CLIP: sizes from its state dict, and OpenAI's conventions.

    Raises:
        ValueError: a key is missing, or a weight has an unexpected shape.
    """

    def count(prefix: str) -> int:  # number of distinct indices after the prefix
        return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})

    try:
        if "visual.attnpool.positional_embedding" not in state:
            vision_width, _, _, patch = state["visual.conv1.weight"].shape
            layers = count("visual.transformer.resblocks.")
            resolution = patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        else:
            layers = tuple(count(f"visual.layer{stage}.") for stage in range(1, 5))
            vision_width, patch = len(state["visual.layer1.0.conv1.weight"]), None
            rows = len(state["visual.attnpool.positional_embedding"])
            resolution = STRIDE * round((rows - 1) ** 0.5)
        config = Config(
            embed_dim=state["text_projection"].shape[1],
            image_resolution=resolution,
            vision_layers=layers,
            vision_width=vision_width,
            patch_size=patch,
            context_length=len(state["positional_embedding"]),
            vocab_size=len(state["token_embedding.weight"]),
            text_width=len(state["ln_final.weight"]),
            text_layers=min(count("transformer.resblocks."), MAX_BLOCKS),
        )
    except (KeyError, ValueError, IndexError, TypeError) as error:
        fault = "a weight has an unexpected shape"
        if isinstance(error, KeyError):
            fault = f"it has no {error.args[0]}, but {len(state)} others{_first([*state])}"
        raise ValueError(f"{file} is not a CLIP checkpoint of OpenAI or open_clip: {fault}") from None
    stages = config.vision_layers if isinstance(config.vision_layers, tuple) else ()
    depths = stages or (config.vision_layers,)
    if config.patch_size == 0 or config.vision_width < 2 or not all(0 < n < MAX_BLOCKS for n in depths):
        raise ValueError(
            f"{file} is not a CLIP checkpoint: its image tower has {depths} blocks of {config.vision_width} "
            f"channels, and patches of {config.patch_size} pixels"
        )
    if config.vocab_size < VOCABULARY:
        raise ValueError(
            f"{file} has a vocabulary of {config.vocab_size} tokens, but the tokenizer of CLIP has "
            f"{VOCABULARY}: use a checkpoint with this tokenizer"
        )
    widths = (config.text_width, *([config.vision_width] if not stages else []))
    if any(width % HEAD_WIDTH or not width for width in widths):
        raise ValueError(
            f"{file} is not a CLIP checkpoint: tower widths must be multiples of {HEAD_WIDTH}, got "
            f"{', '.join(map(str, widths))}"
        )
    return config


def read_state(file: Path | str) -> dict[str, Tensor]:
    """Return the state dict in a file of any supported format.

    Raises:
        ValueError: the format is not supported, or the file is truncated.
    """
    state = read_tensors(file)
    for wrapper in 2 * WRAPPERS:  # one may be inside another
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{file} contains a {type(state).__name__}, expected a state dict")
    return state
