"""REPORT lines: what AWS Lambda itself says of an invocation at its end, in a function's log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = ["Report", "reports"]

# "REPORT RequestId: … Duration: 40243.33 ms Billed Duration: 40908 ms Memory Size: 10240 MB
# Max Memory Used: 5948 MB Init Duration: 663.81 ms", with tabs or blanks between; more may follow.
_REPORT = re.compile(
    r"REPORT RequestId: (?P<request>[\w-]{1,64})\s+Duration: (?P<duration>\d{1,9}(?:\.\d{1,9})?) ms"
    r"\s+Billed Duration: (?P<billed>\d{1,9}) ms\s+Memory Size: (?P<memory>\d{1,6}) MB"
    r"\s+Max Memory Used: (?P<used>\d{1,6}) MB"
    r"(?:\s+Init Duration: (?P<init>\d{1,9}(?:\.\d{1,9})?) ms)?"
)


class Report(NamedTuple):
    """What one REPORT line says. Lambda's MB are 2^20 bytes.

    Attributes:
        request: the invocation's id.
        duration_s: time in the handler.
        billed_s: what is billed, in whole milliseconds: since August 2025 (before: with images and
            runtimes of one's own) with ``init_s``.
        memory_mb: configured, which is what is billed.
        used_mb: the most that the instance has used so far.
        init_s: what came before the handler in a new instance; None in a warm one.
    """

    request: str
    duration_s: float
    billed_s: float
    memory_mb: int
    used_mb: int
    init_s: float | None


def reports(lines: Iterable[str]) -> Iterator[Report]:
    """Find the REPORT lines among others, whatever stands before them (a time, say)."""
    for line in lines:
        if found := _REPORT.search(line):
            yield Report(
                request=found["request"],
                duration_s=float(found["duration"]) / 1000,
                billed_s=int(found["billed"]) / 1000,
                memory_mb=int(found["memory"]),
                used_mb=int(found["used"]),
                init_s=float(found["init"]) / 1000 if found["init"] else None,
            )
