"""The Python interface (ClipES, TagCLIP, Segmenter) gives the results of the scripts."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import voc12
from clip_wsss import ClipES, Segmenter, TagCLIP
from clip_wsss.checks import check_packages
from segmentation import camfile
from segmentation.masks import read_mask
from tagclip import Tagger, TagSettings
from tests.conftest import parity_image
from tests.processes import here

SIZE, LABELS = (96, 128), [8, 1, 5]  # golden case a
NAMES = [voc12.CLASSES[index] for index in LABELS]


@pytest.fixture(scope="module")
def model(parity_file) -> str:
    return str(parity_file("tiny", 1))


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return parity_image("es_a", SIZE)


@pytest.fixture(scope="module")
def clip_es(model) -> ClipES:
    return ClipES(model, device="cpu")


@pytest.fixture(scope="module")
def result(clip_es, image):
    return clip_es(image, NAMES)


def test_a_transparent_image_has_the_result_of_its_stored_colors(clip_es, result, image):
    transparent = image.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(image.size))
    found = clip_es(transparent, NAMES)
    assert (found.mask == result.mask).all() and (found.image == result.image).all()


def test_masks_and_cams_equal_those_of_the_script(result, model, image, tmp_path):
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")
    (tmp_path / "labels.txt").write_text("a " + " ".join(map(str, LABELS)) + "\n")
    code, _, errors = here(
        "pseudo_masks.py", "--benchmark", "voc12", "--image_root", tmp_path / "images", "--split_file",
        tmp_path / "labels.txt", "--labels", tmp_path / "labels.txt", "--model", model, "--output",
        tmp_path / "masks", "--keep_cams", "full", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, errors
    class_ids, cams = camfile.read(tmp_path / "masks" / "cams", "a")
    assert class_ids.tolist() == LABELS
    # The script encodes more prompts in a batch, which changes rounding.
    np.testing.assert_allclose(np.float32(result.cams), np.float32(cams), atol=1e-3)
    mask = read_mask(tmp_path / "masks" / "a.png")
    values = np.arange(256, dtype=np.uint8)
    values[1 : len(LABELS) + 1] = np.array(LABELS) + 1
    assert (values[result.mask] == mask).mean() >= 0.9999
    assert result.posterior.shape == (4, *SIZE)
    np.testing.assert_allclose(result.posterior.sum(0), 1, atol=1e-5)
    confident = result.posterior.max(0) >= 0.95
    assert (result.mask[confident] == result.posterior.argmax(0)[confident]).all()
    assert (result.mask[~confident] == 255).all()


def test_paths_and_arrays_give_the_same_result(clip_es, result, image, tmp_path):
    file = tmp_path / "photo.png"
    image.save(file)
    for same in (file, str(file), np.asarray(image)):
        other = clip_es(same, NAMES)
        np.testing.assert_array_equal(other.mask, result.mask)
        np.testing.assert_array_equal(other.image, result.image)


def test_list_of_images_gives_a_list(clip_es, result, image):
    other = parity_image("es_b", (75, 100))
    results = clip_es([image, other, image], [NAMES, ["car"], NAMES])
    assert [item.mask.shape for item in results] == [SIZE, (75, 100), SIZE]
    np.testing.assert_allclose(np.float32(results[0].cams), np.float32(result.cams), atol=1e-3)
    assert (results[2].mask == result.mask).mean() >= 0.9999
    assert [item.names for item in clip_es([image, other], ["cat"])] == [["cat"], ["cat"]]


def test_labels_exclude_backgrounds_of_their_own_image_only(clip_es, image):
    (first, _), alone = clip_es([image, image], [["cat"], ["cat", "grass"]]), clip_es(image, ["cat"])
    np.testing.assert_allclose(np.float32(first.cams), np.float32(alone.cams), atol=1e-3)


@pytest.mark.parametrize(
    ("images", "labels", "error", "match"),
    [
        ("one", "cat", TypeError, "a list of class names, got 'cat'"),
        ("one", 3, TypeError, "a list of class names, got 3"),
        ("one", [], ValueError, "no labels"),
        ("one", [["cat"]], TypeError, r"labels must be a list of class names, got \[\['cat'\]\]"),
        ("one", ["cat", " "], TypeError, "list of class names"),
        ("two", [["cat"]], ValueError, "1 lists of labels for 2 images"),
        ("two", [["cat"], "dog"], TypeError, "labels of each image must be a list of class names, got 'dog'"),
        ("two", [["cat"], [3]], TypeError, r"got \[3\]"),
        ("missing", ["cat"], ValueError, r"image number 0 \(from 0\): image nothing\.jpg does not exist"),
        ("float", ["cat"], TypeError, "uint8 array, got float64 array"),
        ("none", ["cat"], TypeError, "uint8 array, got NoneType"),
    ],
)
def test_wrong_arguments_are_errors(images, labels, error, match, clip_es, image):
    inputs = {"one": image, "two": [image, image], "missing": "nothing.jpg", "float": np.zeros((4, 4, 3)),
              "none": None}  # fmt: skip
    with pytest.raises(error, match=match):
        clip_es(inputs[images], labels)


def test_settings_are_keyword_arguments(model, image, result):
    every_pixel = ClipES(model, device="cpu", confidence=0, refine="none")(image, NAMES)
    assert (every_pixel.mask != 255).all()
    assert not np.array_equal(every_pixel.cams, result.cams)
    with pytest.raises(TypeError, match=r"ClipES has no setting 'confidense'; did you mean confidence\?"):
        ClipES(model, confidense=0.5)
    for value in (0, 2.5):
        with pytest.raises(ValueError, match=f"affinity_layers must be a whole number, .* got {value}"):
            ClipES(model, affinity_layers=value)
    with pytest.raises(TypeError, match="backgrounds must be a list of class names, got 'grass'"):
        ClipES(model, backgrounds="grass")


def test_backgrounds_and_affinity_are_arguments(model, image, result):
    def identity(images: torch.Tensor) -> torch.Tensor:
        patches = images.shape[-2] * images.shape[-1] // 256
        return torch.eye(patches).expand(len(images), -1, -1)

    own = ClipES(model, device="cpu", affinity=identity, refine="mhsa", keep_initial=True)(image, NAMES)
    plain = ClipES(model, device="cpu", refine="none")(image, NAMES)
    np.testing.assert_allclose(np.float32(own.cams), np.float32(plain.cams), atol=1e-3)
    alone = ClipES(model, device="cpu", backgrounds=[])(image, ["cat"])
    assert alone.cams.shape == (1, *SIZE)


def test_benchmark_without_background_gives_masks_without_background(model, image, tmp_path):
    file = tmp_path / "stuff.yaml"
    file.write_text("name: stuff\nclasses: [sky, sea, sand]\nbackgrounds: [tree]\nhas_background: false\n")
    result = ClipES(model, benchmark=str(file), device="cpu", confidence=0)(image, ["sand", "sky"])
    assert result.posterior.shape == (2, *SIZE) and not result.has_background
    np.testing.assert_array_equal(result.mask, result.posterior.argmax(0))
    result.overlay()


def test_overlay_has_a_legend_and_saved_mask_is_equal(result, tmp_path):
    overlay = result.overlay()
    assert overlay.size[1] > SIZE[0] and overlay.mode == "RGB"
    result.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), result.mask)


def test_tag_clip_gives_the_scores_of_the_tagger(model, image):
    tagger = TagCLIP(model, ["cat", "dog", "sofa"], device="cpu", ratio=0.4)
    tags = tagger(image)
    backgrounds = [name for name in voc12.BENCHMARK.tag_backgrounds if name not in tagger.classes]
    expected = Tagger(
        tagger.tagger.model, tagger.classes, backgrounds, settings=TagSettings(ratio=0.4)
    )(image)
    np.testing.assert_array_equal(tags.scores, expected.scores)
    assert tagger.names(tags) and set(tagger.names(tags)) <= {"cat", "dog", "sofa"}
    assert len(tagger([image, image])) == 2
    with pytest.raises(TypeError, match="TagCLIP has no setting 'ration'"):
        TagCLIP(model, ration=0.4)


def test_another_package_named_clip_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "__init__.py").write_text("")
    with pytest.raises(ImportError, match=r"'clip' is imported from .* from OpenAI's CLIP, .*: uninstall"):
        check_packages(tmp_path)
    monkeypatch.delitem(sys.modules, "clip")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=str(tmp_path / "clip")):
        check_packages(Path(__file__).parents[2])


def test_folder_without_training_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is not the folder of a training run: give the run\.output"):
        Segmenter(tmp_path)
