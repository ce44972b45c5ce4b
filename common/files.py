"""Files that appear whole or not at all, written under a temporary name and renamed; and their sha256."""

import errno
import hashlib
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT)  # no space, or no quota, is left


class DiskFull(OSError):
    """The disk is full. Later files would fail too, so the whole run stops."""


@contextmanager
def replacing(file: str | Path) -> Iterator[BinaryIO]:
    """Open `file` for writing; it appears, complete, only when the block ends without an error.

    Each process has its own temporary name, so processes that write the same file do not mix. `sweep` removes
    the temporary files of killed processes. Missing folders are made.

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
            raise DiskFull(f"no space is left to write {file}: make room, and start again to go on") from None
        raise


def write_file(file: str | Path, content: str | bytes) -> None:
    """Write `file` as `replacing` does; text as UTF-8."""
    with replacing(file) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def sweep(folder: str | Path) -> None:
    """Remove temporary files in and below `folder` whose processes ran on this machine and have ended."""
    name = re.compile(rf".+\.{re.escape(_machine())}-(\d+)\.tmp")
    for file in Path(folder).rglob("*.tmp"):
        match = name.fullmatch(file.name)
        if match and not _is_alive(int(match[1])):
            file.unlink(missing_ok=True)


def sha256(file: Path | str) -> str:
    """Return the hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_outputs(read: Sequence[str | None], written: Sequence[str | None]) -> None:
    """Check files that a command writes against those that it reads; None stands for no file.

    Raises:
        ValueError: an output is a folder, is written twice, or is also an input.
    """
    inputs, outputs = ([Path(file).resolve() for file in files if file] for files in (read, written))
    for file in outputs:
        if file.is_dir():
            raise ValueError(f"{file} is a folder: name a file in it")
        if file in inputs:
            raise ValueError(f"{file} is read, and would be overwritten: write to another file or folder")
        if outputs.count(file) > 1:
            raise ValueError(f"{file} would be written twice: name two files")


def _machine() -> str:
    """Return this machine's name; process ids of other machines that share the folder mean nothing here."""
    return platform.node().split(".")[0] or "local"


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # signal 0 only tests on POSIX
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process, or not a process id
        return True
    return True
