"""The benchmark of tagging runs and reports; its reference equals the published system."""

import json
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import clip
import shapes
from bench import __main__ as command
from bench import cams, data, measure, tags
from bench.measure import COMMON
from bench.reference_tags import reference_tags
from pipeline.label_scores import chosen_labels, write_scores
from shapes.world import draw
from tagclip import TagSettings, tag_images
from tagclip.model import TEMPLATES
from tests.tagclip.common import SETS, golden, image, model, resized, write_model


@pytest.fixture(autouse=True)
def _threads():
    """Restore the numbers of threads, which the benchmark changes."""
    ours, theirs = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)  # for so little work, a second thread costs more than it saves
    yield
    torch.set_num_threads(ours)
    cv2.setNumThreads(theirs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model(tmp_path_factory.mktemp("tiny12"))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("image_name", ["tagclip-3", "tagclip-6", "tagclip-8"])
def test_reference_equals_the_golden_scores_and_ours(tiny, name, image_name):
    classes, _, settings = SETS[name]
    text = torch.from_numpy(golden("text")[f"{name}/features"])
    theirs = reference_tags(tiny, image(image_name), text, classes, settings)
    np.testing.assert_allclose(theirs, golden(f"stages_{name}")[f"{image_name}/scores"], atol=1e-5)
    (mine,) = tag_images(tiny, [resized(image(image_name))], text, classes, settings)
    np.testing.assert_allclose(mine.scores, theirs, atol=1e-5)
    assert chosen_labels(mine.scores[None], settings.ratio) == chosen_labels(theirs[None], settings.ratio)


def test_reference_leaves_an_image_at_its_first_empty_crop(tiny):
    """Crops of about one cell can lie in the last row or column, where they are empty."""
    text = torch.from_numpy(golden("text")["stuff/features"])
    settings, skipped = replace(SETS["stuff"][2], cell_threshold=0.999), 0
    for image_name in ("tagclip-3", "tagclip-4", "tagclip-8"):
        pixels = resized(image(image_name))
        (mine,) = tag_images(tiny, [pixels], text, 171, settings)
        (continued,) = tag_images(tiny, [pixels], text, 171, replace(settings, skip_empty_crops=True))
        skipped += len(continued.reidentified) - len(mine.reidentified)
        theirs = reference_tags(tiny, image(image_name), text, 171, settings)
        np.testing.assert_allclose(mine.scores, theirs, atol=1e-5)
    assert skipped > 0


def test_benchmark_reports_plausible_figures(tmp_path, monkeypatch, capsys):
    for name, value in {"REPEATS": 1, "BRIEF": 0, "MATRIX": {"cpu": 256}, "COPIED": {"cpu": 2**20}}.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(data, "HEIGHT", 90)
    monkeypatch.setattr(data, "WIDTH", 128)
    monkeypatch.setattr(cams, "WATCHED", {"cpu": 2})
    file, weights = tmp_path / "bench.json", write_model(tmp_path / "tiny12.pt")
    few = ["--images", "3", "--rounds", "1", "--model", str(weights), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench", "tags", *few])
    assert command.main() == 0
    result, table = json.loads(file.read_text()), capsys.readouterr().out
    for key in COMMON:
        assert isinstance(result[key], float) and result[key] > 0 and f"{key:34}" in table
    assert [line["stage"].split(" (")[0] for line in result["stages"]] == [
        "decode and resize", "patch pass", "refinement", "crops"
    ]  # fmt: skip
    for line in result["stages"]:
        assert line["stage"] in table and line["seconds"] > 0 and line["share"] > 0
    assert result["label_agreement"] == result["equal_labels"] == 1
    assert 0 <= result["largest_difference"] <= 1e-5
    assert 1 <= result["crops_per_image"] <= 1.5  # 6 crops in 4 images; crops are empty only at the edge
    assert result["text_s"] > 10 * result["text_cached_s"] > 0
    flop = 12 * (24 * 49 * 128**2 + 4 * 49**2 * 128)  # 6 x 8 patches of the tiny model, ...
    flop += result["crops_per_image"] * 12 * (24 * 197 * 128**2 + 4 * 197**2 * 128)  # ... and 14 x 14
    assert result["gflop_an_image"] == pytest.approx(flop / 1e9)
    share = result["gflop_per_s"] / result["matmul_gflop_per_s"]
    assert result["ceiling_share"] == pytest.approx(share)


def test_agreement_counts_pairs_and_images(tmp_path):
    settings = TagSettings(ratio=0.5)
    theirs = {"a": np.eye(20, dtype=np.float32)[0], "b": np.eye(20, dtype=np.float32)[1]}
    mine = {"a": theirs["a"], "b": theirs["b"] + 0.75 * np.eye(20, dtype=np.float32)[2]}
    (tmp_path / "reference").mkdir()
    for name, scores in theirs.items():
        np.save(tmp_path / "reference" / f"{name}.npy", scores)
    write_scores(tmp_path / "ours0_scores", mine)
    expected = {"label_agreement": 1 - 1 / 40, "equal_labels": 0.5, "largest_difference": 0.75}
    assert tags.compared(tmp_path, ["a", "b"], settings) == expected


def test_bfloat16_gives_the_same_labels():
    """Labels of the trained network. On 360 images all labels were equal and scores differed by at most
    0.0081, see docs/speed.md. Other processors round differently, so one image of 16 may differ."""
    benchmark, settings = shapes.BENCHMARK, TagSettings()
    classes, scores = len(benchmark.classes), {}
    towers = {name: clip.load(benchmark.model, "cpu", name, round_weights=False) for name in ("fp32", "bf16")}
    text = clip.text_features(
        towers["fp32"], benchmark.tag_names, benchmark.tag_templates or list(TEMPLATES)
    )
    images = [resized(Image.fromarray(draw(7, index, (96, 128), "val").image), 8) for index in range(16)]
    for name, tower in towers.items():
        tagged = tag_images(tower, images, text, classes, settings)
        scores[name] = np.stack([tags_of_image.scores for tags_of_image in tagged])
    np.testing.assert_allclose(scores["bf16"], scores["fp32"], rtol=0, atol=0.02)
    chosen = [chosen_labels(values, settings.ratio) for values in scores.values()]
    assert sum(a == b for a, b in zip(*chosen, strict=True)) >= 15
