"""Files that are whole or not there: what is written under a temporary name and renamed."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(file: str | Path) -> Iterator[BinaryIO]:
    """Open `file` for writing so that it appears, complete, only when the block ends without an error.

    The temporary name is this process's own, so processes that write the same file do not mix; `sweep`
    removes what a killed one left. Folders of `file` are made.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{_machine()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep(folder: str | Path) -> None:
    """Remove the temporary files in and below `folder` whose processes, of this machine, are gone."""
    name = re.compile(rf".+\.{re.escape(_machine())}-(\d+)\.tmp")
    for file in Path(folder).rglob("*.tmp"):
        match = name.fullmatch(file.name)
        if match and not _lives(int(match[1])):
            file.unlink(missing_ok=True)


def _machine() -> str:
    """Folders may be shared among machines, whose process ids say nothing here."""
    return platform.node().split(".")[0] or "local"


def _lives(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no id at all
        return True
    return True
