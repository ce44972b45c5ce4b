"""The configuration is typed and checked; errors name the file or word and the key."""

import pytest

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
    "unknown key": ("solver: {iteration: 3}", [], "c.yaml.*iteration"),
    "unknown section": ("solve: {iterations: 3}", [], "c.yaml.*solve"),
    "type": ("solver: {iterations: many}", [], "c.yaml.*many.*solver.iterations"),
    "list for a number": ("solver: {iterations: [3]}", [], "c.yaml.*solver.iterations"),
    "type in a list": ("model: {rates: [1, two]}", [], "c.yaml.*two.*model.rates"),
    "number for a section": ("solver: 3", [], "c.yaml.*OptimConfig"),
    "a list": ("[1, 2]", [], "c.yaml"),
    "a word": ("solver", [], "c.yaml"),
    "invalid YAML": ("solver: {", [], "c.yaml"),
    "binary file": (b"\xff\xfe\x00", [], "c.yaml"),
    "undefined reference": ("run: {output: '${nowhere}'}", [], "nowhere"),
    "unknown word": ("", ["solver.iteration=3"], "solver.iteration=3: .*iteration"),
    "type of a word": ("", ["solver.iterations=many"], "solver.iterations=many: .*many"),
    "number for a section in a word": ("", ["solver=3"], "solver=3: "),
    "no value": ("", ["solver.iterations"], "expected key=value.*'solver.iterations'"),
    "no key": ("", ["=3"], "expected key=value"),
    "word written as a flag": ("", ["--iterations", "3"], "expected key=value.*'--iterations'"),
    "undefined reference in a word": ("", ["run.output=${nowhere}"], "nowhere"),
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
