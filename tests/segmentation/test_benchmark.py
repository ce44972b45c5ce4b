"""Benchmarks: YAML files, defaults, and errors for invalid fields."""
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from segmentation.benchmark import Benchmark, load, voc_palette
from tests.deeplab.common import golden

FULL = """
name: leaves
classes: [oak, maple]
prompts: [oak leaf, maple leaf]
backgrounds: [ground, sky]
templates: ["a photo of a {}."]
box_threshold: 0.5
labels: masks
root: data
image_dir: images
mask_dir: masks
split_file: train.txt
model: ViT-B/16
"""


def write(folder, text):
    file = folder / "benchmark.yaml"
    file.write_text(text)
    return file


def test_voc_palette_matches_golden():
    palette = voc_palette()
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    known = {0: (0, 0, 0), 1: (128, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: tuple(palette[index].tolist()) for index in known} == known
    painted = golden("b_metrics")["colormap_255_and_0_to_20"]  # from a reference implementation
    np.testing.assert_array_equal(palette[:21], painted[:21])  # its last row, 255, is white: not compared


def test_load_reads_the_fields_of_a_yaml_file(tmp_path):
    benchmark = load(str(write(tmp_path, FULL)))
    assert benchmark.prompts == ["oak leaf", "maple leaf"]
    assert benchmark.channels == 3
    assert benchmark.path(benchmark.image_dir) == tmp_path / "data" / "images"
    assert benchmark.path("/elsewhere").is_absolute()
    assert benchmark.split_file == str(tmp_path / "train.txt")
    assert benchmark.model == "ViT-B/16"


def test_load_fills_defaults_of_a_minimal_yaml_file(tmp_path):
    benchmark = load(str(write(tmp_path, "{name: a, classes: [x, y], has_background: false}")))
    assert benchmark.prompts == ["x", "y"]
    assert benchmark.channels == 2
    assert benchmark.path("") == tmp_path
    assert benchmark.split_file == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [x]", "missing mandatory value: name"),
        ("{name: a, classes: []}", "benchmark a: classes is empty"),
        ("{name: a, classes: [x, x]}", "classes contains these names more than once: x"),
        ("{name: a, classes: [x, y], prompts: [u]}", "2 classes but 1 prompts"),
        ("{name: a, classes: [x], labels: guess}", "labels must be one of voc_xml, file"),
        ("{name: a, classes: [x], templates: [a photo]}", "a: template 'a photo' must contain one {}"),
        ("{name: a, classes: [x], typo: 1}", "Key 'typo' not in"),
        ("{name: a, classes: [x], box_threshold: high}", "could not be converted to Float"),
        ("{name: a, classes: [x, y], category_ids: [1]}", "one distinct id for each of the 2 classes"),
        ("{name: a, classes: [x], tag_templates: [a photo]}", "a: template 'a photo' must contain one {}"),
        ("{name: a, classes: [x, y], has_background: false, groups: [0], group_names: [u]}", "each class"),
        ("{name: a, classes: [x], has_background: false, groups: [1], group_names: [u]}", "into group_names"),
        ("{name: a, classes: [x], groups: [0], group_names: [u]}", "has_background must be false"),
        ("{name: a, classes: [x], has_background: false, group_names: [u]}", "must be given together"),
        ("{name: a, classes: [x], has_background: false, groups: [0], group_names: [u, u]}", "duplicates"),
        ("[x, y]", r"benchmark\.yaml: "),
        ("name: [", r"benchmark\.yaml: while parsing"),
        ("", "missing mandatory value"),
    ],
)
def test_invalid_yaml_raises_value_error(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load(str(write(tmp_path, text)))


@pytest.mark.parametrize("template", ["{} {x}", "{} {}", "{} {", "{0} {}", "{{}}", "{.x} {}", "a photo", ""])
def test_template_without_exactly_one_placeholder_raises(template):
    with pytest.raises(ValueError, match="benchmark a: template") as error:
        Benchmark("a", ["x"], templates=["a {}.", template])
    assert repr(template) in str(error.value)


def test_load_of_unknown_benchmark_raises(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml does not exist"):
        load(str(tmp_path / "none.yaml"))
    message = r"no benchmark .*: give voc12, coco14, cocostuff, shapes or a \.yaml"
    for name in ("", "os", "os.path", "../voc12", "voc"):
        with pytest.raises(ValueError, match=message):
            load(name)


def test_tag_names_are_classes_and_tag_backgrounds():
    benchmark = Benchmark("a", ["x", "y"], prompts=["x ray", "y"], backgrounds=["sky"])
    assert benchmark.tag_names == ["x", "y", "sky"]
    benchmark.tag_backgrounds = []
    assert benchmark.tag_names == ["x", "y"]


@given(st.integers(250, 260), st.booleans())
def test_more_than_255_mask_values_raise(count, has_background):
    names = [str(i) for i in range(count)]
    if count + has_background <= 255:
        assert Benchmark("many", names, has_background=has_background).channels == count + has_background
    else:
        with pytest.raises(ValueError, match="an index mask can store 255 values"):
            Benchmark("many", names, has_background=has_background)


def test_documented_example_has_every_field(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    text = page.split("```yaml\n")[1].split("```")[0]
    assert set(yaml.safe_load(text)) == {field.name for field in fields(Benchmark)}
    assert load(str(write(tmp_path, text))).classes == ["oak", "maple", "birch"]
