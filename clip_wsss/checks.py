"""Check that `clip` and `pytorch_grad_cam` are this project's packages: other projects use the same names."""

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED_NAMES = {"clip": "OpenAI's CLIP", "pytorch_grad_cam": "grad-cam"}


def check_packages(root: Path = ROOT) -> None:
    """Raise ImportError if another package named `clip` or `pytorch_grad_cam` is imported instead."""
    for name, other in SHARED_NAMES.items():
        file = importlib.import_module(name).__file__
        if file is None or Path(file).resolve().parent != (root / name).resolve():
            raise ImportError(
                f"the package {name!r} is imported from {file}, probably from {other}, but must be from "
                f"CLIP-WSSS ({root / name}): uninstall the other package, or put {root} first in PYTHONPATH"
            )
