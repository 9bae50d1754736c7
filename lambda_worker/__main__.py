"""`python -m lambda_worker init|infer|summarize|blame|check`: a handler as a process.

The event is read from stdin as JSON. stdout carries JSON lines only: any number of
`{"progress": {...}}`, then exactly one `{"result": ...}` (exit 0) or `{"error": {"type", "message",
"rank"}}` (exit 1, or 143 where SIGTERM ends it). Logs go to stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
import traceback
from types import FrameType, TracebackType
from typing import TextIO

from lambda_worker import handlers
from lambda_worker.events import EventError, flat
from lambda_worker.failures import words

PROGRESS_EVERY = 0.1  # seconds; more lines than that nobody can see
AGAIN_SECONDS = 0.05  # until SIGTERM that came in an import is looked at again


def main() -> None:
    """Run one handler; see the module."""
    parser = argparse.ArgumentParser(prog="python -m lambda_worker", description=__doc__)
    parser.add_argument("step", choices=("init", "infer", "summarize", "blame", "check"))
    step = parser.parse_args().step
    logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("torch").setLevel("WARNING")  # it tells of its caches
    output = Output(_take_stdout())
    sys.excepthook = output.error
    # As an exit, not a sudden death: what is half-written or temporary is cleaned up.
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _stop)
    try:
        event = _read_event()
        output.rank = _rank(event)
        more = {"progress": output.progress} if step == "infer" else {}
        output.put("result", getattr(handlers, step)(event, None, **more))
    except Stopped as stopped:
        output.error(type(stopped), stopped, None)
        raise


class Stopped(SystemExit):
    """SIGTERM came; `code` is what shells expect."""

    def __str__(self) -> str:
        return "stopped by SIGTERM"


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise, but not in an import, where it may be lost: in callbacks of importlib, or in C."""
    if _importing(frame):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    else:
        raise Stopped(128 + signal.SIGTERM)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class Output:
    """The JSON lines on stdout."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.rank: int | None = None
        self._last = ("", 0.0)

    def put(self, kind: str, content: object) -> None:
        print(json.dumps({kind: content}), file=self._stream, flush=True)

    def progress(self, stage: str, rows: int, of: int) -> None:
        now = time.monotonic()
        if stage != self._last[0] or now - self._last[1] >= PROGRESS_EVERY or rows == of:
            self._last = (stage, now)
            self.put("progress", {"rank": self.rank, "stage": stage, "rows": rows, "of": of})

    def error(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """`sys.excepthook`: what ends the process becomes its last line."""
        ours = kind.__module__.startswith(("lambda_worker", "fmi_client"))
        if not ours and kind not in (Stopped, KeyboardInterrupt):
            traceback.print_exception(error)  # a defect: say where
        self.put("error", {"type": kind.__name__, "message": words(error), "rank": self.rank})


def _take_stdout() -> TextIO:
    """The real stdout, for this module alone: what else writes to it reaches stderr."""
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "w", encoding="utf-8")


def _read_event() -> object:
    try:
        return json.load(sys.stdin)
    except (ValueError, RecursionError) as error:
        raise EventError(f"stdin: expected the event as JSON: {error}") from None


def _rank(event: object) -> int | None:
    try:
        return int(flat(event)["rank"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


if __name__ == "__main__":
    main()
