"""The permutohedral lattice of a Gaussian kernel: its scale, and how its points are numbered.

The features of a pixel (position, perhaps color), divided by the kernel's widths, are a point of a space of d
dimensions. It is embedded in the hyperplane of d + 1 coordinates that sum to zero, where lattice points have
integer coordinates equal modulo d + 1 (Adams, Baek and Davis, "Fast high-dimensional filtering using the
permutohedral lattice", 2010). The first d of them are a point's key, packed into one integer as the digits of
a mixed radix: a step along a lattice direction adds a constant to it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVELS = 255  # maximum of a color channel
MAX_COORDINATE = 2**20  # up to here float32 places a point within 1/16 of a lattice cell
MAX_KEYS = 2**62


class Kernel(NamedTuple):
    """A Gaussian kernel: `widths` (sxy, sxy) or (sxy, sxy, srgb, srgb, srgb), Potts weight `compat`."""

    widths: tuple[float, ...]
    compat: float

    @property
    def alpha(self) -> float:
        """Factor by which a filtered constant is about the constant again."""
        return 1 / (1 + 2.0 ** -len(self.widths))


class Packing(NamedTuple):
    """How the d coordinates of a key become one integer: the sum of (coordinate - low) * stride."""

    scale: tuple[np.float32, ...]  # (d,), of the features in the embedding
    low: tuple[int, ...]  # (d,), less than any coordinate of a point or of its neighbors
    strides: tuple[int, ...]  # (d,)
    keys: int  # number of possible packed keys

    @property
    def jumps(self) -> tuple[int, ...]:
        """(d + 1,) constants that a step along each lattice direction adds to a packed key."""
        step, total = len(self.strides) + 1, sum(self.strides)
        return tuple(total - step * stride for stride in (*self.strides, 0))


def packing(widths: Sequence[float], height: int, width: int) -> Packing:
    """Return the packing of a kernel's widths for images of up to (height, width) pixels.

    Raises:
        ValueError: the kernel is so narrow, or the image so large, that keys do not fit 62 bits.
    """
    dimensions = len(widths)
    factor = float(np.float32(math.sqrt(2 / 3) * (dimensions + 1)))  # blur and weights make a unit Gaussian
    scale = [np.float32(factor / math.sqrt((i + 2) * (i + 1))) for i in range(dimensions)]
    extents = [width - 1, height - 1] + [LEVELS] * (dimensions - 2)
    furthest = [float(s) * extent / w for s, extent, w in zip(scale, extents, widths, strict=True)]
    # Coordinate j is the sum of the scaled features from j on, less j times feature j - 1. A vertex lies
    # within d + 1 of the pixel's own coordinate, a neighbor of the vertex within another d + 1.
    margin = 2 * (dimensions + 1) + 1
    low, strides, keys = [], [], 1
    for j in range(dimensions):
        least, most = -j * furthest[j - 1] if j else 0.0, sum(furthest[j:])
        if max(-least, most) > MAX_COORDINATE:
            keys = MAX_KEYS
            break
        low.append(math.floor(least) - margin)
        strides.append(keys)
        keys *= math.ceil(most) + margin - low[j] + 1
    if keys >= MAX_KEYS:
        raise ValueError(
            f"CRF kernel widths {', '.join(f'{w:g}' for w in widths)} are too narrow for an image of "
            f"{height} x {width} pixels: its lattice cannot be numbered; widen them or make the image smaller"
        )
    return Packing(tuple(scale), tuple(low), tuple(strides), keys)
