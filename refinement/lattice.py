"""The permutohedral lattice of a Gaussian kernel: its scale, and the keys of its points.

The features of a pixel (position, and color for the appearance kernel), divided by the kernel's widths, are a
point in d dimensions. It is embedded in the hyperplane of d + 1 coordinates whose sum is zero. There, lattice
points have integer coordinates that are equal modulo d + 1 (Adams, Baek and Davis, "Fast high-dimensional
filtering using the permutohedral lattice", 2010). The key of a lattice point is its first d coordinates,
packed into one integer as the digits of a mixed-radix number. A step along a lattice direction adds a
constant to the key.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVELS = 255  # maximum of a color channel
MAX_COORDINATE = 2**20  # up to this value float32 is accurate to 1/16 of a lattice cell
MAX_KEYS = 2**62


class Kernel(NamedTuple):
    """A Gaussian kernel: `widths` (sxy, sxy) or (sxy, sxy, srgb, srgb, srgb), and Potts weight `compat`."""

    widths: tuple[float, ...]
    compat: float

    @property
    def alpha(self) -> float:
        """Factor of the filter result. It makes filtering approximately preserve a constant."""
        return 1 / (1 + 2.0 ** -len(self.widths))


class Packing(NamedTuple):
    """Packing of the d coordinates of a key into one integer: the sum of (coordinate - low) * stride."""

    scale: tuple[np.float32, ...]  # (d,), factors of the features in the embedding
    low: tuple[int, ...]  # (d,), below all coordinates of points and of their neighbors
    strides: tuple[int, ...]  # (d,)
    keys: int  # number of possible packed keys

    @property
    def jumps(self) -> tuple[int, ...]:
        """(d + 1,) constants; a step along direction i adds jumps[i] to a packed key."""
        step, total = len(self.strides) + 1, sum(self.strides)
        return tuple(total - step * stride for stride in (*self.strides, 0))


def packing(widths: Sequence[float], height: int, width: int) -> Packing:
    """Return the packing of keys for a kernel's widths and images of up to (height, width) pixels.

    Raises:
        ValueError: keys do not fit in 62 bits, because the kernel is too narrow or the image too large.
    """
    dimensions = len(widths)
    factor = float(np.float32(math.sqrt(2 / 3) * (dimensions + 1)))  # makes the filter a Gaussian of width 1
    scale = [np.float32(factor / math.sqrt((i + 2) * (i + 1))) for i in range(dimensions)]
    extents = [width - 1, height - 1] + [LEVELS] * (dimensions - 2)
    largest = [float(s) * extent / w for s, extent, w in zip(scale, extents, widths, strict=True)]
    # Coordinate j is the sum of the scaled features from j on, minus j times feature j - 1. A vertex is
    # within d + 1 of the pixel's coordinate, and a neighbor of the vertex within another d + 1.
    margin = 2 * (dimensions + 1) + 1
    low, strides, keys = [], [], 1
    for j in range(dimensions):
        least, most = -j * largest[j - 1] if j else 0.0, sum(largest[j:])
        if max(-least, most) > MAX_COORDINATE:
            keys = MAX_KEYS
            break
        low.append(math.floor(least) - margin)
        strides.append(keys)
        keys *= math.ceil(most) + margin - low[j] + 1
    if keys >= MAX_KEYS:
        raise ValueError(
            f"CRF kernel widths {', '.join(f'{w:g}' for w in widths)} are too narrow for an image of "
            f"{height} x {width} pixels: its lattice points cannot be numbered; use wider kernels or a "
            "smaller image"
        )
    return Packing(tuple(scale), tuple(low), tuple(strides), keys)
