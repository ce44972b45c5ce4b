"""How every script's --help looks."""
import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that say something: not those of switches or of flags left out."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)
