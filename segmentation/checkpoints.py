"""Files of a training run: checkpoints, which the reference implementations can load, and resume files."""

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foundation.files import replacing

RESUME = "resume.pt"
FINAL = "checkpoint_final.pth"


def trained_state(model: nn.Module, frozen: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the state dict of a network without the submodules named in `frozen`, such as "clip"."""
    prefixes = tuple(f"{name}." for name in frozen)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}


def write_checkpoint(model: nn.Module, file: Path, frozen: Collection[str] = ()) -> None:
    """Write only the state dict of a network, as the reference implementations do; see `trained_state`."""
    state = trained_state(model, frozen)
    write_tensors({key: value.cpu().contiguous() for key, value in state.items()}, file)


def write_tensors(content: Mapping[str, Any], file: Path) -> None:
    """Write `content` by `torch.save`; the write is atomic.

    Raises:
        DiskFull: the disk is full.
    """
    # torch.save reports a full disk as RuntimeError, which `replacing` does not convert to DiskFull. It
    # therefore writes to memory.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(file) as stream:
        stream.write(buffer.getbuffer())


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Return the files `checkpoint_<iteration>.pth` of a folder, by ascending iteration."""
    numbered = [file for file in folder.glob("checkpoint_*.pth") if file.stem.split("_")[1].isdecimal()]
    return sorted(numbered, key=lambda file: int(file.stem.split("_")[1]))
