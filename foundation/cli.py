"""The argument parser of all commands: layout of --help, and the flags -v and -q."""

import argparse
import logging
import sys
from contextlib import suppress
from typing import Any

from foundation import logs


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Layout of --help.

    The usage line lists only the required flags. Defaults are shown, except None, False and empty ones.
    `--no-...` spellings are hidden.
    """

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        required = [
            " ".join([*action.option_strings[:1], str(action.metavar or action.dest)])
            for action in actions
            if action.required and action.nargs != "*"
        ]
        super().add_usage(usage or " ".join([self._prog, *required, "[options]"]), actions, groups, prefix)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default in ("", ()):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return ", ".join(
            part for part in super()._format_action_invocation(action).split(", ") if "--no-" not in part
        )


class Parser(argparse.ArgumentParser):
    """ArgumentParser with `HelpFormatter`, -v and -q. Creating a Parser turns on logging to stderr."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": HelpFormatter, **options})
        logs.show(logging.INFO)
        with suppress(AttributeError):  # a stream that is not a terminal, file or pipe
            # As stderr: a file name that cannot be encoded is printed with escapes and raises no error.
            sys.stdout.reconfigure(errors="backslashreplace")
        group = self.add_argument_group("messages")
        for flags, level, help in (
            (("-v", "--verbose"), logging.DEBUG, "also print details, and the traceback of each failure"),
            (("-q", "--quiet"), logging.WARNING, "print only results, warnings and errors; no progress bars"),
        ):
            group.add_argument(*flags, action=_Show, level=level, help=help)


class _Show(argparse.Action):
    """Flag that sets the log level when it is parsed. It adds no attribute to the namespace."""

    def __init__(self, option_strings, dest: str, level: int, help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.level = level

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        logs.show(self.level)
