"""Messages of the project: one logger, "clip_wsss", which commands write to stderr above progress bars.

Results are printed to stdout. Everything else that a command reports is logged here, at these levels:
DEBUG (-v) tracebacks and settings; INFO progress; WARNING failures and what needs attention; ERROR the end.
"""

import logging
import sys

from tqdm import tqdm

log = logging.getLogger("clip_wsss")


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show(level: int) -> None:
    """Write messages of this level and above to stderr; `common.cli.Parser` calls this in commands.

    In Python programs the logger is left to the program's own logging configuration.
    """
    log.setLevel(level)
    if not any(isinstance(handler, _Handler) for handler in log.handlers):
        log.addHandler(_Handler())


def level() -> int:
    """Return the level to `show` in a child process."""
    return log.level or logging.WARNING


def no_progress(hide: bool = False) -> bool | None:
    """Return `disable` of a tqdm bar: True with -q or `hide`; else None, which needs a terminal."""
    return True if hide or log.level > logging.INFO else None
