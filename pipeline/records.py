"""Read the scores and settings that steps wrote to JSON files, for the report page."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foundation.jsonfile import read_json

TAG_SCORES = ("mAP", "F1", "Precision", "Recall")
MAX_ITEMS, FIRST_ITEMS = 25, 3  # longer lists of settings are cut to the first few items


def read_stage(title: str, file: str | Path, classes: Sequence[str]) -> dict[str, Any]:
    """Return one column of the page's score tables.

    Args:
        title: title of the column.
        file: JSON file from `eval_cam.py --json`, `eval_cam_with_crf.py --json` or the test of a network.
        classes: names whose IoU the file must contain, see `pipeline.evaluate.scored_names`.

    Raises:
        FileNotFoundError: `file` does not exist.
        ValueError: `file` contains no scores, or scores of other classes.
    """
    with _score_file(file, "the evaluation", "scores of these classes") as content:
        best, ignored, note = content["best"], content.get("ignored"), ""
        if ignored:
            note = f"{100 * ignored:.1f} % ignored"
        elif (background := best.get("background")) is not None:  # see `pipeline.evaluate`
            note = f"background {'exponent' if background >= 1 else 'score'} {background:g}"
        ious = {name: _score(f"the IoU of {name}", best["Class IoU"][name]) for name in classes}
        mean = _score("Mean IoU", best["Mean IoU"])
        return {"title": title, "mean": mean, "classes": ious, "note": note}


def read_checkpoint(file: str | Path) -> str:
    """Return the checkpoint whose test wrote a score file; empty if it records none."""
    with _score_file(file, "the test of the network", "scores") as content:
        checkpoint = content.get("checkpoint") or ""
        if not isinstance(checkpoint, str):
            raise TypeError
        return checkpoint


def read_tag_scores(file: str | Path) -> tuple[dict[str, float | None], int]:
    """Return the TAG_SCORES of `classify.py --json`, None where undefined, and the number of images."""
    with _score_file(file, "classify.py", "scores of tags") as content:
        return {name: _score(name, content[name]) for name in TAG_SCORES}, int(content["images"])


@contextmanager
def _score_file(file: str | Path, writer: str, expected: str) -> Iterator[dict]:
    """Yield the content of a JSON file. Raise ValueError if the file cannot be read, or lacks an entry that
    the caller reads."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"score file {file} does not exist: write it with --json of {writer}")
    reason = "an entry has the wrong type"
    try:
        yield read_json(file)
        return
    except ValueError as error:
        reason = str(error)
    except KeyError as error:
        reason = f"it has no entry {error}"
    except (TypeError, AttributeError):
        pass
    raise ValueError(
        f"{file} contains no {expected} ({reason}): give the file that {writer} wrote with --json"
    )


def _score(name: str, value: Any) -> float | None:
    """Return a score of a file, None if it is undefined."""
    if value is not None and (isinstance(value, bool) or not 0 <= value <= 1):
        raise ValueError(f"{name} is {value!r}, expected a number from 0 to 1")
    return value


def tables(steps: Mapping[str, Sequence[dict]], common: str) -> dict[str, dict[str, str]]:
    """Return title -> rows of settings. If there are several steps, rows that are equal in all of them are
    only in the first table.

    Args:
        steps: title -> the results of `pipeline.run.read_settings` for the folders of the step.
        common: title of the first table.
    """
    all_rows = {title: _rows(records) for title, records in steps.items()}
    if len(all_rows) < 2:
        return all_rows
    first, *others = all_rows.values()
    shared = {key: text for key, text in first.items() if all(rows.get(key) == text for rows in others)}
    own = {title: {key: rows[key] for key in rows if key not in shared} for title, rows in all_rows.items()}
    return {common: shared} | own


def _rows(records: Sequence[dict]) -> dict[str, str]:
    """Return the settings that are not empty, and the digests of input files, as texts."""
    rows: dict[str, str] = {}
    for record in records:
        digests = {f"sha256 of {name}": digest for name, digest in record.get("inputs", {}).items()}
        for key, value in (record.get("settings", {}) | digests).items():
            # A test records its network as `model`, a training as `model.width` and so on: show it only once.
            repeated = any(name.startswith(f"{key}.") for name in rows)
            if value not in ("", None, [], {}) and not repeated:
                rows[key] = _text(value)
    return {key.replace("_", " "): text for key, text in rows.items()}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        cut = [*value[:FIRST_ITEMS], f"… ({len(value)} in all)"] if len(value) > MAX_ITEMS else value
        return ", ".join(_text(item) for item in cut)
    return f"{value:g}" if isinstance(value, float) else str(value)
