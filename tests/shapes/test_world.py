"""The drawn world is deterministic, works at any size, and its masks match the objects."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shapes.world import BACKGROUNDS, CAPTION_TEMPLATES, CLASSES, MAX_CLASSES, MAX_OBJECTS, STREAMS, draw


def test_classes_that_share_a_color_differ_in_shape_and_texture():
    assert len(CLASSES) >= 10
    assert len(BACKGROUNDS) >= 6
    names = [kind.name for kind in (*CLASSES, *BACKGROUNDS)]
    assert len(set(names)) == len(names)
    colors = [(kind.hue, kind.saturation, kind.value) for kind in CLASSES]
    assert len(set(colors)) <= len(CLASSES) - 4, "four pairs share a color"
    for field in ("shape", "texture"):
        looks = {(color, getattr(kind, field)) for color, kind in zip(colors, CLASSES, strict=True)}
        assert len(looks) == len(CLASSES), f"classes of one color differ in {field}"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 10**6), st.sampled_from(sorted(STREAMS)))
def test_mask_matches_the_objects_at_any_size(height, width, index, stream):
    scene = draw(3, index, (height, width), stream)
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == scene.mask.dtype == np.uint8
    assert 1 <= len(scene.objects) <= MAX_OBJECTS
    assert 1 <= len(scene.labels) <= MAX_CLASSES
    assert set(np.unique(scene.mask)) - {0} == {label + 1 for label in scene.labels}
    boxed = np.zeros_like(scene.mask)
    for drawn in scene.objects:
        x0, y0, x1, y1 = drawn.box
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert 0 < drawn.visible <= 1
        assert (scene.mask[y0:y1, x0:x1] == drawn.label + 1).any()
        boxed[y0:y1, x0:x1] = 1
    assert not scene.mask[boxed == 0].any(), "every object pixel is inside a box"


def test_caption_names_the_objects_and_background():
    for index in range(30):
        scene = draw(0, index, (64, 64))
        present = {CLASSES[label].name for label in scene.labels} | {BACKGROUNDS[scene.background].name}
        words = set(scene.caption.rstrip(".").replace(",", "").split())
        names = {kind.name for kind in (*CLASSES, *BACKGROUNDS)}
        assert words & names == present


def test_templates_have_one_placeholder():
    assert all(template.count("{}") == 1 for template in CAPTION_TEMPLATES)


def test_scene_depends_on_every_argument_and_is_repeatable():
    def image(*arguments):
        return draw(*arguments).image.tobytes()

    base = image(1, 2, (40, 50), "train")
    assert base == image(1, 2, (40, 50), "train")
    others = [image(2, 2, (40, 50), "train"), image(1, 3, (40, 50), "train")]
    others += [image(1, 2, (40, 50), stream) for stream in ("val", "clip")]
    assert len({base, *others}) == 5


def test_streams_share_no_image():
    arguments = [(seed, i, (24, 24), stream) for stream in STREAMS for seed in (0, 1) for i in range(40)]
    images = [draw(*args).image.tobytes() for args in arguments]
    assert len(set(images)) == len(images)


def test_mean_color_of_objects_differs_from_the_background():
    """The dense CRF requires a color contrast at object edges."""
    for index in range(20):
        scene = draw(5, index, (96, 96))
        background = scene.image[scene.mask == 0].mean(0)
        for label in scene.labels:
            inside = scene.image[scene.mask == label + 1].mean(0)
            assert np.abs(inside - background).max() > 20


def test_side_below_one_is_an_error():
    with pytest.raises(ValueError, match="at least one pixel, got 0 x 5"):
        draw(0, 0, (0, 5))
