"""The committed checkpoint is small, float16 and loads like any other; its patches match their names."""
from pathlib import Path

import torch

import clip
from shapes import BENCHMARK
from shapes.train_clip import CONFIG, probe

LIMIT = 12 * 2**20  # bytes


def test_checkpoint_is_small_float16_and_has_the_config():
    file = Path(BENCHMARK.model)
    assert file.stat().st_size <= LIMIT
    state = torch.load(file, weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}
    model = clip.load(file, device="cpu")
    assert model.config == CONFIG
    assert file.with_suffix(".csv").is_file(), "the training log is next to the checkpoint"


def test_patch_labels_reach_the_miou_floor():
    assert probe(clip.load(BENCHMARK.model, device="cpu"), seed=0, count=8) > 0.5
