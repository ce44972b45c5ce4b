"""What a model, a layer or a user's function returns: tensors, tuples, dicts, dataclasses."""
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

SHOWN = 6  # parts of a tuple or dict that a message lists


def call(name: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """Return `function(argument)`; raise ValueError with its name and argument if it does not fit."""
    try:
        return function(argument)
    except torch.cuda.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{name} fails on {describe(argument)}: {kind}{first_line(error)}") from error


def members(value: Any) -> dict[Any, Any]:
    """Return the parts of a tuple, list, dict, dataclass or other plain object."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(getattr(value, "__dict__", {}))


def float_tensors(value: Any) -> dict[Any, Tensor]:
    """Return the float tensors among the parts of `value`, or `value` itself."""
    parts = {"": value} if isinstance(value, Tensor) else members(value)
    return {name: x for name, x in parts.items() if isinstance(x, Tensor) and x.is_floating_point()}


def describe(value: Any) -> str:
    """Return the type of a value, and the shapes of tensors, for messages."""
    if isinstance(value, Tensor):
        dtype = "" if value.is_floating_point() else f", {value.dtype}"
        return f"a tensor of shape {tuple(value.shape)}{dtype}"
    parts = [
        f"{name}: {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
        for name, x in members(value).items()
    ]
    parts = parts[:SHOWN] + ["..."] * (len(parts) > SHOWN)
    return f"{type(value).__name__} ({', '.join(parts)})" if parts else type(value).__name__


def first_line(message: object) -> str:
    """Return the first line of an error or text."""
    return next(iter(str(message).splitlines()), "")
