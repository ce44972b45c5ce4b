"""Training samples and resized labels, against golden vectors and Pillow."""

import random

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segmentation.transforms import (
    JitterScaleCrop,
    ScaleCrop,
    caffe_normalize,
    imagenet_denormalize,
    imagenet_normalize,
    jitter_hsv,
    nearest_index,
    resize_labels,
)
from tests.deeplab.common import golden, labels
from tests.weights import parity_image

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
SCALE_CROP = {  # name -> image size (H, W) and transform
    "big": ((90, 120), ScaleCrop(49, SCALES)),
    "wide": ((30, 100), ScaleCrop(49, SCALES)),
    "small": ((25, 20), ScaleCrop(49, (0.5, 0.75, 1.0))),
    "base": ((60, 45), ScaleCrop(33, SCALES, base=55)),
    "basew": ((45, 60), ScaleCrop(33, (1.25,), base=55)),
    "exact": ((49, 49), ScaleCrop(49, (1.0,))),
}
JITTER_SIZES = {"big": (80, 110), "wide": (40, 110), "small": (22, 26)}


class RecordingRandom:
    """A random.Random that records all values drawn from it."""

    def __init__(self, seed):
        self.generator, self.drawn = random.Random(seed), []

    def __getattr__(self, name):
        def draw(*arguments):
            self.drawn.append(getattr(self.generator, name)(*arguments))
            return self.drawn[-1]

        return draw


def sample(prefix, name, size):
    """The image and label from which the golden samples were drawn."""
    label = labels(f"{prefix}:augl_{name}", (1, *size), 21, block=3)[0].astype(np.uint8)
    return parity_image(f"{prefix}:aug_{name}", *size), label


@pytest.mark.parametrize(
    "name, seed", [("big", 0), ("big", 1), ("big", 2), *((name, 3) for name in SCALE_CROP if name != "big")]
)
def test_scale_crop_matches_golden(name, seed):
    arrays, (size, transform) = golden("a_augment"), SCALE_CROP[name]
    draw = RecordingRandom(seed)
    image, label = transform(*sample("dl", name, size), draw)
    np.testing.assert_array_equal(draw.drawn, arrays[f"{name}_seed{seed}_draws"])
    assert (image.dtype, label.dtype) == (np.float32, np.int64)
    assert image.flags.c_contiguous and label.flags.c_contiguous
    np.testing.assert_allclose(image, arrays[f"{name}_seed{seed}_image"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(label, arrays[f"{name}_seed{seed}_label"])


def test_caffe_normalize_matches_golden():
    image, label = sample("dl", "exact", (49, 49))
    np.testing.assert_allclose(caffe_normalize(image), golden("a_augment")["noaug_image"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(label, golden("a_augment")["noaug_label"])


def test_without_flip_no_random_number_is_drawn_for_it():
    image, label = sample("dl", "big", (90, 120))
    draw = RecordingRandom(0)
    plain = ScaleCrop(49, SCALES, flip=False)(image, label, draw)
    assert len(draw.drawn) == 3
    both = [ScaleCrop(49, SCALES)(image, label, random.Random(0))]
    both.append([part[..., ::-1] for part in both[0]])
    assert any(all((a == b).all() for a, b in zip(plain, flipped, strict=True)) for flipped in both)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", JITTER_SIZES)
def test_jitter_scale_crop_matches_golden(name, seed, monkeypatch):
    sizes, resize = [], cv2.resize

    def recording_resize(*arguments, **options):
        sizes.append(resize(*arguments, **options).shape[:2])
        return resize(*arguments, **options)

    monkeypatch.setattr(cv2, "resize", recording_resize)
    arrays = {key.partition(f"{name}_seed{seed}_")[2]: value for key, value in golden("b_augment").items()}
    draw = random.Random(seed)
    image, label = JitterScaleCrop(49)(*sample("r38", name, JITTER_SIZES[name]), draw)
    assert draw.random() == arrays["next_random"]
    assert sizes == [tuple(arrays["scaled_size"])] * 2
    assert (image.dtype, label.dtype) == (np.float32, np.int64)
    compared = image[:, ::2, ::2] if seed == 2 else image
    np.testing.assert_allclose(compared, arrays["image"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(label, arrays["label"])


def test_jitter_hsv_matches_golden():
    image, _ = sample("r38", "big", JITTER_SIZES["big"])
    np.testing.assert_array_equal(jitter_hsv(image, random.Random(0)), golden("b_augment")["big_hsv_only"])
    random_image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    converted = cv2.cvtColor(cv2.cvtColor(random_image, cv2.COLOR_RGB2HSV), cv2.COLOR_HSV2RGB)
    np.testing.assert_array_equal(jitter_hsv(random_image, random.Random(0), most=0), converted)


@pytest.mark.parametrize("index, size", [(0, (40, 56)), (1, (49, 33))])
def test_imagenet_denormalize_matches_golden(index, size):
    image = parity_image(f"r38:ms{index}", *size)
    difference = imagenet_denormalize(imagenet_normalize(image)).astype(np.int16) - image
    expected = golden("b_test")[f"{size[0]}x{size[1]}_denorm_minus_original"]
    np.testing.assert_array_equal(difference, expected)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 50), st.integers(0, 999))
def test_samples_have_crop_size_for_any_image_size(height, width, crop, seed):
    image = np.full((height, width, 3), 200, np.uint8)
    label = np.full((height, width), 7, np.uint8)
    for transform in (ScaleCrop(crop, SCALES), JitterScaleCrop(crop, jitter=0)):
        pixels, labels = transform(image, label, random.Random(seed))
        assert pixels.shape == (3, crop, crop) and labels.shape == (crop, crop)
        assert set(np.unique(labels)) <= {7, 255} and (labels == 7).any()
        np.testing.assert_array_equal(pixels.any(axis=0), labels == 7)  # equal padding


@pytest.mark.parametrize("transform", [ScaleCrop(9, SCALES), JitterScaleCrop(9)])
def test_image_and_mask_of_different_sizes_raise(transform):
    with pytest.raises(ValueError, match=r"image is \(10, 12\) but its mask is \(12, 10\)"):
        transform(np.zeros((10, 12, 3), np.uint8), np.zeros((12, 10), np.uint8), random.Random(0))


def test_nearest_index_matches_golden():
    names = [name for name in golden("a_labels") if name.startswith(("rows_", "cols_"))]
    assert names
    for name in names:
        size, out = map(int, name[5:].split("_to_"))
        np.testing.assert_array_equal(nearest_index(out, size), golden("a_labels")[name])


@given(st.integers(1, 700), st.integers(1, 700))
def test_nearest_index_equals_pillow(size, out):
    line = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    expected = np.asarray(line.resize((out, 1), Image.Resampling.NEAREST))[0]
    np.testing.assert_array_equal(nearest_index(out, size), expected)


@pytest.mark.parametrize("name, size", [("65_to_9", 9), ("65_to_7", 7), ("65_to_5", 5)])
def test_resize_labels_matches_golden(name, size):
    arrays = golden("a_labels")
    resized = resize_labels(torch.from_numpy(arrays["label_65"]).long(), (size, size))
    assert resized.dtype == torch.int64
    np.testing.assert_array_equal(resized, arrays[f"label_{name}"])


def test_resize_labels_takes_height_and_width():
    arrays = golden("a_labels")
    blocky = torch.from_numpy(arrays["label_40x60"])
    np.testing.assert_array_equal(resize_labels(blocky, (5, 8)), arrays["label_40x60_size5x8_fixed"])
    assert resize_labels(blocky, (40, 60)) is blocky
