"""Packed lattice keys: steps add constants, coordinates stay in range, and too large keys raise an error."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from refinement.densecrf import PRESETS, densecrf
from refinement.lattice import MAX_KEYS, packing

CLIP_ES = PRESETS["clip_es"]


@pytest.mark.parametrize("kernel", CLIP_ES.kernels())
def test_coordinates_of_all_points_and_neighbors_fit_their_digits(kernel):
    """The margin of 2 (d + 1) covers a vertex and its neighbors, also at the corners of the feature space."""
    height, width = 7, 11
    pack = packing(kernel.widths, height, width)
    d = len(kernel.widths)
    extents = [width - 1, height - 1] + [255] * (d - 2)
    next_strides = (*pack.strides[1:], pack.keys)
    highest = [following // stride - 1 for stride, following in zip(pack.strides, next_strides, strict=True)]
    for corner in product(*((0, extent) for extent in extents)):
        scaled = np.array(corner) / kernel.widths * pack.scale
        elevated = np.array([scaled[j:].sum() - j * (scaled[j - 1] if j else 0) for j in range(d)])
        digits = elevated - pack.low
        assert (digits > 2 * (d + 1)).all()
        assert (digits < np.array(highest) - 2 * (d + 1)).all()


def test_jumps_are_steps_along_the_lattice_directions():
    pack = packing((67, 67, 3, 3, 3), 10, 20)
    for j, jump in enumerate(pack.jumps):
        direction = [1 - 6 * (j == i) for i in range(6)]  # the sum is 0, so it is in the hyperplane
        assert jump == sum(step * stride for step, stride in zip(direction[:5], pack.strides, strict=True))
    assert sum(pack.jumps) == 0


def test_large_images_fit_and_narrow_kernels_raise():
    for kernel in CLIP_ES.kernels():
        assert packing(kernel.widths, 9000, 12000).keys < MAX_KEYS
    image, probabilities = np.zeros((3, 4, 3), np.uint8), np.ones((2, 3, 4), np.float16)
    for narrow in ({"bilateral_srgb": 0.01}, {"gaussian_sxy": 1e-7}):
        for backend in ("numba", "torch"):
            with pytest.raises(ValueError, match="too narrow for an image of 3 x 4 pixels"):
                densecrf(image, probabilities, replace(CLIP_ES, **narrow), backend)
