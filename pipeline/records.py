"""What steps left in JSON files, scores and settings, as the report page tells it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

TAG_SCORES = ("mAP", "F1", "Precision", "Recall")
LISTED, FIRST = 25, 3  # entries of a list that is told in full; of a longer one, those that are told


def read_stage(title: str, file: str | Path, classes: Sequence[str]) -> dict:
    """One column of the page's scores.

    Args:
        title: of the column.
        file: what `eval_cam.py --json`, `eval_cam_with_crf.py --eval_only --json` or a network's test wrote.
        classes: names it must have scores of, see `pipeline.evaluate.scored_names`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no scores, or those of other classes.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"score file {file} does not exist: evaluation writes it with --json")
    try:
        content = json.loads(Path(file).read_text())
        best, unsure = content["best"], content.get("ignored")
        chosen = best.get("background")  # an exponent from 1 on, a constant below; see `pipeline.evaluate`
        note = "" if chosen is None else f"background {'exponent' if chosen >= 1 else 'score'} {chosen:g}"
        note = f"{100 * unsure:.1f} % unsure left out" if unsure else note
        ious = {name: best["Class IoU"][name] for name in classes}
        return {"title": title, "mean": best["Mean IoU"], "classes": ious, "note": note}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{file} holds no scores of these classes: give what evaluation wrote with --json"
        ) from None


def read_tag_scores(file: str | Path) -> tuple[dict[str, float | None], int]:
    """How well labels were found: TAG_SCORES of what `classify.py --json` wrote, None where undefined; and of
    how many images.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"score file {file} does not exist: classify.py writes it with --json")
    try:
        content = json.loads(Path(file).read_text())
        return {name: content[name] for name in TAG_SCORES}, int(content["images"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} holds no scores of tags: give what classify.py wrote with --json") from None


def rows(records: Sequence[dict]) -> dict[str, str]:
    """The rows of a step's table: its settings, but for empty ones, and the digests of its input files."""
    found = {}
    for record in records:
        digests = {f"sha256 of {name}": digest for name, digest in record.get("inputs", {}).items()}
        for key, value in (record.get("settings", {}) | digests).items():
            told_apart = any(name.startswith(f"{key}.") for name in found)  # model, where model.width is told
            if value not in ("", None, [], {}) and not told_apart:
                found[key] = _told(value)
    return {key.replace("_", " "): value for key, value in found.items()}


def apart(title: str, tables: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Tables (title -> rows) without the rows that all have in common, and before them one of these."""
    if len(tables) < 2:
        return dict(tables)
    first, *others = tables.values()
    shared = {key: value for key, value in first.items() if all(rows.get(key) == value for rows in others)}
    own = {
        name: {key: value for key, value in rows.items() if key not in shared}
        for name, rows in tables.items()
    }
    return {title: shared} | own


def _told(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_told(item)}" for key, item in value.items())
    if isinstance(value, list):
        told = value if len(value) <= LISTED else [*value[:FIRST], f"… ({len(value)} in all)"]
        return ", ".join(_told(item) for item in told)
    return f"{value:g}" if isinstance(value, float) else str(value)
