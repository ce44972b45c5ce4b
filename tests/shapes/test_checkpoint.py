"""The committed checkpoint: small, float16, loaded like any other, and its text tower knows the names."""
from pathlib import Path

import torch

import clip
from shapes import BENCHMARK
from shapes.train_clip import CONFIG, probe

LIMIT = 12 * 2**20  # bytes


def test_size_type_and_config():
    file = Path(BENCHMARK.model)
    assert file.stat().st_size <= LIMIT
    state = torch.load(file, weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}
    model = clip.load(file, device="cpu")
    assert model.config == CONFIG
    assert file.with_suffix(".csv").is_file(), "the training log lies beside it"


def test_patches_find_their_names():
    assert probe(clip.load(BENCHMARK.model, device="cpu"), seed=0, count=8) > 0.5
