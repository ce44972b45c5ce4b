"""Atomic file writes, sha256, and checks of output paths.

A write is atomic: the content goes to a temporary file, which is renamed when it is complete.
"""

import errno
import hashlib
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import BinaryIO

LONG = 150  # bytes of a file name that leave room for the suffix of its temporary file
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk is full, or the disk quota is used up


class DiskFull(OSError):
    """The disk is full. Later files would fail too, so the whole run stops."""


@contextmanager
def replacing(file: str | Path) -> Iterator[BinaryIO]:
    """Context that opens `file` for writing and creates or replaces it only if the block raises no error.

    Each process uses its own temporary name, so that processes can write the same file at the same time.
    `sweep` removes the temporary files of killed processes. Missing folders are created.

    Raises:
        DiskFull: the disk is full, or the disk quota is used up.
        OSError: the folder cannot be made or written to; or as the block raises it.
    """
    file = Path(file)
    stem = file.name
    if len(os.fsencode(stem)) > LONG:  # file systems allow 255 bytes
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()
    temporary = file.with_name(f"{stem}.{_machine()}-{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            yield stream
        os.replace(temporary, file)
    except BaseException as error:
        with suppress(OSError):  # usually FileNotFoundError: the file was never created
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in FULL:
            raise DiskFull(
                f"no space is left to write {file}: free some space, then run the command again to continue"
            ) from None
        if isinstance(error, OSError) and error.filename in map(str, (temporary, *file.parents)):
            raise type(error)(
                f"{file} cannot be written ({error.strerror}): check its folder, or choose another one"
            ) from error
        raise


def write_file(file: str | Path, content: str | bytes) -> None:
    """Write `file` atomically, see `replacing`. Text is encoded as UTF-8; surrogates, which stand for other
    bytes in file names, are written as escapes such as `\\udce9`."""
    with replacing(file) as stream:
        stream.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def below(folder: str | Path, name: str) -> Path:
    """Return the path of output file `name`, which can contain folders, in an output folder.

    Names are checked where they are read (`segmentation.names`); this is the last check before a file is
    written or removed.

    Raises:
        ValueError: the path is outside the folder.
    """
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is outside the output folder {folder}: rename the image")
    return Path(folder, path)


def sweep(folder: str | Path) -> None:
    """Remove the temporary files of this machine's ended processes in `folder` and its subfolders."""
    name = re.compile(rf".+\.{re.escape(_machine())}-(\d+)\.tmp")
    for file in Path(folder).rglob("*.tmp"):
        match = name.fullmatch(file.name)
        if match and not _is_alive(int(match[1])):
            with suppress(OSError):  # a folder, or a file of another user: it does no harm
                file.unlink()


def sha256(file: Path | str) -> str:
    """Return the hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_outputs(read: Sequence[str | None], written: Sequence[str | None]) -> None:
    """Raise ValueError if output files of a command conflict with each other or with its input files.

    Args:
        read: input files; None entries are skipped.
        written: output files; None entries are skipped.

    Raises:
        ValueError: an output is a folder, is given twice, or is also an input.
    """
    inputs, outputs = ([Path(file).resolve() for file in files if file] for files in (read, written))
    for file in outputs:
        if file.is_dir():
            raise ValueError(f"output {file} is a folder: give a file")
        if file in inputs:
            raise ValueError(f"{file} is an input and would be overwritten: give another output")
        if outputs.count(file) > 1:
            raise ValueError(f"{file} is given for two outputs: give two different files")


def _machine() -> str:
    """Return this machine's name. Temporary names contain it: process ids are unique only on one machine."""
    return platform.node().split(".")[0] or "local"


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # on Windows, os.kill with signal 0 can stop the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process, or not a process id
        return True
    return True
