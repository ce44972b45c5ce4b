"""The last block's attention in closed form is the softmax with a bias off the diagonal."""

import math

import pytest
import torch

from clip.model import attend_with_map
from tagclip import TagSettings
from tagclip.patches import attend_to_self


@pytest.mark.parametrize("bias", [0.0, -3.0, -100.0, -math.inf])
@pytest.mark.parametrize("size", [1.0, 6.0])
def test_is_the_biased_softmax(bias, size):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, 64)  # (B, heads, L, 64)
    query, key = size * query, size**0.5 * key
    mixed, attention = attend_to_self(query, key, value, bias)
    mask = torch.full((20, 20), bias).fill_diagonal_(0)
    scores = query.double() @ key.double().mT / 8
    expected = (scores + mask).softmax(-1) @ value.double()
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(attention, attend_with_map(query, key, value)[1])


def test_hears_others_where_its_own_score_is_far_below():
    """At the float32 softmax's end: the bias makes up for what the own score lacks."""
    value = torch.zeros(1, 1, 2, 64)
    value[0, 0, 1] = 1  # what token 0 hears of token 1 is the weight itself
    for behind in (80.0, 95.0, 100.0, 105.0, 300.0):
        query, key = torch.zeros(2, 1, 1, 2, 64)
        query[0, 0, 0, 0], key[0, 0, 1, 0] = 8.0, behind
        mixed, _ = attend_to_self(query, key, value, -100.0)
        expected = 1 / (1 + math.exp(100 - behind))
        assert mixed[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_half_precision():
    torch.manual_seed(0)
    parts = torch.randn(3, 1, 2, 9, 64).bfloat16()
    mixed, attention = attend_to_self(*parts, -100.0)
    assert mixed.dtype == torch.bfloat16 and attention.dtype == torch.float32
    assert torch.equal(mixed, parts[2])


def test_others_cannot_be_favoured():
    with pytest.raises(ValueError, match="diagonal_bias must be 0 or less, got 1"):
        TagSettings(diagonal_bias=1.0)
