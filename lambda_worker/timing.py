"""What a rank's record says of time: how long the process took to get ready, and each stage."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["Stopwatch", "init_seconds", "ready"]

_init = 0.0


class Stopwatch:
    """Stages one after the other, each from the end of the one before.

    Durations are by the monotonic clock, so that none is negative or wrong when somebody sets the
    clock; the wall clock is looked at once, at the start.

    Attributes:
        init: what the process needed before, in seconds.
        spans: (name, start in Unix seconds, seconds) of each stage so far.
    """

    def __init__(self, init: float = 0.0) -> None:
        self.init = init
        self._started = time.time()
        self._zero = self._last = time.perf_counter()
        self.spans: list[tuple[str, float, float]] = []

    def lap(self, name: str | None) -> None:
        """End a stage; None: what was done since the last one is no stage."""
        now = time.perf_counter()
        if name is not None:
            self.spans.append((name, self._started + self._last - self._zero, now - self._last))
        self._last = now

    def seconds(self, name: str) -> float:
        """Of all stages of this name; 0 without one."""
        return sum((took for stage, _, took in self.spans if stage == name), 0.0)

    @property
    def total(self) -> float:
        """Seconds from the start to the end of the last stage."""
        return self._last - self._zero


def ready() -> None:
    """Note that this process is ready for events: the end of what AWS Lambda calls init.

    Not the first event's arrival: Lambda may start a process some time before it needs it.
    """
    global _init
    _init = _age()


def init_seconds() -> float:
    """From the start of the process until it was ready; 0 at every call but the first."""
    global _init
    seconds, _init = _init, 0.0
    return seconds


def _age() -> float:
    """Seconds since this process was started, as exact as a tick of the kernel (10 ms)."""
    # The second field is the program's name, which may hold spaces and brackets.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since boot
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
