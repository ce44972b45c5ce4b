"""Messages of the project: one logger, "clip_wsss", which commands write to stderr, above any progress bar.

Results are printed to stdout. Everything else that a command reports is logged here, at these levels:
DEBUG (-v) tracebacks and settings; INFO progress; WARNING failures and what needs attention; ERROR the error
that ends the command.
"""

import logging
import sys

from tqdm import tqdm

log = logging.getLogger("clip_wsss")


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show(level: int) -> None:
    """Write messages of this level and above to stderr; `foundation.cli.Parser` calls this in commands.

    Other Python programs do not call it, so that their own logging configuration applies.
    """
    log.setLevel(level)
    if not any(isinstance(handler, _Handler) for handler in log.handlers):
        log.addHandler(_Handler())


def level() -> int:
    """Return the current level, which a child process passes to `show`."""
    return log.level or logging.WARNING


def no_progress(hide: bool = False) -> bool | None:
    """Return `disable` for a tqdm bar: True with -q or `hide`, else None (off without a terminal)."""
    return True if hide or log.level > logging.INFO else None
