"""``cosmic``, also as ``python -m workflow``: signals first, for all else takes time to import."""

from __future__ import annotations

import signal
import sys

from workflow.signals import exit_by_signal, stop_signals

__all__ = ["main"]


def main() -> None:
    """Entry point of ``cosmic``."""
    # SIGTERM and SIGHUP would end this process where it stands, half-written files and all.
    for number in stop_signals():
        signal.signal(number, exit_by_signal)
    try:
        from workflow.cli import app

        app(prog_name="cosmic")
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:
            name = signal.Signals(end.code - 128).name
            text = f"Stopped by {name}; nothing is left running, no file half written."
            print(text, file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
