"""Who was at what, and when: the launcher's steps, and the stages that ranks tell in their records.

A rank's spans are by the clock of its own machine. On AWS, where each rank has one, they may be off
against each other and against the launcher's; nothing here moves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lambda_worker.timing import Stopwatch
from workflow.plan import Span

__all__ = ["all_spans", "launcher_spans", "rank_spans"]

_LATEST, _LONGEST = 1e11, 1e9  # seconds: the year 5138, 31 years
_MOST = 1000  # of one rank; it has six


def all_spans(launcher: Stopwatch, records: Sequence[Mapping[str, Any]]) -> list[Span]:
    """The launcher's steps, then all ranks' stages, in the order of their records."""
    own = [Span(None, *span) for span in launcher.spans]
    return own + [span for record in records for span in rank_spans(record)]


def rank_spans(record: Mapping[str, Any]) -> list[Span]:
    """A rank's stages; none in a record of an older version. What is no span is left out."""
    match record:
        case {"rank": int() as rank, "spans": list() as listed}:
            return [Span(rank, *fields) for fields in listed[:_MOST] if _is_span(fields)]
    return []


def launcher_spans(told: Mapping[str, Any]) -> list[Span]:
    """The launcher's steps, as `run.json` tells them. What is no span is left out."""
    match told:
        case {"spans": list() as listed}:
            steps = [each[1:] for each in listed[:_MOST] if isinstance(each, list) and each]
            return [Span(None, *fields) for fields in steps if _is_span(fields)]
    return []


def _is_span(fields: object) -> bool:
    """Whether these are a name and times that a calendar knows: files may be of strangers."""
    match fields:
        case [str(), int() | float() as start, int() | float() as seconds]:
            return 0 <= start < _LATEST and 0 <= seconds < _LONGEST  # not so for NaN
    return False
