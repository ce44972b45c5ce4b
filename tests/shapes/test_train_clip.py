"""Training of the small CLIP runs and resumes to the same weights; its losses have the documented minima."""
import csv

import pytest
import torch

from shapes import train_clip
from shapes.train_clip import NAMES, Recipe, contrast, draw_batch, grouping, learning_rate, train

SMALL = Recipe(steps=2, batch=4, side=16, big_side=24, warm_up=1)


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch):
    monkeypatch.setattr(train_clip, "probe", lambda *_: 0.5)


def test_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole = train(SMALL, tmp_path / "whole.pt", log_every=1, probe_every=1)

    class Killed(Exception):
        pass

    def draw_until_killed(recipe, step):
        if step == 1:
            raise Killed
        return draw_batch(recipe, step)

    monkeypatch.setattr(train_clip, "draw_batch", draw_until_killed)
    with pytest.raises(Killed):
        train(SMALL, tmp_path / "halves.pt", log_every=1, probe_every=1)
    assert not (tmp_path / "halves.pt").exists()
    monkeypatch.setattr(train_clip, "draw_batch", draw_batch)
    train(SMALL, tmp_path / "halves.pt", log_every=1, probe_every=1)
    saved = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "halves")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert saved[0].keys() == whole.state_dict().keys()
    assert {value.dtype for value in saved[0].values()} == {torch.float16}
    assert not list(tmp_path.glob("*.resume")), "a finished run has a checkpoint and a log only"
    with open(tmp_path / "halves.csv") as stream:
        assert [row["step"] for row in csv.DictReader(stream)] == ["1", "2"]


def test_resume_file_of_another_recipe_or_damaged_is_an_error(tmp_path):
    torch.save({"recipe": {"steps": 3}}, tmp_path / "a.resume")
    with pytest.raises(ValueError, match="belongs to another recipe: delete it to restart"):
        train(SMALL, tmp_path / "a.pt")
    (tmp_path / "a.resume").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"cannot be read \(ValueError\): delete it to restart"):
        train(SMALL, tmp_path / "a.pt")


def test_batches_differ_by_step_and_tags_match_captions():
    first, again, second = (draw_batch(SMALL, step) for step in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert first.texts == again.texts
    assert first.texts != second.texts
    for tags, caption in zip(first.tags, first.texts[len(NAMES) :], strict=True):
        assert [name in caption.rstrip(".").replace(",", "").split() for name in NAMES] == tags.tolist()


def test_contrast_ignores_other_matches_of_a_row():
    logits = torch.tensor([[9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    matches = torch.tensor([[True, True, False], [False, False, True]])
    assert contrast(logits, matches) < 1e-6, "two matches of a row do not compete"
    assert contrast(-logits, matches) > 5


def test_grouping_is_zero_for_attention_within_one_name_and_color():
    logits = torch.full((1, 4, len(NAMES)), -20.0)
    logits[0, :2, 0] = logits[0, 2:, 1] = 20.0
    tags = torch.zeros(1, len(NAMES), dtype=torch.bool)
    tags[0, :2] = True
    image = torch.zeros(1, 3, 16, 16)  # four patches
    pairs = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))[None] / 2
    assert grouping(pairs, logits, tags, image) < 1e-4
    assert grouping(torch.full((1, 4, 4), 0.25), logits, tags, image) > 0.5
    image[..., 8:] = 9  # now the two patches of each name differ in color
    assert grouping(pairs, logits, tags, image) > 0.5
    assert grouping(torch.eye(4)[None], logits, tags, image) < 1e-4


def test_learning_rate_rises_then_falls():
    recipe = Recipe(steps=1000)
    rates = [learning_rate(recipe, step) for step in range(1000)]
    peak = rates.index(max(rates))
    assert peak < 150
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 2 * recipe.final_rate
