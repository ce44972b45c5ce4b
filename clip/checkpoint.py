"""Checkpoint files -> CLIP.

Read are OpenAI's TorchScript archives, plain state dicts (also DataParallel's, and training
checkpoints that wrap one), open_clip state dicts and safetensors. A file is data: an archive is
opened for its tensors and its code is never run; pickles are read by restricted readers only.
"""
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from clip.download import Source, resolve
from clip.model import CLIP, HEAD_WIDTH, Config
from clip.resnet import STRIDE

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
#: Element types of the storages that TorchScript pickles name.
STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
#: Keys that CLIP files hold beside weights: numbers in OpenAI's, the causal mask in open_clip's, and a
#: table that the public CLIP-ES registers while it runs.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "positional_embedding_new")


def load(
    name: str | Path,
    device: str = "auto",
    precision: str = "fp32",
    round_weights: bool | None = None,
    compile: bool = False,
) -> CLIP:
    """Load a frozen CLIP, in eval mode, without gradients.

    Args:
        name: a checkpoint file; a public name such as "ViT-B/16" or an open_clip "model:tag", which
            is downloaded (see `clip.download`); or "model:file", a file that open_clip trained with
            the configuration "model".
        device: "auto" (CUDA where there is any), "cpu", "cuda" or "cuda:i".
        precision: of the image tower: "fp32", "tf32" (fp32 with TF32 products on CUDA), "bf16" or
            "fp16". The text tower stays float32: its features are made once.
        round_weights: round matrix weights to float16 and back. The public CLIP-ES does so with
            every file, also on CPU; a float32 checkpoint gives CAMs that differ by about 1e-2
            without it. None: round OpenAI-layout files, leave open_clip's as they are.
        compile: compile the image tower's blocks by torch.compile at their first call, which takes up to a
            minute and needs a C++ compiler on a CPU.

    Raises:
        FileNotFoundError: no such file, or an unknown name.
        ValueError: not a CLIP checkpoint, with what is wrong in one sentence.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    source = resolve(str(name))
    model = from_state_dict(clean_keys(read_state(source.file)), source.file, **source.conventions)
    if rounds(source, round_weights):
        round_matrices(model)
    target = pick_device(device)
    model.visual_precision(PRECISIONS[precision])
    if target.type == "cuda":  # torch lets convolutions use TF32 unless told otherwise
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if compile:
        model.compile_blocks()
    return model.eval().requires_grad_(False).to(target)


def rounds(source: Source, round_weights: bool | None) -> bool:
    """Whether `load` rounds the matrix weights of this source."""
    return not source.open_clip if round_weights is None else round_weights


def pick_device(device: str) -> torch.device:
    """"auto" -> CUDA where there is any, else CPU; other names as torch knows them.

    Raises:
        ValueError: neither a CPU nor a CUDA device, or CUDA without such a GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device!r} is not a device for this: use auto, cpu, cuda or cuda:0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if picked.type == "cuda" and (picked.index or 0) >= count:
        raise ValueError(
            f"--device {device} asks for a GPU that torch does not see (it sees {count}): use --device cpu, "
            "or another one"
        )
    return picked


def round_matrices(model: CLIP) -> None:
    """Round the matrix weights (`CLIP.matrices`) to float16 in place, keeping their type."""
    with torch.no_grad():
        for parameter in model.matrices():
            parameter.copy_(parameter.half())


