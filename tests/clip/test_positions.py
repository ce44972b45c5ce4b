"""When a positional table is resampled, and when it is rounded to float16."""
import pytest
import torch

from clip.positions import resample_positions


def test_rounding_policies():
    table = torch.randn(1 + 4 * 4, 8, generator=torch.Generator().manual_seed(0))

    def made(height, width, rounding):
        return resample_positions(table, 4, height, width, rounding)

    assert torch.equal(made(4, 4, "never"), table)
    assert torch.equal(made(4, 4, "resampled"), table)
    assert torch.equal(made(4, 4, "always"), table.half().float())
    plain = made(3, 7, "never")
    assert plain.shape == (22, 8) and torch.equal(plain[0], table[0])
    assert not torch.equal(plain, plain.half().float())
    for rounding in ("always", "resampled"):
        assert torch.equal(made(3, 7, rounding), plain.half().float())
    with pytest.raises(ValueError, match="must be one of"):
        made(4, 4, "sometimes")
