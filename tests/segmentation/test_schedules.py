"""The poly schedule against the learning rates of both reference implementations."""

import numpy as np
import pytest

from segmentation.schedules import poly
from tests.deeplab.common import golden

GROUPS_A, GROUPS_B = (1, 10, 20), (1, 2, 10, 20)


@pytest.mark.parametrize("name", ["voc", "coco", "short", "step1"])
def test_poly_matches_golden_of_deeplab_v2(name):
    arrays = golden("a_lr")
    base, every, iterations, power = arrays[f"{name}_cfg"]
    factors = [poly(int(done), int(iterations), power, int(every)) for done in arrays[f"{name}_iter"]]
    np.testing.assert_allclose(base * np.outer(factors, GROUPS_A), arrays[f"{name}_lr"], rtol=1e-9)


@pytest.mark.parametrize("name, base, iterations", [("seam", 1e-3, 20000), ("fork", 5e-3, 40000)])
def test_poly_matches_golden_of_resnet38(name, base, iterations):
    arrays = golden("b_train")
    factors = [poly(int(done), iterations + 1) for done in arrays[f"poly_{name}_iter"]]
    np.testing.assert_allclose(base * np.outer(factors, GROUPS_B), arrays[f"poly_{name}_lr"], rtol=1e-9)


def test_poly_is_constant_after_the_last_iteration():
    factors = [poly(done, 25, every=10) for done in range(40)]
    assert factors[:10] == [1.0] * 10
    assert factors == sorted(factors, reverse=True)
    np.testing.assert_allclose(factors[20:], 0.2**0.9, rtol=1e-12)  # 20 is the last multiple of 10 below 25
    assert poly(30, 20) == 0
