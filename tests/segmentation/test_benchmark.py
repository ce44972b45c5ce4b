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
        ("classes: [x]", r"benchmark\.yaml: the field name is missing: add it"),
        ("{name: a, classes: []}", "benchmark a: classes is empty"),
        ("{name: a, classes: [x, x]}", "classes contains these names more than once: x"),
        ("{name: a, classes: [x, y], prompts: [u]}", "2 classes but 1 prompts"),
        ("{name: a, classes: [x], labels: guess}", "labels must be one of voc_xml, file"),
        ("{name: a, classes: [x], templates: [a photo]}", "a: template 'a photo' must contain one {}"),
        ("{name: a, classes: [x], typo: 1}", "line 1: unknown field 'typo': the fields are name, classes"),
        ("{name: a, classes: [x], box_threshold: high}", "must be a number from 0 to 1, got 'high'"),
        ("{name: a, classes: [x, y], category_ids: [1]}", "one distinct id for each of the 2 classes"),
        ("{name: a, classes: [x], tag_templates: [a photo]}", "a: template 'a photo' must contain one {}"),
        ("{name: a, classes: [x, y], has_background: false, groups: [0], group_names: [u]}", "each class"),
        ("{name: a, classes: [x], has_background: false, groups: [1], group_names: [u]}", "into group_names"),
        ("{name: a, classes: [x], groups: [0], group_names: [u]}", "has_background must be false"),
        ("{name: a, classes: [x], has_background: false, group_names: [u]}", "must be given together"),
        ("{name: a, classes: [x], has_background: no, groups: [0], group_names: [u, u]}", "than once: u"),
        ("[x, y]", r"benchmark\.yaml, line 1: the file must contain fields, name: value; got a list"),
        ("name: [", r"benchmark\.yaml, line 1: the file ends before the bracket"),
        ("", "the field name is missing"),
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


@pytest.mark.parametrize(
    "names",
    ["no, off, NO, Yes, y", "1e3, 007, 0x1F, 12:30, 1_000", "2024-01-01, .inf, =, <<", "R&B, a*b, c#, ñ, 猫"],
)
@pytest.mark.parametrize("field", ["classes", "prompts", "backgrounds", "tag_backgrounds"])
def test_names_are_read_as_written(tmp_path, names, field):
    count = names.count(",") + 1
    classes = "" if field == "classes" else f"classes: [{', '.join('abcdef'[:count])}]\n"
    benchmark = load(str(write(tmp_path, f"name: on\n{classes}{field}: [{names}]\n")))
    assert getattr(benchmark, field) == names.split(", ") and benchmark.name == "on"


def test_fields_of_text_numbers_and_booleans_keep_their_meaning(tmp_path):
    text = "{name: a, classes: [x], has_background: no, box_threshold: 1e-1, model: 007, root: off}"
    benchmark = load(str(write(tmp_path, text)))
    assert (benchmark.has_background, benchmark.box_threshold, benchmark.model) == (False, 0.1, "007")
    assert benchmark.root == str(tmp_path / "off")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("classes: [a, ~]", 2, "classes must be a list of names, .*; item 2 is null; .*quotes"),
        ("classes:\n- a\n-\n", 4, "classes .* item 2 is null; .*quotes"),
        ("classes: [[a, b], c]", 2, "classes .* item 1 is a list"),
        ("classes:\n- traffic: light\n", 3, "classes .* item 1 is a mapping .*quotes"),
        ("classes: dog", 2, "classes must be a list of names, .* got 'dog'"),
        ("classes: {0: a}", 2, "classes .* got a mapping"),
        ("classes: ~", 2, "classes .* got null"),
        ("classes:\n- a\n- ''", 4, "name 2 of classes is empty"),
        ("classes: [a]\nbackgrounds: ['  ']", 3, "name 1 of backgrounds is empty"),
        ("classes: [a]\ntag_backgrounds: [x, x]", 3, "tag_backgrounds contains .* more than once: x"),
        ("classes: [a, 'a ']", 2, "classes contains .* more than once: a .blanks are not compared"),
        ("classes: [a, b]\nprompts:\n- x y\n- x  y", 5, "prompts contains .* more than once: x y"),
        ('classes: ["a\\nb"]', 2, "classes: the name 'a..b' has a line break or control character"),
        ('classes: ["\\ud800"]', 2, ".* control character"),
        ("classes: [a]\ntemplates: a {}", 3, "templates must be a list of texts with one {}, .* got 'a {}'"),
        ("classes: [a]\ntag_templates: [a]", 3, "template 'a' must contain one {}"),
        ("classes: [a]\nbox_threshold: .nan", 3, "box_threshold must be a number from 0 to 1, got '.nan'"),
        ("classes: [a]\nbox_threshold: 0,4", 3, "box_threshold must be a number from 0 to 1, got '0,4'"),
        ("classes: [a]\nhas_background: maybe", 3, "has_background must be True or False, got 'maybe'"),
        ("classes: [a]\ncategory_ids: [1.5]", 3, "category_ids must be a list of whole numbers, .*'1.5'"),
        ("classes: [a]\nmodel: ~", 3, "model must be text, got null; put text in quotes"),
        ("clases: [a]", 2, r"unknown field 'clases': did you mean classes\?"),
    ],
)
def test_invalid_field_names_line_field_and_value(tmp_path, text, line, message):
    pattern = rf"benchmark\.yaml, line {line}: (benchmark own: )?{message}"
    with pytest.raises(ValueError, match=pattern) as error:
        load(str(write(tmp_path, f"name: own\n{text}\n")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "message"), [("  ", "the name is empty"), ("a\nb", "line break")])
def test_invalid_name_of_a_benchmark_raises_one_line(name, message):
    with pytest.raises(ValueError, match=message) as error:
        Benchmark(name, ["x"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes", ["dog", [["a"]], [None], None, {"a": 1}])
def test_classes_that_are_not_names_raise(classes):
    with pytest.raises(ValueError, match="benchmark a: classes must be a list of names, got"):
        Benchmark("a", classes)


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
