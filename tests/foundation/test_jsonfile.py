"""JSON files: objects of finite numbers, and reasons for everything else."""

import pytest

from foundation.jsonfile import read_json


def test_objects_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes('\ufeff{"a": [1, 0.5, null, true, "\\udce9"], "b": {}}'.encode())
    assert read_json(tmp_path / "a.json") == {"a": [1, 0.5, None, True, "\udce9"], "b": {}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "line 1 is not JSON"),
        (b'{"a": 1,\n"b" 2}', "line 2 is not JSON: Expecting ':' delimiter"),
        (b"<html>", "line 1 is not JSON"),
        (b"\xff", "it is not UTF-8 text"),
        (b"[]", "it contains no JSON object"),
        (b"null", "it contains no JSON object"),
        (b'{"a": NaN}', "it contains NaN, which is not JSON"),
        (b'{"a": -Infinity}', "it contains -Infinity, which is not JSON"),
        (b'{"a": 1e999}', "it contains a number that is not finite"),
        (b'{"a": 1' + b"0" * 400 + b"}", "it contains a number of more than 64 bits"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "Exceeds the limit|more than 64 bits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it is nested more than 50 deep"),
        (b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", "it is nested more than 50 deep"),
        (b'{"a": 1, "a": 2}', "it contains 'a' twice"),
    ],
)
def test_other_content_raises_value_error_with_the_reason(tmp_path, content, reason):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)
