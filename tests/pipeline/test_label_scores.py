"""The rule that makes labels from scores, and the files of scores."""

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


def test_files_of_scores_are_read_back_and_damage_raises(tmp_path):
    scores = {name: np.random.default_rng(number).random(3, np.float32) for number, name in enumerate("abcd")}
    first = write_scores(tmp_path, {name: scores[name] for name in "cb"})
    assert write_scores(tmp_path, {name: scores[name] for name in "bc"}) == first  # the same images
    write_scores(tmp_path, {name: scores[name] for name in "ad"})
    stored = read_scores(tmp_path, 3)
    assert stored.keys() == scores.keys()
    assert all(np.array_equal(stored[name], scores[name]) for name in scores)
    assert read_scores(tmp_path / "none", 3) == {}
    with pytest.raises(ValueError, match=r"is damaged \(its scores have the shape \(2, 3\)\): remove"):
        read_scores(tmp_path, 4)
    first.write_bytes(first.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{first.name} is damaged"):
        read_scores(tmp_path, 3)
