"""Resampling of a positional table, and its rounding to float16."""
import pytest
import torch

from clip.positions import resample_positions


def test_resample_positions_rounds_as_requested():
    table = torch.randn(1 + 4 * 4, 8, generator=torch.Generator().manual_seed(0))

    def resampled(height, width, rounding):
        return resample_positions(table, 4, height, width, rounding)

    assert torch.equal(resampled(4, 4, "never"), table)
    assert torch.equal(resampled(4, 4, "resampled"), table)
    assert torch.equal(resampled(4, 4, "always"), table.half().float())
    plain = resampled(3, 7, "never")
    assert plain.shape == (22, 8) and torch.equal(plain[0], table[0])
    assert not torch.equal(plain, plain.half().float())
    for rounding in ("always", "resampled"):
        assert torch.equal(resampled(3, 7, rounding), plain.half().float())
    with pytest.raises(ValueError, match="must be one of"):
        resampled(4, 4, "sometimes")
