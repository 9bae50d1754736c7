"""``cosmic``, also as ``python -m workflow``: signals first, for all else takes time to import."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

from workflow.signals import Stopped, exit_by_signal, stop_signals

__all__ = ["main"]


def main() -> None:
    """Entry point of ``cosmic``."""
    # SIGTERM and SIGHUP would end this process where it stands, half-written files and all.
    for number in stop_signals():
        signal.signal(number, exit_by_signal)
    try:
        _run()
    except Stopped as stopped:
        print(f"Stopped by {stopped.name}; {stopped.left}.", file=sys.stderr)
        raise
    except OSError as error:  # of their files the commands tell themselves
        if error.errno not in (errno.EBADF, errno.EIO, errno.ENOSPC, errno.EPIPE):
            raise
        # Else the interpreter would try, and complain, once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(f"Error: cannot write to stdout: {error.strerror}")


def _run() -> None:
    try:
        _app()(prog_name="cosmic")
    finally:
        if sys.stdout is not None:  # closed
            sys.stdout.flush()


def _app() -> Callable[..., None]:
    try:
        from workflow.cli import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("Error: cosmic needs more than the client: pip install 'cosmic-fmi[workflow]'")
    return app


if __name__ == "__main__":
    main()
