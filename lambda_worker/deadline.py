"""The end of a function's time: told to the other ranks, before AWS Lambda cuts this one off.

A function that runs into its limit is killed between two instructions: no error, no goodbye, no
record. So an alarm ends the work a little before, wherever it stands.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from fmi_client.sync import Communicator

Progress = Callable[[str, int, int], None]
"""Called with stage, rows done and rows of this rank."""

MARGIN_SECONDS = 5.0
"""What remains then must do for: the call that is running, say of the model on a batch, to come
back to Python, where alarms are heard (about 1 s); a clean-up that hangs (1 s, see below); telling
the others and leaving (0.5 s); the record of the failure (2 s)."""

MARGIN_SHARE = 0.25
"""A function that has little time at all spends at least three quarters of it on work."""

AGAIN_SECONDS = 1.0
"""So long after an alarm comes the next one: the error of the first may be held up by something
that it has to clean up, such as a thread that still reads."""

WAITING = {"join": "the other ranks to join", "barrier": "the other ranks", "gather": "their parts"}
"""Stages in which a rank only waits: if it runs out of time there, another one is to blame."""


class DeadlineError(RuntimeError):
    """A rank is about to run out of its function's time.

    Attributes:
        waiting: whether it was only waiting for others.
    """

    def __init__(self, message: str, waiting: bool = False) -> None:
        super().__init__(message)
        self.waiting = waiting


class OutOfTime(BaseException):
    """How a `DeadlineError` travels.

    No `except Exception` of a library in between, which would try again or turn it into an error
    of its own, must hold it up.
    """


class Deadline:
    """The time that a rank has; without an AWS Lambda context as much as it likes.

    Attributes:
        stage: what the rank is doing, as its progress names it.
    """

    def __init__(self, context: Any, rank: int) -> None:
        self.stage = "start"
        self._rank = rank
        ask = getattr(context, "get_remaining_time_in_millis", None)
        self._seconds: float | None = None if ask is None else ask() / 1000
        self._end = time.monotonic() + (self._seconds or 0)

    @property
    def margin(self) -> float:
        """Seconds before the end at which the work is stopped."""
        return min(MARGIN_SECONDS, MARGIN_SHARE * (self._seconds or 0))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Stop the block when it is time.

        Raises:
            DeadlineError: it was stopped, or has no time to begin with.
        """
        try:
            if self._seconds is None:
                yield
            elif threading.current_thread() is not threading.main_thread():
                yield  # alarms are for the main thread, where Lambda runs handlers; `check` is left
            else:
                with self._armed():
                    yield
        except OutOfTime as ring:
            text = "; ".join([str(ring), *getattr(ring, "__notes__", ())])  # what it waited for
            raise DeadlineError(text, self.stage in WAITING) from None

    def check(self) -> None:
        """Stop here if it is time: for threads that no alarm reaches.

        Raises:
            OutOfTime: it is.
        """
        if self._seconds is not None and time.monotonic() > self._end - self.margin:
            raise OutOfTime(self._text())

    @contextmanager
    def _armed(self) -> Iterator[None]:
        began = time.monotonic()
        handler = signal.signal(signal.SIGALRM, self._ring)
        left = max(self._end - self.margin - began, 1e-3)  # 0 would mean: never
        before = signal.setitimer(signal.ITIMER_REAL, left, AGAIN_SECONDS)
        try:
            yield
        finally:
            try:
                self.disarm()
            finally:  # also if it rang just now: the next alarm would end the whole process
                self.disarm()
                signal.signal(signal.SIGALRM, handler)
            if before[0]:  # somebody else's alarm, which is due as before
                due = max(before[0] - (time.monotonic() - began), 1e-3)
                signal.setitimer(signal.ITIMER_REAL, due, before[1])

    def disarm(self) -> None:
        """No alarm from now on: what is left to do is short, and must be done."""
        if self._seconds is not None and threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, number: int, frame: FrameType | None) -> NoReturn:
        raise OutOfTime(self._text())

    def _text(self) -> str:
        left = max(self._end - time.monotonic(), 0.0)
        doing = f"waiting for {WAITING[self.stage]}" if self.stage in WAITING else "at work"
        return (
            f"rank {self._rank} has only {left:.1f} s left of the {self._seconds or 0:.1f} s that "
            f"its function had, and is still {doing} (stage {self.stage}): raise the function's "
            "timeout (AWS allows 900 s), or use more ranks"
        )


class Watch:
    """A rank's progress, which looks at every step whether to go on: if it has time, and a job."""

    def __init__(self, deadline: Deadline, comm: Communicator | None, progress: Progress) -> None:
        self._deadline, self._comm, self._progress = deadline, comm, progress

    def at(self, stage: str) -> None:
        """Only note what the rank is doing now."""
        self._deadline.stage = stage

    def __call__(self, stage: str, rows: int, of: int) -> None:
        """Note and tell it, and go on if that makes sense.

        Raises:
            OutOfTime: the time is over. FmiError: the job is.
        """
        self.at(stage)
        self._progress(stage, rows, of)
        if stage == "done":
            return  # all is written, whatever has happened meanwhile
        self.look()

    def look(self) -> None:
        """Go on if that makes sense; for whoever waits for something, every now and then.

        Raises:
            OutOfTime: the time is over. FmiError: the job is.
        """
        self._deadline.check()
        if self._comm is not None:
            self._comm.poll()
