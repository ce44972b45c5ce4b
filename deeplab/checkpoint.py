"""Weight files -> the two DeepLab networks, with a report of the loaded and the ignored tensors.

`deeplab.keymaps` converts the tensor names of known file families. Only tensors are unpickled.
"""
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clip.checkpoint import read_state
from deeplab.keymaps import FAMILIES, STRIDE_IN, Family, family_of, own_key, unwrap
from foundation.tensors import START_BYTES, foreign_format
from foundation.untrusted import read_npz

# Minimum of |A and B| / |A or B|; A and B are the names of the backbone tensors of the file and of the model.
MIN_COMMON = 0.9
OTHER_FORMATS = {".caffemodel": "Caffe", ".params": "MXNet"}  # only these frameworks read such files
NETWORKS = {"base.": "DeepLab-v2 on ResNet-101", "backbone.": "DeepLab-v1 on ResNet-38d"}  # by prefix of keys
BACKBONES = ("base.layer", "backbone.")
CLASSIFIERS = ("base.aspp.c0.weight", "base.fc.weight", "cls_conv.weight")  # their first axis is the classes
COUNTER = "num_batches_tracked"  # number of training steps; results do not depend on it
MEAN, VARIANCE = "running_mean", "running_var"  # buffers of batch norm


@dataclass(frozen=True)
class Weights:
    """Tensors of a file under the names of our networks, and keys of the file without counterpart."""

    file: Path | str
    family: Family
    state: dict[str, Tensor]
    dropped: list[str]

    def __str__(self) -> str:
        return f"{self.file} ({self.family.name})"


@dataclass(frozen=True)
class Report:
    """Names of tensors: loaded, left at their initial values, and ignored.

    Ignored tensors without counterpart in our networks have the names in the file.
    """

    source: str
    matched: tuple[str, ...]
    initial: tuple[str, ...]
    ignored: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.matched)} tensors loaded"]
        if self.initial:
            parts.append(f"{len(self.initial)} of the model left at their initial values{_few(self.initial)}")
        if self.ignored:
            parts.append(f"{len(self.ignored)} of the file ignored{_few(self.ignored)}")
        return "; ".join([*parts, *([self.note] if self.note else [])])


def family(source: str | Path | Mapping[str, Tensor]) -> str:
    """Return the name of the family (`keymaps.FAMILIES`) of a file or state dict. Raises: see `read`.

    Build the network for such weights with `stride_in=STRIDE_IN.get(family, "reduce")`. Checkpoints with our
    own names do not show where the stride is: build the network with the `stride_in` of their training.
    """
    if isinstance(source, Mapping):
        return _family(source, "the state dict").name
    return _family(_tensors(Path(source)), source).name


def read(file: str | Path) -> dict[str, Tensor]:
    """Return the weights in a file of any known family, under the names of our networks, on the CPU.

    Args:
        file: .pth or .pt (a state dict, possibly under `state_dict`, `model_state_dict` or `model`),
            .safetensors or .npz.

    Returns:
        A state dict with keys `base....` or `backbone....`, in the file's precision. Tensors without
        counterpart in our networks are left out.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, or belongs to no known family.
    """
    return _weights(file).state


def load_init(model: nn.Module, file: str | Path) -> Report:
    """Load initial weights for training: the backbone, and the head's tensors of equal name and shape.

    Args:
        model: either network, possibly wrapped for data parallelism; not changed if there is an error.

    Raises:
        FileNotFoundError, ValueError: see `read`; or the file is for the other network, for another depth
            (less than `MIN_COMMON` in common) or for another width, lacks batch norm tensors of the backbone,
            or contains invalid numbers such as NaN.
    """
    weights, state = _weights_for(model, file)
    in_file, in_model = (
        {name for name in names if name.startswith(BACKBONES) and not name.endswith(COUNTER)}
        for names in (weights.state, state)
    )
    common, surplus, missing = in_file & in_model, in_file - in_model, in_model - in_file
    if len(common) < MIN_COMMON * len(in_file | in_model):
        raise ValueError(
            f"{weights} and the model have {len(common)} of {len(in_file | in_model)} backbone tensors in "
            f"common: {len(surplus)} are only in the file{_few(surplus)}, {len(missing)} only in the model"
            f"{_few(missing)}; use weights of a network of the same depth"
        )
    norms = {name for name in missing if f"{name.rpartition('.')[0]}.{MEAN}" in state}
    if norms:
        raise ValueError(
            f"{weights} lacks {len(norms)} tensors of the backbone's batch norm{_few(norms)}, which training "
            "does not update: use a file that contains all of them"
        )
    both = weights.state.keys() & state.keys()
    fitting = {name for name in both if weights.state[name].shape == state[name].shape}
    return _load(model, weights, common | fitting)


def load_full(model: nn.Module, file: str | Path) -> Report:
    """Load a trained network: the file must have exactly the model's tensors.

    For arguments and errors see `load_init`. A different number of classes is an error, too.
    """
    weights, state = _weights_for(model, file)
    loaded = weights.state
    if not any(name in loaded for name in state if not name.startswith(BACKBONES)):
        raise ValueError(
            f"{weights} has the backbone but not the head of {_network(state)}: use it as initial weights "
            "(model.init), and give the checkpoint of a trained network here"
        )
    for name in CLASSIFIERS:
        if name in loaded and name in state and len(loaded[name]) != len(state[name]):
            raise ValueError(
                f"{weights} was trained for {len(loaded[name])} classes, background included, the model has "
                f"{len(state[name])}: use a checkpoint for the same classes"
            )
    missing, unknown = state.keys() - loaded.keys(), {*weights.dropped, *(loaded.keys() - state.keys())}
    if missing or unknown:
        raise ValueError(
            f"{weights} is not a checkpoint of this model: {len(missing)} tensors are missing{_few(missing)} "
            f"and {len(unknown)} unknown{_few(unknown)}; check the settings of the model"
        )
    return _load(model, weights, state)