def from_state_dict(state: dict[str, Tensor], file: Path | str = "state dict", **conventions) -> CLIP:
    """Build the CLIP that a cleaned state dict belongs to, in float32.

    Args:
        conventions: fields of `Config` that weights do not show: activation, mean, std.

    Raises:
        ValueError: keys or shapes are not those of a CLIP; `file` is named in the sentence.
    """
    config = replace(infer_config(state, file), **conventions)
    with torch.device("meta"):
        model = CLIP(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = {key: value for key, value in state.items() if key.split(".")[-1] not in NOT_WEIGHTS}
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # counts training steps; inference does without
            state[key] = torch.zeros((), dtype=torch.long)
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{file} is not a complete CLIP checkpoint: {len(missing)} weights are missing"
            f"{_first(missing)} and {len(unexpected)} are unknown{_first(unexpected)}"
        )
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(
                f"{file} is not a CLIP checkpoint that fits together: {key} has shape "
                f"{tuple(state[key].shape)}, expected {shape}"
            )
        if not (state[key].is_floating_point() or key.endswith("num_batches_tracked")):
            raise ValueError(f"{file} is not a CLIP checkpoint: {key} holds {state[key].dtype}, not floats")
    floats = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(floats, strict=True, assign=True)
    return model


def _first(keys: set[str]) -> str:
    return f" ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""


def infer_config(state: dict[str, Tensor], file: Path | str = "state dict") -> Config:
    """Read the sizes of a CLIP off its state dict; what it does not show is OpenAI's.

    Raises:
        ValueError: a key that every CLIP has is missing.
    """

    def count(prefix: str) -> int:  # distinct numbers that follow the prefix
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
    except KeyError as error:
        raise ValueError(
            f"{file} is not a CLIP checkpoint of OpenAI's or open_clip's layout: it has no {error.args[0]}"
        ) from None
    except (ValueError, IndexError, TypeError):
        raise ValueError(
            f"{file} is not a CLIP checkpoint: its weights have shapes that no CLIP has"
        ) from None
    widths = (config.text_width, *([config.vision_width] if config.patch_size else []))
    if any(width % HEAD_WIDTH or not width for width in widths):
        raise ValueError(f"{file} is not a CLIP checkpoint: a tower's width is no multiple of {HEAD_WIDTH}")
    return config


def clean_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what wrappers do to key names: DataParallel's `module.`, open_clip's `text.` tower."""
    cleaned = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            cleaned[str(key).replace("module.", "").removeprefix("text.")] = value
    return cleaned


def read_state(file: Path | str) -> dict[str, Tensor]:
    """Tensors by name from any of the supported kinds of file.

    Raises:
        ValueError: the file is of no supported kind, or cut short.
    """
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as archive:
                return {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return read_torchscript(archive)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} is not a readable checkpoint: it is damaged, or holds Python objects beside its tensors "
            "(settings, say), which are never run; save its state dict alone"
        ) from None
    except Exception:  # damaged files fail in any way they like
        raise ValueError(
            f"{file} is not a readable checkpoint: it is cut short, or neither a TorchScript archive, "
            "a state dict of plain tensors nor a safetensors file"
        ) from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__}, not a state dict")
    return state


class _Module:
    """Stands for any scripted module; unpickling fills its __dict__ with attributes."""


class _ArchiveReader(pickle.Unpickler):
    """Unpickles a TorchScript module tree into `_Module`s and tensors; resolves nothing else."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}  # by record: its values, flat

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch.as_strided(
                storage, size, stride, offset
            )
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name == "restore_type_tag":  # (value, type) -> value
            return lambda value, _: value
        if module == "torch.jit._pickle":  # build_intlist and its kin: typed lists of plain values
            return list
        if (module, name) == ("torch", "device"):
            return lambda *_: None
        raise pickle.UnpicklingError(f"unexpected global {module}.{name}")

    def persistent_load(self, identifier):
        _, dtype, key, _, _ = identifier
        if key not in self.storages:
            record = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            values = torch.frombuffer(record, dtype=dtype) if record else torch.empty(0, dtype=dtype)
            self.storages[key] = values
        return self.storages[key]


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The state dict of a TorchScript archive, read without torch.jit, so without its code."""
    root = archive.namelist()[0].split("/")[0]
    state: dict[str, Tensor] = {}

    def collect(module: _Module, prefix: str) -> None:
        for name, value in vars(module).items():
            if isinstance(value, _Module):
                collect(value, f"{prefix}{name}.")
            elif isinstance(value, Tensor):
                state[prefix + name] = value

    collect(_ArchiveReader(archive, root).load(), "")
    return state
