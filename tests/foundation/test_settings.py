"""Settings: flags, range checks and docs tables are derived from dataclass fields."""
import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest

from foundation import yamlfile
from foundation.docs import page
from foundation.settings import Settings, Spec, add_flags, from_args, rows, setting

DOCS = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))


@dataclass(frozen=True)
class Example(Settings):
    SECTION = "example."

    count: int = setting(3, "images", least=1)
    limit: int | None = setting(None, "images at once", least=1, none="auto", aliases=["--old_limit"])
    share: float = setting(0.5, "100 % is 1", least=0, most=1)
    scales: tuple[float, ...] = setting((1.0, 1.5), "image sizes", least=0.1, most=10)
    method: str = setting("a", "how", choices={"a": 1, "b": 2})
    flip: bool = setting(False, "mirrored images too")


def parsed(*words, base=None):
    parser = argparse.ArgumentParser()
    add_flags(parser, Example)
    return from_args(base or Example(), parser.parse_args(words))


def test_from_args_keeps_base_values_of_missing_flags():
    base = Example(count=7, flip=True)
    assert parsed(base=base) == base
    assert parsed("--count", "2", base=base) == Example(count=2, flip=True)


def test_flags_parse_every_type():
    words = "--count 2 --old_limit 4 --share 1 --scales 0.5,2 --method b --flip"
    assert parsed(*words.split()) == Example(2, 4, 1.0, (0.5, 2.0), "b", True)
    assert parsed("--limit", "4", "--limit", "auto").limit is None
    for off in ("--no_flip", "--no-flip"):
        assert not parsed(off, base=Example(flip=True)).flip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--count 0", "argument --count: expected a whole number, 1 or more"),
        ("--count 1.5", "argument --count: expected a whole number, 1 or more"),
        ("--limit no", "argument --limit/--old_limit: expected a whole number, 1 or more, or auto"),
        ("--share nan", "argument --share: expected a number from 0 to 1"),
        ("--scales 1,20", "argument --scales: expected numbers from 0.1 to 10, separated by commas"),
        ("--method c", "argument --method: invalid choice: 'c'"),
    ],
)
def test_invalid_flags_print_the_expected_values(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "example.count must be a whole number, 1 or more, got 0"),
        ({"share": float("inf")}, "example.share must be a number from 0 to 1, got inf"),
        ({"scales": (1.0, 0.0)}, "example.scales must be numbers from 0.1 to 10, got (1.0, 0.0)"),
        ({"method": "c"}, "example.method must be one of a, b, got 'c'"),
        ({"count": 2.5}, "example.count must be a whole number, 1 or more, got 2.5"),
        ({"count": True}, "example.count must be a whole number, 1 or more, got True"),
        ({"count": None}, "example.count must be a whole number, 1 or more, got None"),
        ({"share": "0.5"}, "example.share must be a number from 0 to 1, got '0.5'"),
        ({"scales": 1.0}, "example.scales must be numbers from 0.1 to 10, got 1.0"),
        ({"flip": "no"}, "example.flip must be True or False, got 'no'"),
    ],
)
def test_values_of_wrong_range_or_type_raise_value_error(values, message):
    with pytest.raises(ValueError) as error:
        Example(**values)
    assert str(error.value) == message


def test_help_shows_defaults_and_both_switch_flags():
    parser = argparse.ArgumentParser()
    add_flags(parser, Example, show={"count": "the benchmark's"})
    text = " ".join(parser.format_help().split())
    assert "images (default: the benchmark's)" in text
    assert "images at once (default: auto)" in text
    assert "100 % is 1 (default: 0.5)" in text
    assert "image sizes (default: 1,1.5)" in text
    assert "--flip, --no_flip, --no-flip mirrored images too" in text


def test_expected_names_the_items_of_a_list():
    assert Spec("", least=1).expected(list[int]) == "whole numbers, 1 or more"
    assert Spec("").expected(list[str]) == "names"
    assert Spec("", items="texts").expected(list[str]) == "texts"


def test_rows_return_name_default_and_help():
    assert rows(Example)[4] == ("--method", "a", "how: `a`, `b`")
    assert rows(Example)[5] == ("--flip", "off", "mirrored images too")
    assert rows(Example, prefix="")[0] == ("count", "3", "images")


def test_settings_dataclass_is_a_yaml_schema(tmp_path):
    (tmp_path / "a.yaml").write_text("count: 5\nscales: [2.0]")
    entries = yamlfile.read(Example, tmp_path / "a.yaml", "file")
    assert {name: entry.value for name, entry in entries.items()} == {"count": 5, "scales": [2.0]}


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_option_tables_of_docs_are_up_to_date(file):
    assert page(file.read_text()) == file.read_text(), "run `make docs`"
