"""Files that are whole or not there: what is written under a temporary name and renamed."""

import errno
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT)  # no space, or no quota, is left


class DiskFull(OSError):
    """There is no room for a file: no later one will fare better, so the whole run stops."""


@contextmanager
def replacing(file: str | Path) -> Iterator[BinaryIO]:
    """Open `file` for writing so that it appears, complete, only when the block ends without an error.

    The temporary name is this process's own, so processes that write the same file do not mix; `sweep`
    removes what a killed one left. Folders of `file` are made.

    Raises:
        DiskFull: no space, or no quota, is left.
    """
    file = Path(file)
    temporary = file.with_name(f"{file.name}.{_machine()}-{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            yield stream
        os.replace(temporary, file)
    except BaseException as error:
        with suppress(OSError):  # above all: it is not there
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in FULL:
            raise DiskFull(
                f"no space is left to write {file}: make room, and start again to go on"
            ) from None
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
