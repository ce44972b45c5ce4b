"""attend_with_weights equals the masked softmax to float32 accuracy, for any number of heads per chunk."""

import math

import pytest
import torch

from clip.model import attend_with_weights, heads_per_chunk


@pytest.mark.parametrize("bias", [0.0, -3.0, -60.0, -100.0, -math.inf])
@pytest.mark.parametrize("size", [1.0, 6.0])
def test_attend_with_weights_equals_masked_softmax(bias, size):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, 64)  # (B, heads, L, 64)
    query, key = size * query, size**0.5 * key
    mask = torch.full((20, 20), bias).fill_diagonal_(0)
    output, attention, _ = attend_with_weights(query, key, value, mask)
    scores = query.double() @ key.double().mT / 8
    expected = (scores + mask).softmax(-1) @ value.double()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(attention.double(), scores.softmax(-1).mean(1), rtol=0, atol=1e-6)


def test_mask_of_minus_100_can_be_overcome_by_high_scores():
    """The mask is added to scores, so a high score outweighs it. Weights below 1e-30 are exactly 0."""
    value = torch.zeros(1, 1, 2, 64)
    value[0, 0, 1] = 1  # the output of token 0 is then its weight on token 1
    mask = torch.full((2, 2), -100.0).fill_diagonal_(0)
    for score in (0.0, 20.0, 40.0, 80.0, 95.0, 100.0, 105.0, 300.0):
        query, key = torch.zeros(2, 1, 1, 2, 64)
        query[0, 0, 0, 0], key[0, 0, 1, 0] = 8.0, score
        output, *_ = attend_with_weights(query, key, value, mask)
        weight = 1 / (1 + math.exp(100 - score))
        assert output[0, 0, 0, 0].item() == pytest.approx(weight if weight > 1e-30 else 0, rel=1e-4, abs=0)


def test_half_precision_returns_float32_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 64).bfloat16()
    mask = torch.full((9, 9), -100.0).fill_diagonal_(0)
    output, attention, _ = attend_with_weights(query, key, value, mask.bfloat16())
    assert output.dtype == torch.bfloat16 and attention.dtype == torch.float32
    assert torch.equal(output, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads_at_once", [2, 3, 5])
def test_chunks_of_heads_equal_single_heads(dtype, masked, heads_at_once):
    """Of the chunk sizes, 2 and 3 do not divide the 5 heads."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 20, 64).to(dtype)
    mask = torch.randn(2, 1, 20, 20).to(dtype) if masked else None
    by_head = attend_with_weights(query, key, value, mask, keep_heads=True, heads_at_once=1)
    chunked = attend_with_weights(query, key, value, mask, keep_heads=True, heads_at_once=heads_at_once)
    for one, other in zip(by_head, chunked, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert by_head[2].shape == (5, 2, 20, 20)
    plain = attend_with_weights(query, key, value, mask)  # heads_at_once is 1 on a CPU
    assert plain[2] is None and torch.equal(plain[0], by_head[0]) and torch.equal(plain[1], by_head[1])


@pytest.mark.parametrize("masked", [False, True])
def test_result_with_gradients_equals_result_without(masked):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, 64)
    mask = torch.randn(20, 20) if masked else None
    expected = attend_with_weights(query, key, value, mask, keep_heads=True)
    result = attend_with_weights(query.requires_grad_(), key, value, mask, keep_heads=True)
    assert result[0].requires_grad
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=1e-6)


def test_heads_per_chunk_is_1_on_a_cpu_and_limited_by_memory_on_a_gpu():
    assert heads_per_chunk(torch.empty(32, 12, 751, 64)) == 1
    for batch, length, heads in ((1, 197, 12), (1, 751, 12), (4, 1500, 3), (32, 3000, 1)):
        assert heads_per_chunk(FakeCuda(batch, length)) == heads


class FakeCuda:
    """Stub with the attributes that `heads_per_chunk` reads: float32 queries of 12 heads on a GPU."""

    device = torch.device("cuda")

    def __init__(self, batch: int, length: int):
        self.shape = (batch, 12, length, 64)

    def element_size(self) -> int:
        return 4
