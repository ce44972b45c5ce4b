"""The rule that makes labels from scores, and the files of scores."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.label_scores import choose, chosen_labels, read_scores, write_scores


@given(
    arrays.arrays(np.float32, (5, 4), elements=st.floats(0, 1, width=32)),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_labels_are_the_chosen_classes_or_the_best_one(scores, ratio):
    for row, chosen, ids in zip(scores, choose(scores, ratio), chosen_labels(scores, ratio), strict=True):
        low, high = row.min(), row.max()
        above = [k for k in range(4) if row[k] > low + ratio * (high - low)]
        assert np.flatnonzero(chosen).tolist() == above
        assert ids == (above or [int(np.argmax(row))])


def test_files_of_scores_are_read_back(tmp_path):
    scores = {name: np.random.default_rng(number).random(3, np.float32) for number, name in enumerate("abcd")}
    first = write_scores(tmp_path, {name: scores[name] for name in "cb"})
    assert write_scores(tmp_path, {name: scores[name] for name in "bc"}) == first  # the same images
    write_scores(tmp_path, {name: scores[name] for name in "ad"})
    stored = read_scores(tmp_path, 3)
    assert stored.keys() == scores.keys()
    assert all(np.array_equal(stored[name], scores[name]) for name in scores)
    assert read_scores(tmp_path / "none", 3) == {}


def npz(**arrays) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


NAMES = np.array(["a", "b"])


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it is empty"),
        (b"<html>not found</html>", "File is not a zip file"),
        (npz(names=NAMES, scores=np.zeros((2, 3), np.float32))[:200], "File is not a zip file"),
        (npz(names=NAMES, scores=np.zeros((2, 4), np.float32)), r"its scores have the shape \(2, 4\)"),
        (npz(names=NAMES, scores=np.zeros(6, np.float32)), r"its scores have the shape \(6,\)"),
        (npz(names=NAMES, scores=np.full((2, 3), np.nan)), "its scores are not finite"),
        (npz(names=NAMES, scores=np.full((2, 3), 1e300)), "its scores are not finite"),
        (npz(names=NAMES, scores=np.array([["x"] * 3] * 2)), "have the types"),
        (npz(names=np.arange(2), scores=np.zeros((2, 3), np.float32)), "have the types"),
        (npz(names=np.array("a"), scores=np.zeros((2, 3), np.float32)), "its scores have the shape"),
        (npz(names=NAMES), "it has no names or no scores"),
        (npz(names=NAMES.astype(object), scores=np.zeros((2, 3))), "array of type object"),
    ],
)
def test_damaged_file_of_scores_is_logged_and_skipped(tmp_path, caplog, content, reason):
    good = write_scores(tmp_path, {"c": np.ones(3, np.float32)})
    damaged = tmp_path / "scores-damaged.npz"
    damaged.write_bytes(content)
    assert read_scores(tmp_path, 3).keys() == {"c"}
    (record,) = caplog.records
    assert record.levelname == "WARNING" and good.name not in record.message
    assert f"{damaged} is damaged (" in record.message and "its images are scored again" in record.message
    assert re.search(reason, record.message) or not content
