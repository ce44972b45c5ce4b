"""Attention that gives its map too: with a mask it is the softmax with that mask, to what float32 shows."""

import math

import pytest
import torch

from clip.model import attend_with_map


@pytest.mark.parametrize("bias", [0.0, -3.0, -60.0, -100.0, -math.inf])
@pytest.mark.parametrize("size", [1.0, 6.0])
def test_is_the_masked_softmax(bias, size):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, 64)  # (B, heads, L, 64)
    query, key = size * query, size**0.5 * key
    mask = torch.full((20, 20), bias).fill_diagonal_(0)
    mixed, attention = attend_with_map(query, key, value, mask)
    scores = query.double() @ key.double().mT / 8
    expected = (scores + mask).softmax(-1) @ value.double()
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(attention.double(), scores.softmax(-1).mean(1), rtol=0, atol=1e-6)


def test_a_mask_is_no_wall():
    """A score that is higher than the mask is low comes through; what does not is nothing, not denormal."""
    value = torch.zeros(1, 1, 2, 64)
    value[0, 0, 1] = 1  # what token 0 hears of token 1 is the weight itself
    mask = torch.full((2, 2), -100.0).fill_diagonal_(0)
    for ahead in (0.0, 20.0, 40.0, 80.0, 95.0, 100.0, 105.0, 300.0):
        query, key = torch.zeros(2, 1, 1, 2, 64)
        query[0, 0, 0, 0], key[0, 0, 1, 0] = 8.0, ahead
        mixed, _ = attend_with_map(query, key, value, mask)
        weight = 1 / (1 + math.exp(100 - ahead))
        assert mixed[0, 0, 0, 0].item() == pytest.approx(weight if weight > 1e-30 else 0, rel=1e-4, abs=0)


def test_half_precision():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 64).bfloat16()
    mask = torch.full((9, 9), -100.0).fill_diagonal_(0)
    mixed, attention = attend_with_map(query, key, value, mask.bfloat16())
    assert mixed.dtype == torch.bfloat16 and attention.dtype == torch.float32
    assert torch.equal(mixed, value)
