"""Packed lattice keys: steps are constants, no two points share a key, what does not fit is an error."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from refinement.densecrf import PRESETS, densecrf
from refinement.lattice import MAX_KEYS, packing

CLIP_ES = PRESETS["clip_es"]


@pytest.mark.parametrize("kernel", CLIP_ES.kernels())
def test_a_key_never_leaves_its_digits(kernel):
    """Neighbours of the vertices at the outermost pixels have keys of their own, too."""
    height, width = 7, 11
    pack = packing(kernel.widths, height, width)
    d = len(kernel.widths)
    ends = [width - 1, height - 1] + [255] * (d - 2)
    bounds = (*pack.strides[1:], pack.keys)
    highest = [(stride - own) // own for own, stride in zip(pack.strides, bounds, strict=True)]
    for corner in product(*((0, end) for end in ends)):
        scaled = np.array(corner) / kernel.widths * pack.scale
        elevated = np.array([scaled[j:].sum() - j * (scaled[j - 1] if j else 0) for j in range(d)])
        digits = elevated - pack.low
        assert (digits > 2 * (d + 1)).all()
        assert (digits < np.array(highest) - 2 * (d + 1)).all()


def test_jumps_are_lattice_directions():
    pack = packing((67, 67, 3, 3, 3), 10, 20)
    for j, jump in enumerate(pack.jumps):
        direction = [1 - 6 * (j == i) for i in range(6)]  # in the hyperplane: they sum to 0
        assert jump == sum(step * stride for step, stride in zip(direction[:5], pack.strides, strict=True))
    assert sum(pack.jumps) == 0


def test_large_images_fit_and_narrow_kernels_are_told():
    for kernel in CLIP_ES.kernels():
        assert packing(kernel.widths, 9000, 12000).keys < MAX_KEYS
    image, probabilities = np.zeros((3, 4, 3), np.uint8), np.ones((2, 3, 4), np.float16)
    for narrow in ({"bilateral_srgb": 0.01}, {"gaussian_sxy": 1e-7}):
        for backend in ("numba", "torch"):
            with pytest.raises(ValueError, match="too narrow for an image of 3 x 4 pixels"):
                densecrf(image, probabilities, replace(CLIP_ES, **narrow), backend)
