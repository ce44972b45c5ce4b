"""Resizing of labels against the golden vectors and Pillow."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segmentation.transforms import nearest_index, resize_labels
from tests.deeplab.common import golden


def test_golden_index_of_label_sizes():
    names = [name for name in golden("a_labels") if name.startswith(("rows_", "cols_"))]
    assert names
    for name in names:
        size, out = map(int, name[5:].split("_to_"))
        np.testing.assert_array_equal(nearest_index(out, size), golden("a_labels")[name])


@given(st.integers(1, 700), st.integers(1, 700))
def test_nearest_index_is_pillows(size, out):
    line = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    expected = np.asarray(line.resize((out, 1), Image.Resampling.NEAREST))[0]
    np.testing.assert_array_equal(nearest_index(out, size), expected)


@pytest.mark.parametrize("name, size", [("65_to_9", 9), ("65_to_7", 7), ("65_to_5", 5)])
def test_golden_resized_labels(name, size):
    arrays = golden("a_labels")
    resized = resize_labels(torch.from_numpy(arrays["label_65"]).long(), (size, size))
    assert resized.dtype == torch.int64
    np.testing.assert_array_equal(resized, arrays[f"label_{name}"])


def test_sizes_are_height_and_width():
    arrays = golden("a_labels")
    labels = torch.from_numpy(arrays["label_40x60"])
    np.testing.assert_array_equal(resize_labels(labels, (5, 8)), arrays["label_40x60_size5x8_fixed"])
    assert resize_labels(labels, (40, 60)) is labels
