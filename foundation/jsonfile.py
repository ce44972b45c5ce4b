"""Read JSON files that users hand over: records of runs, scores and sidecar files."""

import json
import math
from pathlib import Path
from typing import Any

MAX_BYTES = 2**28  # scores and records list image names; COCO's annotations have their own reader
MAX_DEPTH = 50


def read_json(file: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file. Its numbers are finite, and no key is given twice.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a JSON object; the message is a reason without the name of the file.
    """
    with open(file, "rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_refuse)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    if not isinstance(value, dict):
        raise ValueError("it contains no JSON object")
    _check(value, 1)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it contains {twice[:60]!r} twice")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"it contains {constant}, which is not JSON")


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check(item, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it contains a number that is not finite")
    elif isinstance(value, int) and abs(value) > 2**63:
        raise ValueError("it contains a number of more than 64 bits")
