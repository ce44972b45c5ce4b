"""Files that are whole or not there: what is written under a temporary name and renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(file: str | Path) -> Iterator[BinaryIO]:
    """Open `file` for writing so that it appears, complete, only when the block ends without an error.

    The temporary name is always `file` + ".tmp": what a killed run left is overwritten by the next one.
    Folders of `file` are made.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
