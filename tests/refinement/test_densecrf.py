"""The dense CRF: golden vectors, agreement of backends on many shapes, batches, errors."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinement.densecrf import BACKENDS, PRESETS, Preset, densecrf, densecrf_batch
from refinement.presets import unary, wrapped_bgr
from shapes.world import draw
from tests.conftest import golden, needs_pydensecrf
from tests.refinement.backends import ALL_BACKENDS
from tests.weights import parity_image

CLIP_ES = PRESETS["clip_es"]


@pytest.fixture(scope="module")
def crf():
    return golden("crf")


def stacked(crf, index):
    maps = crf[f"cams{index}"]
    return np.concatenate([1 - maps.max(0, keepdims=True), maps])


def drawn(index, size, channels=3, seed=5):
    """An image drawn by `shapes`, and its mask as blurred, noisy probabilities of `channels` classes."""
    scene, random = draw(seed, index, size), np.random.default_rng([seed, index])
    lookup = np.append(0, np.full(255, channels - 1))
    lookup[[label + 1 for label in scene.labels]] = np.arange(len(scene.labels)) % channels
    masks = (lookup[scene.mask] == np.arange(channels)[:, None, None]).astype(np.float32)
    coarse = random.random((channels, size[0] // 8 + 1, size[1] // 8 + 1), np.float32)
    maps = [
        cv2.GaussianBlur(mask, (0, 0), 4) * 0.7 + cv2.resize(noise, size[::-1]) * 0.3
        for mask, noise in zip(masks, coarse, strict=True)
    ]
    return scene.image, np.stack(maps).astype(np.float16)


def test_wrapped_bgr_wraps_as_on_x86():
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    blue = wrapped_bgr(levels)[:, 0, 0]
    assert (blue[0], blue[103], blue[104], blue[105], blue[106]) == (152, 255, 0, 0, 1)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_posterior_and_labels_match_golden(crf, index, backend):
    probabilities = stacked(crf, index)
    image = parity_image(f"es_crf{index}", *probabilities.shape[1:])
    assert (wrapped_bgr(image)[:8] == crf[f"bgr_wrapped{index}"]).all()
    # The last bit of NumPy's float16 logarithm differs between builds for a few values.
    energies = unary(probabilities, CLIP_ES)[:, ::4, ::4]
    np.testing.assert_allclose(energies, crf[f"unary{index}"], rtol=1e-3)
    assert (energies == crf[f"unary{index}"]).mean() > 0.999

    posterior = densecrf(image, probabilities, backend=backend)
    assert posterior.dtype == np.float32
    np.testing.assert_allclose(posterior, crf[f"Q{index}"], atol=1e-4)
    labels = np.append(0, crf[f"keys{index}"] + 1)[posterior.argmax(0)]
    labels[posterior.max(0) < 0.95] = 255
    assert (labels == crf[f"pseudo{index}"]).all()


def test_unary_type_changes_the_posterior_less_than_image_mode(crf):
    probabilities = stacked(crf, 0)
    image = parity_image("es_crf0", *probabilities.shape[1:])
    full = densecrf(image, probabilities, replace(CLIP_ES, unary_type="float32"))
    assert 0 < np.abs(full - crf["Q0"]).max() < 3e-2
    raw = densecrf(image, probabilities, replace(CLIP_ES, image_mode="raw"))
    assert np.abs(raw - crf["Q0"]).max() > 3e-2


@needs_pydensecrf
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 21), st.integers(0, 2**31))
def test_posterior_sums_to_1_and_backends_agree_on_any_shape(height, width, channels, seed):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    probabilities = random.random((channels, height, width)).astype(np.float16)
    reference = densecrf(image, probabilities, backend="pydensecrf")
    assert reference.shape == (channels, height, width)
    np.testing.assert_allclose(reference.sum(0), 1, atol=1e-4)
    for backend in ("numba", "torch"):
        np.testing.assert_allclose(densecrf(image, probabilities, backend=backend), reference, atol=1e-3)


@needs_pydensecrf
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("size, channels", [((120, 160), 3), ((75, 101), 5), ((1, 90), 2), ((60, 1), 18)])
def test_backends_agree_on_drawn_images(size, channels, backend):
    for index in range(3):
        image, probabilities = drawn(index, (max(size), max(size)), channels)
        image, probabilities = image[: size[0], : size[1]], probabilities[:, : size[0], : size[1]]
        reference = densecrf(image, probabilities, backend="pydensecrf")
        assert np.abs(reference - probabilities).max() > 0.1  # the CRF changes the probabilities
        posterior = densecrf(image, probabilities, backend=backend)
        np.testing.assert_allclose(posterior, reference, atol=1e-3)
        assert (posterior.argmax(0) == reference.argmax(0)).mean() >= 0.999


def mixed_batch():
    sizes = [((40, 56), 3), ((56, 40), 2), ((1, 1), 4), ((33, 64), 1), ((40, 56), 7), ((1, 20), 3)]
    return zip(*(drawn(index, *case) for index, case in enumerate(sizes)), strict=True)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_batch_gives_the_same_results_as_single_images(backend, monkeypatch):
    images, probabilities = mixed_batch()
    single = [densecrf(*pair, backend=backend) for pair in zip(images, probabilities, strict=True)]
    together = densecrf_batch(images, probabilities, backend=backend)
    tensors = densecrf_batch(
        list(map(torch.from_numpy, images)), list(map(torch.from_numpy, probabilities)), backend=backend
    )
    monkeypatch.setattr("refinement.densecrf_torch.GROUP_PIXELS", 5000)
    grouped = densecrf_batch(images, probabilities, backend=backend)
    for one, *others in zip(single, together, tensors, grouped, strict=True):
        assert torch.is_tensor(others[1])
        assert all(isinstance(posterior, np.ndarray) for posterior in (one, others[0], others[2]))
        for posterior in others:
            np.testing.assert_allclose(posterior, one, atol=1e-6)
    assert densecrf_batch([], [], backend=backend) == []


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_views_and_read_only_arrays_are_accepted(backend):
    image, probabilities = drawn(1, (20, 30))
    raw = replace(CLIP_ES, image_mode="raw")
    expected = densecrf(image[::-1].copy(), probabilities[:, ::-1].copy(), raw, backend)
    image.flags.writeable = probabilities.flags.writeable = False
    np.testing.assert_array_equal(densecrf(image[::-1], probabilities[:, ::-1], raw, backend), expected)


def test_threads_give_the_same_results_as_one_thread():
    pairs = list(zip(*mixed_batch(), strict=True)) * 3
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda pair: densecrf(*pair, backend="numba"), pairs))
    for pair, posterior in zip(pairs, threaded, strict=True):
        np.testing.assert_array_equal(posterior, densecrf(*pair, backend="numba"))


def test_auto_uses_numba_on_a_cpu_and_torch_on_other_devices(monkeypatch):
    image, probabilities = drawn(0, (24, 30))
    monkeypatch.setitem(BACKENDS, "numba", lambda *arguments: ["numba"])
    monkeypatch.setitem(BACKENDS, "torch", lambda *arguments: ["torch", arguments[3]])
    assert densecrf(image, probabilities) == "numba"
    tensors = [torch.from_numpy(image)], [torch.from_numpy(probabilities)]
    assert densecrf_batch(*tensors) == ["numba"]
    assert densecrf_batch([image], [probabilities], device="cuda") == ["torch", "cuda"]
    assert densecrf_batch([image], [torch.zeros(2, 24, 30, device="meta")])[0] == "torch"


def test_missing_backend_raises_with_the_install_command(monkeypatch):
    image, probabilities = drawn(0, (4, 5))
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "refinement.densecrf_numba", raising=False)
    monkeypatch.delattr("refinement.densecrf_numba", raising=False)
    with pytest.raises(ValueError, match="pip install numba"):
        densecrf(image, probabilities, backend="numba")


def test_invalid_arguments_raise():
    image, probabilities = np.zeros((4, 5, 3), np.uint8), np.ones((2, 4, 5), np.float16)
    with pytest.raises(ValueError, match=r"\(4, 5\) but the image is \(5, 4\)"):
        densecrf(image.transpose(1, 0, 2), probabilities)
    with pytest.raises(ValueError, match="uint8 image"):
        densecrf(image.astype(np.float32), probabilities)
    with pytest.raises(ValueError, match="no CRF preset 'seam2'"):
        densecrf(image, probabilities, "seam2")
    with pytest.raises(ValueError, match="no CRF backend"):
        densecrf(image, probabilities, backend="magic")
    with pytest.raises(ValueError, match="2 images but 1 arrays"):
        densecrf_batch([image, image], [probabilities])
    with pytest.raises(ValueError, match=r"at least one class and pixel, got .*\(0, 4, 5\)"):
        densecrf(image, probabilities[:0])
    with pytest.raises(ValueError, match="bilateral_srgb must be a number above 0, got 0"):
        replace(CLIP_ES, bilateral_srgb=0)
    with pytest.raises(ValueError, match="gaussian_compat must be a number, 0 or more, got -1"):
        replace(CLIP_ES, gaussian_compat=-1)
    with pytest.raises(ValueError, match="image_mode must be one of raw, bgr, wrapped, got 'gray'"):
        replace(CLIP_ES, image_mode="gray")
    with pytest.raises(ValueError, match="unary_type must be one of float16, float32, got 'float8'"):
        Preset(1, 1, 1, 1, 1, 1, unary_type="float8")


def prob(dtype) -> np.ndarray:
    """Probabilities (2, 4, 5) of 0, 0.5 and 1, which every floating type represents; or of 0 and 1."""
    values = np.array([0, 0.5, 1, 0.5, 1] * 4).reshape(4, 5)
    return np.stack([values, 1 - values]).round(0 if np.dtype(dtype).kind in "biu" else 1).astype(dtype)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("preset", ["clip_es", "deeplab"])
@pytest.mark.parametrize("dtype", ["<f2", ">f2", ">f4", ">f8", "f8", "g", "?", "u1", ">i8"])
def test_number_types_are_converted(backend, preset, dtype):
    image, probabilities = drawn(0, (4, 5))[0], prob(dtype)
    expected = densecrf(image, probabilities.astype(np.float32), preset, "numba")
    posterior = densecrf(image, probabilities, preset, backend)
    assert posterior.dtype == np.float32 and posterior.dtype.isnative
    np.testing.assert_allclose(posterior, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float8_e4m3fn", "uint8", "bool"])
def test_types_of_tensors_are_converted(backend, dtype):
    image = drawn(0, (4, 5))[0]
    probabilities = torch.from_numpy(prob("u1" if dtype in ("uint8", "bool") else "f4"))
    expected = densecrf(image, probabilities.float().numpy(), backend="numba")
    tensor = probabilities.to(getattr(torch, dtype))
    (posterior,) = densecrf_batch([torch.from_numpy(image)], [tensor], backend=backend)
    np.testing.assert_allclose(posterior, expected, atol=1e-6)
    strided = torch.stack([tensor, tensor], -1)[..., 0]
    (posterior,) = densecrf_batch([image], [strided], backend=backend)
    np.testing.assert_allclose(posterior, expected, atol=1e-6)
    if tensor.is_floating_point() and tensor.itemsize > 1:
        (posterior,) = densecrf_batch([image], [tensor.requires_grad_()], backend=backend)
        assert not posterior.requires_grad


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    "value, message",
    [
        (np.nan, "have NaN or infinity"),
        (np.inf, "have NaN or infinity"),
        (-np.inf, "have NaN or infinity"),
        (1e300, "have NaN or infinity"),
        (7.5, r"must be in 0\.\.1, got 0\.\.7\.5: apply a softmax"),
        (-3, r"must be in 0\.\.1, got -3\.\.1: apply a softmax"),
    ],
)
def test_invalid_probabilities_raise(backend, as_tensor, value, message):
    image = drawn(0, (4, 5))[0]
    for dtype in (np.float16, np.float32, np.float64):
        if abs(value) == 1e300 and dtype != np.float64:
            continue
        probabilities = prob(dtype)
        probabilities[1, 2, 3] = value
        probabilities = torch.from_numpy(probabilities) if as_tensor else probabilities
        with pytest.raises(ValueError, match=f"^class probabilities {message}"):
            densecrf_batch([image], [probabilities], backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_rounding_errors_of_probabilities_are_clipped(backend):
    image, probabilities = drawn(0, (4, 5))[0], prob(np.float32)
    rounded = probabilities.copy()
    rounded[0, 0, 0], rounded[1, 0, 0] = -0.004, 1.004
    np.testing.assert_array_equal(
        densecrf(image, rounded, backend=backend), densecrf(image, probabilities, backend=backend)
    )


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_posterior_that_is_not_finite_raises(backend):
    """float16 has no energy of a probability below 1e-8, so that no class is possible."""
    image, preset = drawn(0, (4, 5))[0], replace(CLIP_ES, clip=1e-9)
    with pytest.raises(ValueError, match="posterior of the CRF is not finite: give a preset with a larger"):
        densecrf(image, np.zeros((2, 4, 5), np.float32), preset, backend)


@pytest.mark.parametrize(
    "probabilities, message",
    [
        (np.zeros((2, 4, 5), complex), "must be numbers, got complex128"),
        (np.zeros((2, 4, 5), object), "must be numbers, got object"),
        (np.zeros((2, 4, 5), "U1"), "must be numbers, got <U1"),
        (torch.zeros((2, 4, 5), dtype=torch.complex64), "must be dense real numbers"),
        (torch.zeros((2, 4, 5)).to_sparse(), "must be dense real numbers"),
        ([[[1.0] * 5] * 4] * 2, "requires arrays or tensors, got a list"),
        (None, "requires arrays or tensors, got a NoneType"),
    ],
)
def test_other_types_raise(probabilities, message):
    with pytest.raises(ValueError, match=message):
        densecrf_batch([np.zeros((4, 5, 3), np.uint8)], [probabilities])
