"""Who was at what, and when: the launcher's steps, and the stages that ranks tell in their records.

A rank's spans are by the clock of its own machine. On AWS, where each rank has one, they may be off
against each other and against the launcher's; nothing here moves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lambda_worker.timing import Stopwatch
from workflow.plan import Span

__all__ = ["all_spans", "rank_spans", "usable"]

_LATEST, _LONGEST = 1e11, 1e9  # seconds: the year 5138, 31 years


def all_spans(launcher: Stopwatch, records: Sequence[Mapping[str, Any]]) -> list[Span]:
    """The launcher's steps, then all ranks' stages, in the order of their records."""
    own = [Span(None, *span) for span in launcher.spans]
    return own + [span for record in records for span in rank_spans(record)]


def rank_spans(record: Mapping[str, Any]) -> list[Span]:
    """A rank's stages; none in a record of an older version. What is no span is left out."""
    match record:
        case {"rank": int() as rank, "spans": list() as listed}:
            spans = [Span(rank, *fields) for fields in listed if _is_span(fields)]
            return [span for span in spans if usable(span)]
    return []


def usable(span: Span) -> bool:
    """Whether a calendar knows its times: files may come from strangers."""
    return 0 <= span.start < _LATEST and 0 <= span.seconds < _LONGEST  # not so for NaN


def _is_span(fields: object) -> bool:
    match fields:
        case [str(), int() | float(), int() | float()]:
            return True
    return False
