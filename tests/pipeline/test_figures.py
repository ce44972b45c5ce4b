"""Figures of the report page."""

import numpy as np

from pipeline import figures
from segmentation.benchmark import IGNORE, Benchmark


def test_ignored_pixels_are_hatched():
    labels = np.full((16, 16), IGNORE, np.uint8)
    labels[:, 8:] = 1
    palette = Benchmark("tiny", ["cat", "bird"]).palette
    painted = figures.paint(labels, palette)
    assert len(np.unique(painted[:, :8])) == 2
    assert (painted[:, 8:] == palette[1]).all()


def test_overlay_keeps_the_image_where_activation_is_zero():
    image = np.full((4, 5, 3), 90, np.uint8)
    cam = np.zeros((4, 5), np.float16)
    cam[2, 2] = 1
    changed = (figures.cam_overlay(image, cam) != image).any(-1)
    assert changed.sum() == 1 and changed[2, 2]
