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

# Files may come from strangers: seconds that a calendar knows.
_LATEST, _LONGEST = 1e11, 1e9


def all_spans(launcher: Stopwatch, records: Sequence[Mapping[str, Any]]) -> list[Span]:
    """The launcher's steps, then all ranks' stages, in the order of their records."""
    own = [Span(None, *span) for span in launcher.spans]
    return own + [span for record in records for span in rank_spans(record)]


def rank_spans(record: Mapping[str, Any]) -> list[Span]:
    """A rank's stages; none in a record of an older version. What is no span is left out."""
    match record:
        case {"rank": int() as rank, "spans": list() as spans}:
            return [span for fields in spans if (span := _span(rank, fields))]
    return []


def launcher_spans(content: Mapping[str, Any]) -> list[Span]:
    """The launcher's steps from what stands in ``run.json``. What is no span is left out."""
    match content:
        case {"spans": list() as spans}:
            own = [
                fields[1:] for fields in spans if isinstance(fields, list) and fields[:1] == [None]
            ]
            return [span for fields in own if (span := _span(None, fields))]
    return []


def _span(rank: int | None, fields: object) -> Span | None:
    match fields:
        case [str() as name, int() | float() as start, int() | float() as seconds]:
            if 0 <= start < _LATEST and 0 <= seconds < _LONGEST:  # not so for NaN
                return Span(rank, name, start, seconds)
    return None
