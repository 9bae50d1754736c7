"""Who was at what, and when: the launcher's steps, and the stages that ranks tell in their records.

A rank's spans are by the clock of its own machine. On AWS, where each rank has one, they may be off
against each other and against the launcher's; nothing here moves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lambda_worker.timing import Stopwatch
from workflow.plan import Span

__all__ = ["all_spans", "rank_spans"]

_LIMIT = 1e12  # seconds; files may come from strangers


def all_spans(launcher: Stopwatch, records: Sequence[Mapping[str, Any]]) -> list[Span]:
    """The launcher's steps, then all ranks' stages, in the order of their records."""
    own = [Span(None, *span) for span in launcher.spans]
    return own + [span for record in records for span in rank_spans(record)]


def rank_spans(record: Mapping[str, Any]) -> list[Span]:
    """A rank's stages; none in a record of an older version. What is no span is left out."""
    given = record.get("spans")
    spans = given if isinstance(given, list) else []
    return [Span(record.get("rank"), *span) for span in spans if _is_span(span)]


def _is_span(span: object) -> bool:
    match span:
        case [str(), int() | float() as start, int() | float() as seconds]:
            return abs(start) < _LIMIT and 0 <= seconds < _LIMIT  # not so for NaN
    return False
