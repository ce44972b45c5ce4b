"""The dense CRF against the golden vectors, and on shapes that images come in."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinement.densecrf import PRESETS, Preset, densecrf, unary, wrapped_bgr
from tests.conftest import golden
from tests.weights import parity_image

CLIP_ES = PRESETS["clip_es"]


@pytest.fixture(scope="module")
def crf():
    return golden("crf")


def stacked(crf, index):
    maps = crf[f"cams{index}"]
    return np.concatenate([1 - maps.max(0, keepdims=True), maps])


def test_every_grey_level_wraps_as_it_does_on_x86():
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    blue = wrapped_bgr(levels)[:, 0, 0]
    assert (blue[0], blue[103], blue[104], blue[105], blue[106]) == (152, 255, 0, 0, 1)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_golden(crf, index):
    probabilities = stacked(crf, index)
    image = parity_image(f"es_crf{index}", *probabilities.shape[1:])
    assert (wrapped_bgr(image)[:8] == crf[f"bgr_wrapped{index}"]).all()
    # NumPy's float16 logarithm differs between builds in the last bit of a value now and then.
    energies = unary(probabilities, CLIP_ES)[:, ::4, ::4]
    np.testing.assert_allclose(energies, crf[f"unary{index}"], rtol=1e-3)
    assert (energies == crf[f"unary{index}"]).mean() > 0.999

    posterior = densecrf(image, probabilities)
    assert posterior.dtype == np.float32
    np.testing.assert_allclose(posterior, crf[f"Q{index}"], atol=1e-4)
    labels = np.append(0, crf[f"keys{index}"] + 1)[posterior.argmax(0)]
    labels[posterior.max(0) < 0.95] = 255
    assert (labels == crf[f"pseudo{index}"]).all()


def test_options_move_the_posterior_little_or_much(crf):
    probabilities = stacked(crf, 0)
    image = parity_image("es_crf0", *probabilities.shape[1:])
    full = densecrf(image, probabilities, replace(CLIP_ES, unary_type="float32"))
    assert 0 < np.abs(full - crf["Q0"]).max() < 3e-2
    raw = densecrf(image, probabilities, replace(CLIP_ES, image_mode="raw"))
    assert np.abs(raw - crf["Q0"]).max() > 3e-2


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 21), st.integers(0, 2**31))
def test_posterior_is_a_distribution_on_any_shape(height, width, channels, seed):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    posterior = densecrf(image, random.random((channels, height, width)).astype(np.float16))
    assert posterior.shape == (channels, height, width)
    np.testing.assert_allclose(posterior.sum(0), 1, atol=1e-4)


def test_wrong_use_is_told():
    image, probabilities = np.zeros((4, 5, 3), np.uint8), np.ones((2, 4, 5), np.float16)
    with pytest.raises(ValueError, match=r"\(4, 5\) but the image is \(5, 4\)"):
        densecrf(image.transpose(1, 0, 2), probabilities)
    with pytest.raises(ValueError, match="uint8 image"):
        densecrf(image.astype(np.float32), probabilities)
    with pytest.raises(ValueError, match="no CRF preset 'seam2'"):
        densecrf(image, probabilities, "seam2")
    with pytest.raises(ValueError, match="no CRF backend"):
        densecrf(image, probabilities, backend="magic")
    with pytest.raises(ValueError, match="image mode"):
        replace(CLIP_ES, image_mode="grey")
    with pytest.raises(ValueError, match="unary type"):
        Preset(1, 1, 1, 1, 1, 1, unary_type="float8")
