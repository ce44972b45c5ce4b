"""docs/errors.md lists every error of the code, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
ERRORS = {"ValueError", "TypeError", "OSError", "FileNotFoundError", "ChildProcessError", "ImportError",
          "DiskFull", "WorkFailed", "DamagedShard"}  # fmt: skip
ELSEWHERE = ("tests", "bench", "output", ".venv")


def template(node: ast.expr) -> str | None:
    """Return a message with … for each inserted value; None if nothing of it is literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        text = (template(node.left) or "…") + (template(node.right) or "…")
    else:
        return None
    text = " ".join(text.split())
    return text if re.search("[a-z]{3}", text) else None


def templates() -> dict[str, str]:
    """Return template -> file of the first place that raises it."""
    found: dict[str, str] = {}
    for file in sorted(ROOT.rglob("*.py")):
        relative = file.relative_to(ROOT)
        if relative.parts[0] in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                call, is_error = node.exc, getattr(node.exc.func, "id", "") in ERRORS
            else:  # parser.error(message)
                call, name = node, getattr(getattr(node, "func", None), "attr", "")
                is_error = name == "error" and len(node.args) == 1
            message = template(call.args[0]) if is_error and call.args else None
            if message:
                found.setdefault(message, relative.as_posix())
    return found


def listed() -> list[str]:
    """Return the messages in the first column of the page's tables."""
    # A message that contains backticks is enclosed in two, with blanks inside: `` no entry `keys` ``.
    rows = re.findall(r"^\| (`+)( ?)(.*?)\2\1 \|", PAGE.read_text(), re.MULTILINE)
    return [row.replace("\\|", "|") for _, _, row in rows]


def test_page_lists_each_error_once():
    rows, code = listed(), templates()
    assert len(rows) == len(set(rows))
    assert set(code) - set(rows) == set(), "missing in docs/errors.md"
    assert set(rows) - set(code) == set(), "no longer in the code"


def test_each_row_has_a_cure():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows and all(len(line.rsplit("|", 2)[1].strip()) > 3 for line in rows)
