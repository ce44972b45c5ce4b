"""Positional tables, resampled from the trained patch grid to the grid of an image."""
import torch
import torch.nn.functional as F
from torch import Tensor

POSITION_ROUNDINGS = ("always", "resampled", "never")


def resample_positions(table: Tensor, grid: int, height: int, width: int, rounding: str = "always") -> Tensor:
    """Return a positional table resampled (bilinear) to another grid, (1 + height * width, C) float32.

    Args:
        table: (1 + grid * grid, C); the first row, for the class token (ViT) or the mean (ResNet), is kept.
        rounding: when the result is rounded to float16 (a relative change of at most 2^-11): "always" (as in
            CLIP-ES's reference implementation, also for float32 models), "resampled" (only if the grid
            differs from the trained one) or "never".

    Raises:
        ValueError: the rounding is unknown.
    """
    if rounding not in POSITION_ROUNDINGS:
        raise ValueError(f"position rounding must be one of {POSITION_ROUNDINGS}, got {rounding!r}")
    table = table.float()
    resampled = (height, width) != (grid, grid)
    if resampled:
        patches = table[1:].T.reshape(1, -1, grid, grid)
        patches = F.interpolate(patches, (height, width), mode="bilinear", align_corners=False)
        table = torch.cat([table[:1], patches.flatten(2)[0].T])
    if rounding == "always" or (rounding == "resampled" and resampled):
        table = table.half().float()
    return table
