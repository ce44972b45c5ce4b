"""Write the option tables of docs/: python -m foundation.docs

Each table is between the comments `<!-- settings MODULE:CLASS PREFIX -->` and `<!-- end settings -->`. It is
derived from the dataclass CLASS in MODULE. PREFIX is `--` for flags and empty for the keys of a YAML file.
"""

import re
from importlib import import_module
from pathlib import Path

from foundation.files import write_file
from foundation.settings import rows

BLOCK = re.compile(r"(<!-- settings (\S+):(\S+) ?(\S*) -->\n).*?(<!-- end settings -->)", re.DOTALL)


def page(text: str) -> str:
    """Return the text of a page, with its option tables generated again."""

    def table(match: re.Match) -> str:
        opening, module, name, prefix, closing = match.groups()
        lines = ["| option | default | what it does |", "| --- | --- | --- |"]
        for option, default, help in rows(getattr(import_module(module), name), prefix):
            shown = f"`{default}`" if default else ""
            lines.append(f"| `{option}` | {shown} | {help.replace('|', chr(92) + '|')} |")
        return opening + "\n".join(lines) + "\n" + closing

    return BLOCK.sub(table, text)


def main() -> None:
    for file in sorted((Path(__file__).parents[1] / "docs").glob("*.md")):
        text = file.read_text()
        if text != page(text):
            write_file(file, page(text))
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
