"""mAP and F1 of labels, against golden vectors and values computed by hand."""

import numpy as np
import pytest

from pipeline.label_scores import choose
from segmentation.label_metrics import AVERAGES, average_precisions, f1, label_scores
from tests.tagclip.common import golden

RULES = {
    "relative_0_5": (0.5,),
    "relative_0_1": (0.1,),
    "absolute_0_6": (0.6, "absolute"),
    "top3": (3, "top"),
}


@pytest.fixture(scope="module")
def expected():
    return golden("metrics")


def test_average_precision_matches_golden(expected):
    predictions, truth = expected["predictions"], expected["labels"]
    found = average_precisions(predictions, truth)
    assert np.isnan(found[3]) and not truth[:, 3].any()
    np.testing.assert_allclose(np.nan_to_num(found), expected["ap"], atol=1e-6)
    result = label_scores(predictions, truth, list("abcdefghi"), choose(predictions, 0.5))
    assert result["mAP"] == pytest.approx(float(expected["mAP"]), abs=1e-6)
    assert result["mAP of classes with positives"] == pytest.approx(result["mAP"] * 9 / 8)
    assert result["classes without positives"] == 1 and result["AP"]["d"] is None
    assert [result[key] for key in ("F1", "Precision", "Recall")] == pytest.approx(
        expected["overall/relative_0_5"].tolist(), abs=1e-6
    )


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("rule", RULES)
def test_f1_matches_golden(expected, rule, average):
    chosen = choose(expected["predictions"], *RULES[rule])
    if rule == "top3":  # all scores of row 3 are equal; the golden vectors contain three arbitrary classes
        assert chosen[3].nonzero()[0].tolist() == [0, 1, 2]
        chosen[3] = np.arange(9) >= 6
    found = f1(chosen, expected["labels"], average)
    np.testing.assert_allclose(found, expected[f"{average}/{rule}"], atol=1e-6)


def test_f1_without_positives_is_nan():
    nothing = np.zeros((3, 2), bool)
    for average in AVERAGES:
        score, precision, recall = f1(nothing, nothing, average)
        assert np.isnan(score) and precision == recall == 0


def test_average_precision_keeps_the_order_of_ties():
    truth = np.array([[0], [1], [0], [1]])
    assert average_precisions(np.zeros((4, 1)), truth)[0] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average_precisions(np.array([[0], [1], [0], [1]]), truth)[0] == 1
