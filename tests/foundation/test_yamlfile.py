"""YAML files: refused content, and lines and reasons in errors."""

import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.settings import setting
from foundation.yamlfile import MAX_BYTES, read, read_word


@dataclass
class Part:
    scales: list[float] = setting([1.0], "sizes", above=0)
    flip: bool | None = None
    ratio: float = setting(0.5, "part", least=0, most=1)


@dataclass
class Example:
    names: list[str] = field(default_factory=list)
    count: int = 1
    part: Part = field(default_factory=Part)


def values(tmp_path, content):
    file = tmp_path / "a.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {key: entry.value for key, entry in read(Example, file, "file").items()}


@pytest.mark.parametrize("content", ["", "---\n", "# a\n", "~", "part:", "\ufeff", "---\n...\n"])
def test_empty_files_and_sections_set_nothing(tmp_path, content):
    assert values(tmp_path, content) == {}


def test_values_have_the_types_of_the_fields(tmp_path):
    content = "\ufeffnames: [no, '1', 1.0]\r\ncount: 1_000\r\npart: {scales: [1, 5e-1, .5], flip: ON}\r\n"
    expected = {"names": ["no", "1", "1.0"], "count": 1000, "part.scales": [1.0, 0.5, 0.5], "part.flip": True}
    assert values(tmp_path, content) == expected
    assert values(tmp_path, "part: {flip: ~}\ncount: 0x10") == {"part.flip": None, "count": 16}


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("names:\n\t- a", 2, "a tab is not allowed here: indent with blanks"),
        ("count: 1\nnames: [a, b", 2, "the file ends before the bracket or quote of this line is closed"),
        ("count: 1\nnames:\n- 'a\n- b", 3, "the file ends before the bracket or quote"),
        ("count: 1\nnames:a\n", 2, "expected a field, name: value, with a blank after the colon; got 'names"),
        ("count: 1\r\nnames:a\r\n", 2, "expected a field"),
        ("count: 1\rnames:a\r", 2, "expected a field"),
        ("count: 1\n  names: [a]", 2, "a colon is not allowed here"),
        ("names: @a", 1, "invalid YAML .*: 'names: @a'; put text with special characters in quotes"),
        ("names: [a {}]", 1, "invalid YAML"),
        ("names:\n- {} a\n", 2, "invalid YAML"),
        ("%YAML 2.0\n---\ncount: 1", 1, "invalid YAML"),
        ("count: 1\nnames: []\ncount: 2", 3, "'count' is set twice, first in line 1: remove one"),
        ("part: {flip: no,\n flip: yes}", 2, "'part.flip' is set twice, first in line 1"),
        ("count: 1\n---\ncount: 2", 2, "the file contains several documents: remove the separator ---"),
        ("count: &a 1", 1, "anchors .* are not allowed"),
        ("names: [a, *b]", 1, "anchors .* aliases .* are not allowed"),
        ("names: !!python/object/apply:os.system [ls]", 1, "tags .* are not allowed"),
        ("names: [!a b]", 1, "tags .* are not allowed"),
        ("names: !!str a", 1, "tags .* are not allowed"),
        (b"count: 1\nnames: [\xe9]", 2, "it is not UTF-8 text: save the file as UTF-8"),
        ("count: 1".encode("utf-16"), 1, "it is not UTF-8 text"),
        ("count: 1\nnames: [a\0]", 2, r"the character '.x00' is not allowed: remove it"),
        ("names: " + "[" * 100_000, 1, "values are nested more than 20 deep"),
        ("count: 1\n" + "? " * 1000, 2, "values are nested more than 20 deep"),
        ("names: [" + "a, " * 20_000 + "]", 1, "the file has more than 10000 values"),
        ("{}: 1", 1, "the name of a field must be text, got a mapping"),
        ("? [a]\n: 1", 1, "the name of a field must be text, got a list"),
        ("- a", 1, "the file must contain fields, name: value; got a list"),
        ("part: 3", 1, "part is a section and must contain fields, name: value; got '3'"),
        ("part.flip: no", 1, "part.flip must be written as a section: part: and in the next line, .* flip:"),
        ("flips: no", 1, r"unknown field 'flips': did you mean part.flip\?"),
        (
            "part: {zoom: 1}",
            1,
            "unknown field 'part.zoom': the fields are part.scales, part.flip, part.ratio",
        ),
        ("<<: {count: 1}", 1, "unknown field '<<': the fields are names, count, part"),
        ("count: '" + "9" * 5000 + "'", 1, "count must be a whole number, got '9{57}[.]{3}'"),
        ("part: {ratio: 1e999}", 1, "part.ratio must be a number from 0 to 1, got inf"),
        ("part: {ratio: -2}", 1, "part.ratio must be a number from 0 to 1, got -2.0"),
        ("count: 12:30", 1, "count must be a whole number, got '12:30'"),
        ("part: {scales: [1, 0]}", 1, "part.scales must be a list of numbers above 0, .*; item 2 is '0'"),
        ("part: {scales: [1e999]}", 1, "part.scales .* item 1 is '1e999'"),
        ("part: {flip: 2}", 1, "part.flip must be True or False, got '2'"),
    ],
)
def test_error_names_file_line_and_reason(tmp_path, content, line, message):
    with pytest.raises(ValueError, match=rf"^file .*a\.yaml, line {line}: {message}") as error:
        values(tmp_path, content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_large_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"a.yaml has more than {MAX_BYTES} bytes"):
        values(tmp_path, "#" * (MAX_BYTES + 1))


def test_entries_name_the_lines_of_items(tmp_path):
    (tmp_path / "a.yaml").write_text("names:\n- a\n- b\n")
    entry = read(Example, tmp_path / "a.yaml", "file")["names"]
    assert entry.where.endswith("line 1") and [item[-6:] for item in entry.items] == ["line 2", "line 3"]


def check(call, *arguments):
    """Check that a call returns or raises ValueError with one short line, soon."""
    start = time.monotonic()
    try:
        call(*arguments)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    assert time.monotonic() - start < 5


TOKENS = ["names", "count", "part", "flip", "~", "&a", "*a", "!!str", "---", ": ", "- ", "\n", "\n  "]
TEXTS = st.lists(st.sampled_from([*TOKENS, *"a1:-[]{},'\"#|>%@?\\\t\0\u2028"]), max_size=30).map("".join)


@given(st.binary() | TEXTS.map(str.encode))
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    check(read, Example, file, "file")


@given(st.sampled_from(["names", "count", "part", "part.flip", "part.scales"]), st.text())
def test_any_word_is_read_or_refused_in_one_line(key, text):
    check(read_word, Example, f"{key}={text}")
