"""What the command line's modules share: how a group of commands looks, how a command fails."""

from __future__ import annotations

import re
import sys
from typing import NoReturn

import typer


def group(text: str) -> typer.Typer:
    """A group of commands under this help text, without subcommand: its help."""
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def fail(error: Exception) -> NoReturn:
    """Say on one line what went wrong, and exit with code 1."""
    text = re.sub(r"^\[Errno \d+\] ", "", str(error))
    print(f"Error: {text}", file=sys.stderr)
    raise SystemExit(1)
