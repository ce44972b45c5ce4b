"""Files of a training run: networks in the form that public projects read, and what resuming needs."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.files import replacing

RESUME = "resume.pt"
FINAL = "checkpoint_final.pth"


def write_checkpoint(model: nn.Module, file: Path) -> None:
    """Write a network's state dict, and nothing else, as the public projects do; whole or not at all."""
    write_tensors({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, file)


def write_tensors(content: Mapping[str, Any], file: Path) -> None:
    """torch.save, whole or not at all.

    Raises:
        DiskFull: torch would hide behind a RuntimeError why a stream cannot be written, hence the buffer.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(file) as stream:
        stream.write(buffer.getbuffer())


def checkpoints(folder: Path) -> list[Path]:
    """`checkpoint_<iteration>.pth` in a folder, oldest first."""
    numbered = [file for file in folder.glob("checkpoint_*.pth") if file.stem.split("_")[1].isdecimal()]
    return sorted(numbered, key=lambda file: int(file.stem.split("_")[1]))
