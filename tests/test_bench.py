"""The benchmark runs, its reference computes the same CAMs, and it reports what it measured."""
import json
import sys

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench.cams import _inputs
from bench.reference import reference_cams
from pipeline.cams import REFINED, CamSettings, image_cams
from segmentation.camfile import resize
from tests.conftest import golden, parity_image


@pytest.mark.parametrize("case", ["a", "c"])
def test_reference_is_the_published_system(case, parity_clip):
    """Otherwise it would not be worth comparing with."""
    name, size, seed = {"a": ("es_a", (96, 128), 1), "c": ("es_c", (100, 67), 0)}[case]
    reference, model = golden(f"case_{case}"), parity_clip("tiny", seed)
    text = torch.as_tensor(reference["text"])
    labels = len(reference["labels"])
    maps = reference_cams(model, parity_image(name, size), text[:labels], text[labels:], 0.4)
    assert np.abs(maps.astype(float) - reference["attn_highres"].astype(float)).max() <= 1.5e-3
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_table_and_json(parity_file, tmp_path, monkeypatch, capsys):
    file = tmp_path / "bench.json"
    argv = ["bench", "cams", "--model", str(parity_file("tiny", 0)), "--images", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", argv)
    assert command.main() == 0
    result, table = json.loads(file.read_text()), capsys.readouterr().out
    for key in ("seconds_without_labels", "seconds_per_label", "images_per_s", "speedup", "peak_memory_mb"):
        assert isinstance(result[key], float) and key in table
    assert result["reference_peak_memory_mb"] > 0
    assert result["largest_difference"] <= 2e-3


def test_both_ways_agree_at_full_size(parity_file):
    model, image, text, backgrounds = _inputs(str(parity_file("tiny", 0)), "cpu", "fp32")
    maps = image_cams(model, image, text, backgrounds, CamSettings())
    ours = resize(maps[REFINED], (image.height, image.width)).astype(np.float16)
    theirs = reference_cams(model, image, text, backgrounds, 0.4)
    assert (ours.argmax(0) == theirs.argmax(0)).mean() >= 0.999
