"""CRF presets of both DeepLab networks against golden vectors, on every backend."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refinement.densecrf import PRESETS, densecrf
from refinement.presets import guide_image, wrapped_bgr
from segmentation.transforms import imagenet_denormalize, imagenet_normalize
from tests.deeplab.common import golden
from tests.refinement.backends import ALL_BACKENDS
from tests.weights import parity_array, parity_image

CASES = {"sq": (48, 48, 5), "wide": (37, 61, 21), "two": (30, 45, 2), "one": (20, 25, 1)}


def softmax(logits):
    return F.softmax(torch.from_numpy(logits), dim=0).numpy()


def upsampled(name):
    """Probabilities (C, H, W) from logits of an eighth of the size."""
    height, width, classes = CASES[name]
    coarse = parity_array(f"dl:crfl_{name}", (classes, -(-height // 8), -(-width // 8)), scale=2.0)
    logits = F.interpolate(torch.from_numpy(coarse)[None], (height, width), mode="bilinear")[0]
    return F.softmax(logits, dim=0).numpy()


def assert_labels(posterior, expected):
    assert (posterior.argmax(0) != expected).mean() <= 1e-3


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_deeplab_v2_presets_match_golden(name, backend):
    arrays, probabilities = golden("a_crf"), upsampled(name)
    every = 2 if len(probabilities) > 6 else 1
    np.testing.assert_allclose(probabilities[:, ::4, ::4], arrays[f"{name}_prob"], rtol=0, atol=1e-6)
    image = parity_image(f"dl:crf_{name}", *probabilities.shape[1:])
    np.testing.assert_array_equal(wrapped_bgr(image), arrays[f"{name}_wrapped_image"])
    for preset, kind in [("deeplab", "raw"), ("deeplab_published", "wrapped")]:
        posterior = densecrf(image, probabilities, preset, backend)
        np.testing.assert_allclose(
            posterior[:, ::every, ::every], arrays[f"{name}_Q_{kind}"], rtol=0, atol=1e-4
        )
        assert_labels(posterior, arrays[f"{name}_label_{kind}"])


def test_wrapped_bgr_equals_double_precision_for_all_gray_levels():
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    shifted = levels - np.array([104.008, 116.669, 122.675])
    np.testing.assert_array_equal(wrapped_bgr(levels), np.trunc(shifted).astype(np.int64) % 256)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("index, size", [(0, (40, 56)), (1, (49, 33))])
def test_seam_preset_matches_golden(index, size, backend):
    name = f"{size[0]}x{size[1]}_"
    arrays = {key.removeprefix(name): value for key, value in golden("b_test").items()}
    image = imagenet_denormalize(imagenet_normalize(parity_image(f"r38:ms{index}", *size)))
    posterior = densecrf(image, softmax(arrays["mean_logits"]), "seam", backend)
    np.testing.assert_allclose(posterior, arrays["Q_crf"], rtol=0, atol=1e-4)
    assert_labels(posterior, arrays["label_crf"])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dataset, preset", [("voc12", "r38_voc"), ("coco", "r38_coco")])
def test_presets_of_weakclips_fork_match_golden(dataset, preset, backend):
    """The fork keeps only the logits of classes that are the maximum of at least one pixel."""
    arrays = golden("b_test")
    keys = arrays["fork_keys"]
    np.testing.assert_array_equal(np.unique(arrays["40x56_mean_logits"].argmax(0)), keys)
    image = parity_image("r38:ms0", 40, 56)
    posterior = densecrf(image, softmax(arrays["40x56_mean_logits"][keys]), preset, backend)
    np.testing.assert_allclose(posterior, arrays[f"fork_{dataset}_Q"], rtol=0, atol=1e-4)
    assert (keys[posterior.argmax(0)] != arrays[f"fork_{dataset}_label"]).mean() <= 1e-3


def test_guide_image_of_each_preset():
    image = parity_image("dl:crf_two", 30, 45)
    expected = {"deeplab": image[..., ::-1], "deeplab_published": wrapped_bgr(image)}
    for preset in ["deeplab", "deeplab_published", "seam", "r38_voc", "r38_coco"]:
        np.testing.assert_array_equal(guide_image(image, PRESETS[preset]), expected.get(preset, image))