def _tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file under the names in the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is not a file: give a file of weights")
    if framework := OTHER_FORMATS.get(file.suffix):
        raise ValueError(
            f"{file} has the format of {framework}: convert it to .npz with the code in "
            f"docs/deeplab_weights.md, which requires {framework}, and give the .npz file"
        )
    if file.suffix == ".npz":
        with open(file, "rb") as stream:
            start = stream.read(START_BYTES)
        try:
            arrays = read_npz(file)
            return {key: torch.from_numpy(_native(array)) for key, array in arrays.items()}
        except Exception:  # damaged files raise exceptions of many types
            fault = foreign_format(start) or "it is damaged, or contains more than arrays of numbers"
            raise ValueError(f"{file} cannot be read as .npz: {fault}") from None
    return {str(key): value for key, value in read_state(file).items() if isinstance(value, Tensor)}


def _native(array: np.ndarray) -> np.ndarray:
    """Return an array in this machine's byte order, which torch requires."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _family(state: Mapping[str, Tensor], source: object) -> Family:
    family = family_of(state)
    if family is None:
        raise ValueError(
            f"{source} has no weights of a known family ({', '.join(known.name for known in FAMILIES)}): "
            f"it has {len(state)} tensors{_few(state)}, none like base.layer2.block1.reduce.conv.weight or "
            "backbone.b2.conv_branch2a.weight"
        )
    return family


def _weights(file: str | Path) -> Weights:
    tensors = _tensors(Path(file))
    family = _family(tensors, file)
    if len({unwrap(key) for key in tensors}) < len(tensors):
        raise ValueError(f"{file} contains more than one network: save only the network to load")
    try:
        state, dropped = family.convert(tensors)
    except ValueError as error:
        raise ValueError(f"{file} is not a complete checkpoint: {error}") from None
    except (RuntimeError, IndexError):  # of torch, for tensors without or with too many axes
        raise ValueError(f"{file} is not a complete checkpoint: a tensor has an unexpected shape") from None
    for key, value in state.items():
        if not (value.is_floating_point() or key.endswith(COUNTER)):
            raise ValueError(f"{file} is not a checkpoint: {key} has type {value.dtype}, not float")
    for key in [key for key in state if key.endswith(MEAN)]:  # files of PyTorch before 0.4.1 have no counter
        state.setdefault(key.replace(MEAN, COUNTER), torch.zeros((), dtype=torch.long))
    return Weights(file, family, state, dropped)


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors under their full names in network A or B, without prefixes of wrappers."""
    return {own_key(key) or key: value for key, value in model.state_dict().items()}


def _network(names: Iterable[str]) -> str:
    return next(title for name in names for prefix, title in NETWORKS.items() if name.startswith(prefix))


def _weights_for(model: nn.Module, file: str | Path) -> tuple[Weights, dict[str, Tensor]]:
    """Return the weights of a file and the tensors of the model, both of the same network."""
    weights, state = _weights(file), _state_of(model)
    in_file, in_model = _network(weights.state), _network(state)
    if in_file != in_model:
        raise ValueError(
            f"{weights} contains weights of {in_file}, but the model is {in_model}: load other weights, or "
            "set model.network"
        )
    return weights, state


def _load(model: nn.Module, weights: Weights, names: Collection[str]) -> Report:
    """Copy the named tensors to the model, in its precision and to its device; return what was loaded."""
    state = _state_of(model)
    for name in sorted(names):
        in_file, in_model = tuple(weights.state[name].shape), tuple(state[name].shape)
        if in_file != in_model:
            raise ValueError(
                f"{weights} does not fit the model: {name} is {in_file} in the file, {in_model} in the model"
            )
    values = {name: weights.state[name].to(state[name].dtype) for name in state if name in names}
    for name, value in values.items():
        if not value.isfinite().all():
            raise ValueError(f"{weights} has NaN or infinity in {name}: use another checkpoint")
        if name.endswith(VARIANCE) and (value < 0).any():
            raise ValueError(f"{weights} has variances below 0 in {name}: use another checkpoint")
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    initial = [name for name in state if name not in values]
    ignored = [*weights.dropped, *(name for name in weights.state if name not in values)]
    return Report(
        str(weights),
        *(tuple(key for key in keys if not key.endswith(COUNTER)) for keys in (values, initial, ignored)),
        note=_stride_note(model, STRIDE_IN.get(weights.family.name)),
    )


def _stride_note(model: nn.Module, stride_in: str | None) -> str:
    """Return a warning if the model has its strides in other layers than the network of the weights."""
    for name, part in model.named_modules():
        if stride_in and name.endswith(f"layer3.block1.{stride_in}.conv") and part.stride == (1, 1):
            return f"set model.stride_in={stride_in}, as in the network of these weights, to get its features"
    return ""


def _few(keys: Collection[str]) -> str:
    shown = sorted(keys)
    return f" ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})" if shown else ""
