"""Fixtures and helpers for all tests: golden vectors, and the deterministic CLIPs they were made with."""
import json
import logging
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip
from foundation import logs
from tests import weights

GOLDEN = Path(__file__).parent / "golden"

#: pydensecrf2 is optional, because building it needs a C++ compiler. CI must run these tests.
needs_pydensecrf = pytest.mark.skipif(
    os.environ.get("CI") != "true" and find_spec("pydensecrf") is None,
    reason="pydensecrf2 is not installed: pip install pydensecrf2 (needs a C++ compiler)",
)

#: Image name, (H, W), preset, seed, benchmark and labels of every golden case.
CASES = {
    "a": ("es_a", (96, 128), "tiny", 1, "voc12", [8, 1, 5]),
    "b": ("es_b", (75, 100), "tiny", 1, "voc12", [3]),
    "c": ("es_c", (100, 67), "tiny", 0, "voc12", [14, 16, 0]),
    "d": ("es_d", (50, 90), "tiny", 1, "coco14", [0, 8, 52, 61, 77]),
    "e": ("es_e", (64, 64), "tiny", 2, "voc12", [14]),
    "v": ("es_v", (80, 112), "vit_b16", 0, "voc12", [12, 6]),
    "z": ("es_z", (70, 120), "tiny", 3, "voc12", [0, 13, 17]),
}


@pytest.fixture(autouse=True, scope="session")
def _session(tmp_path_factory):
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, min(2, os.cpu_count() // processes)))
    os.environ["CLIP_WSSS_CACHE"] = str(tmp_path_factory.mktemp("features"))


@pytest.fixture(autouse=True)
def _messages():
    logs.show(logging.INFO)  # as commands do by default


def golden(name: str, system: str = "clip-es") -> dict:
    """Return the arrays of a system's .npz file, or the content of its .json file."""
    if name.endswith(".json"):
        return json.loads((GOLDEN / system / name).read_text())
    with np.load(GOLDEN / system / f"{name}.npz") as arrays:
        return dict(arrays)


def parity_state(preset, seed: int) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in weights.clip_state_dict(preset, seed).items()}


@pytest.fixture(scope="session")
def parity_file(tmp_path_factory):
    """Function (preset, seed) -> checkpoint file of the deterministic weights."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def file(preset: str, seed: int) -> Path:
        target = folder / f"{preset}_{seed}.pt"
        torch.save(parity_state(preset, seed), target)
        return target

    return file


@pytest.fixture(scope="session")
def parity_clip(parity_file):
    """Function (preset, seed) -> loaded CLIP of `parity_file`."""
    return cache(lambda preset, seed: clip.load(parity_file(preset, seed), device="cpu"))


def parity_image(name: str, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(weights.parity_image(name, *size))


def relative(mine, reference) -> float:
    """Return the largest absolute difference divided by the largest absolute value of the reference."""
    mine, reference = (np.asarray(array, np.float64) for array in (mine, reference))
    assert mine.shape == reference.shape, (mine.shape, reference.shape)
    return np.abs(mine - reference).max() / max(np.abs(reference).max(), 1e-30)
