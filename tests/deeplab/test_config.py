"""The configuration is typed and checked; errors name the file or word and the key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeplab.config import Config
from training import config as configs


def test_words_override_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("solver: {iterations: 30, learning_rate: 1e-3}\nmodel: {rates: [1, 2]}\n")
    words = ["solver.iterations=40", "data.root=/some where", "model.freeze_bn=null"]
    config = configs.read(Config, file, words)
    assert (config.solver.iterations, config.solver.learning_rate) == (40, 1e-3)
    assert config.model.rates == [1, 2] and config.model.freeze_bn is None
    assert config.data.root == "/some where" and config.solver.batch_size == 5
    (tmp_path / "again.yaml").write_text(configs.to_yaml(config))
    assert configs.read(Config, tmp_path / "again.yaml") == config
    assert configs.read(Config, None) == Config()


WRONG = {
    "unknown key": ("solver: {iteration: 3}", [], "c.yaml, line 1: .*did you mean solver.iterations"),
    "unknown section": ("solve: {iterations: 3}", [], "c.yaml, line 1: .*'solve': did you mean solver"),
    "type": ("solver: {iterations: many}", [], "c.yaml, line 1: solver.iterations must be a whole.*'many'"),
    "list for a number": ("solver: {iterations: [3]}", [], "c.yaml, line 1: solver.iterations must .* list"),
    "type in a list": ("model: {rates: [1, two]}", [], "c.yaml, line 1: model.rates .* item 2 is 'two'"),
    "number for a section": ("solver: 3", [], "c.yaml, line 1: solver is a section and must .* '3'"),
    "a list": ("[1, 2]", [], "c.yaml, line 1: the file must contain fields, .* got a list"),
    "a word": ("solver", [], "c.yaml, line 1: the file must contain fields, .* got 'solver'"),
    "invalid YAML": ("solver: {", [], "c.yaml, line 1: the file ends before the bracket"),
    "binary file": (b"\xff\xfe\x00", [], "c.yaml, line 1: it is not UTF-8"),
    "undefined reference": ("run: {output: '${nowhere}'}", [], "line 1: run.output refers to 'nowhere'"),
    "reference to itself": ("data: {root: '${data.root}'}", [], "line 1: data.root refers to 'data.root'"),
    "reference to the environment": ("", ["data.root=${oc.env:HOME}"], "data.root refers to 'oc.env:HOME'"),
    "reference to null": ("", ["data.root=${test.crf}"], "data.root refers to 'test.crf'"),
    "broken reference": ("", ["data.root=a${"], "data.root must refer to keys in the form"),
    "many references": ("", [f"data.root={'${run.output}' * 11}"], "at most 10 times"),
    "reference of another type": ("solver: {seed: '${run.device}'}", [], "solver.seed must be .* got 'auto'"),
    "section twice": ("run: {keep: 1}\nrun: {keep: 2}", [], "line 2: 'run' is set twice, first in line 1"),
    "dotted key": ("solver.seed: 1", [], "solver.seed must be written as a section: solver: and"),
    "key without section": ("learning_rate: 1", [], "did you mean solver.learning_rate"),
    "range": ("solver: {iterations: 0}", [], "line 1: solver.iterations must be .*1 or more, got 0"),
    "float for an integer": ("solver: {iterations: 1e4}", [], "solver.iterations must be a whole .* '1e4'"),
    "octal": ("solver: {iterations: 010}", [], "solver.iterations must be a whole number.* got '010'"),
    "not finite": ("solver: {learning_rate: .inf}", [], "solver.learning_rate must be a number.* got '.inf'"),
    "null for text": ("data: {root: ~}", [], "line 1: data.root must be text, got null; put text in quotes"),
    "unknown section in a word": ("", ["a.b.c=1"], "a.b.c=1: unknown field 'a.b.c': the fields are data, "),
    "key below a value": ("", ["solver.seed.x=1"], "solver.seed.x=1: unknown field .* solver.seed"),
    "empty number": ("", ["solver.iterations="], "solver.iterations=: solver.iterations must be .* got ''"),
    "commas for a list": ("", ["model.rates=1,2"], r"model.rates must be a list .*\[1, 2\], got '1,2'"),
    "open list": ("", ["model.rates=[1,2"], r"model.rates must be a list .* got '\[1,2'"),
    "list for text": ("", ["data.root=[a]"], "data.root must be text, got a list"),
    "choice": ("", ["test.crf=no"], "test.crf must be one of none, .*, got 'no'"),
    "unknown word": ("", ["solver.iteration=3"], "solver.iteration=3: .*did you mean solver.iterations"),
    "type of a word": ("", ["solver.iterations=many"], "solver.iterations=many: solver.iterations .*'many'"),
    "number for a section in a word": ("", ["solver=3"], "solver=3: solver is a section"),
    "long word": ("", ["x" * 5000 + "=1"], "^.{,250}$"),
    "line break in a word": ("", ["solver.seed=1\n2"], r"solver.seed must be .* got '1 2'"),
    "no value": ("", ["solver.iterations"], "expected key=value.*'solver.iterations'"),
    "no key": ("", ["=3"], "expected key=value"),
    "word written as a flag": ("", ["--iterations", "3"], "expected key=value.*'--iterations'"),
    "undefined reference in a word": ("", ["run.output=${nowhere}"], "=.*: run.output refers to 'nowhere'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configuration_error_is_one_line_and_names_the_key(tmp_path, case):
    content, words, sentence = WRONG[case]
    file = tmp_path / "c.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence) as caught:
        configs.read(Config, file, words)
    assert "\n" not in str(caught.value)


def test_missing_configuration_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"configuration .*absent.yaml does not exist"):
        configs.read(Config, tmp_path / "absent.yaml")


def test_empty_value_in_a_word_is_an_empty_string():
    config = configs.read(Config, None, ["data.val_split=voc12/val.txt", "data.val_split="])
    assert config.data.val_split == ""


@pytest.mark.parametrize("text", ["no", "1e3", "a,b", "a: b", "a #b", "it's", "~/x", "- a", "猫", "???"])
def test_text_in_a_word_is_as_written(text):
    assert configs.read(Config, None, [f"data.root={text}"]).data.root == text


@pytest.mark.parametrize(("text", "value"), [("'a '", "a "), ('"null"', "null"), ("''", ""), (" a ", "a")])
def test_quotes_around_text_in_a_word_are_removed(text, value):
    assert configs.read(Config, None, [f"data.root={text}"]).data.root == value


def test_null_empty_lists_and_sections_in_words():
    words = ["model.freeze_bn=null", "model.scales=[]", "solver={iterations: 7, drop_last: yes}"]
    config = configs.read(Config, None, [*words, "test.crf=none"])
    assert (config.model.freeze_bn, config.model.scales, config.test.crf) == (None, [], "none")
    assert (config.solver.iterations, config.solver.drop_last) == (7, True)


def test_empty_sections_and_text_like_other_types_in_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("solver:\ntest: ~\ndata: {root: no, image_dir: 2012, val_split: 1e3}\n")
    config = configs.read(Config, tmp_path / "c.yaml")
    assert config.solver == Config().solver
    assert (config.data.root, config.data.image_dir, config.data.val_split) == ("no", "2012", "1e3")


def test_references_are_replaced_by_the_value_of_a_key(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {val_image_dir: '${data.root}/val'}\nrun: {keep: '${solver.seed}'}\n")
    words = ["data.root=VOC", "solver.seed=3", "run.output=o/${ solver.seed }"]
    config = configs.read(Config, file, words)
    assert (config.data.val_image_dir, config.run.keep, config.run.output) == ("VOC/val", 3, "o/3")


@given(st.text().filter(lambda text: "${" not in text))
def test_written_configurations_read_back_equal(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    config = Config()
    config.data.root = config.model.init = text
    file.write_bytes(configs.to_yaml(config).encode())
    assert configs.read(Config, file) == config
