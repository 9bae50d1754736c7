"""``cosmic``, also as ``python -m workflow``: signals first, for all else takes time to import."""

from __future__ import annotations

import signal
import sys

from workflow.signals import Stopped, exit_by_signal, stop_signals

__all__ = ["main"]


def main() -> None:
    """Entry point of ``cosmic``."""
    # SIGTERM and SIGHUP would end this process where it stands, half-written files and all.
    for number in stop_signals():
        signal.signal(number, exit_by_signal)
    try:
        from workflow.cli import app

        app(prog_name="cosmic")
    except Stopped as stopped:
        print(f"Stopped by {stopped.name}; {stopped.left}.", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
