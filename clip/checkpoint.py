"""Checkpoint files -> CLIP.

Supported files: OpenAI's TorchScript archives, state dicts (also of DataParallel, or inside a training
checkpoint), open_clip's state dicts, and safetensors. Loading a file never runs its code: only the tensors of
archives are read, and restricted unpicklers read the pickles.
"""
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from clip.download import resolve
from clip.model import CLIP, HEAD_WIDTH, Config, matrices
from clip.resnet import STRIDE

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Globals allowed in the pickle of a TorchScript archive, and their replacements. `_ArchiveReader` also allows
# module classes and typed lists. Any other global is an error.
GLOBALS = {
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "BoolStorage"): torch.bool,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "device"): lambda *_: None,
    ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: torch.as_strided(
        storage, size, stride, offset
    ),
    ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
    ("collections", "OrderedDict"): dict,
}
# Entries of CLIP checkpoints that are not weights: three numbers in OpenAI's files, the causal mask in
# open_clip's files, and the resampled positions of CLIP-ES's reference implementation.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "positional_embedding_new")


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
    model = from_state_dict(clean_keys(read_state(source.file)), source.file, **source.conventions)
    if source.weights_rounded(round_weights):
        for parameter in matrices(model):
            parameter.data = parameter.data.half().float()
    target = pick_device(device)
    model.visual_precision(PRECISIONS[precision])
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
    return model


def _first(keys: list[str]) -> str:
    return f" ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""


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
            text_layers=count("transformer.resblocks."),
        )
    except (KeyError, ValueError, IndexError, TypeError) as error:
        missing = isinstance(error, KeyError)
        fault = f"it has no {error.args[0]}" if missing else "a weight has an unexpected shape"
        raise ValueError(f"{file} is not a CLIP checkpoint of OpenAI or open_clip: {fault}") from None
    widths = (config.text_width, *([config.vision_width] if config.patch_size else []))
    if any(width % HEAD_WIDTH or not width for width in widths):
        raise ValueError(
            f"{file} is not a CLIP checkpoint: tower widths must be multiples of {HEAD_WIDTH}, got "
            f"{', '.join(map(str, widths))}"
        )
    return config


def clean_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with wrapper prefixes removed: DataParallel's `module.` and open_clip's `text.`."""
    return {
        str(key).replace("module.", "").removeprefix("text."): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def read_state(file: Path | str) -> dict[str, Tensor]:
    """Return the state dict in a file of any supported format.

    Raises:
        ValueError: the format is not supported, or the file is truncated.
    """
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return dict(_named_tensors(_ArchiveReader(archive).load()))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} is not a readable checkpoint: it is damaged, or it contains Python objects other than "
            "tensors (such as settings), which are not loaded for safety: save only its state dict"
        ) from None
    except Exception:  # readers raise exceptions of many types for damaged files
        raise ValueError(
            f"{file} is not a readable checkpoint: it is truncated, or it is not a TorchScript archive, "
            "a state dict of plain tensors or a safetensors file"
        ) from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{file} contains a {type(state).__name__}, expected a state dict")
    return state


class _Module:
    """Replacement for every scripted module class; unpickling stores the module's attributes in __dict__."""


class _ArchiveReader(pickle.Unpickler):
    """Unpickler of the module tree of a TorchScript archive; raises UnpicklingError for other globals."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive, self.root = archive, archive.namelist()[0].split("/")[0]
        self.storages: dict[str, Tensor] = {}  # record name -> flat values
        super().__init__(archive.open(f"{self.root}/data.pkl"))

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return _Module
        if (module, name) in GLOBALS:
            return GLOBALS[module, name]
        if module == "torch.jit._pickle":  # build_intlist and similar: typed lists of plain values
            return list
        raise pickle.UnpicklingError(f"unexpected global {module}.{name}")

    def persistent_load(self, identifier):
        _, dtype, key, _, _ = identifier
        if key not in self.storages:
            record = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            values = torch.frombuffer(record, dtype=dtype) if record else torch.empty(0, dtype=dtype)
            self.storages[key] = values
        return self.storages[key]


def _named_tensors(module: _Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a module and its submodules, with the names of a state dict."""
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            yield from _named_tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield prefix + name, value
