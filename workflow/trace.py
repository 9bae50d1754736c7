"""A run as a trace: a file that ui.perfetto.dev and chrome://tracing open.

The form is Chrome's Trace Event Format, "JSON Object Format": one process, the run; in it a thread
for the launcher and one for each rank; on these a complete event ("X") for each span.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from workflow.plan import Json, Span
from workflow.results import Rank, Run

__all__ = ["chrome_trace"]

_PID = 1
_CLOCKS = "Each machine's spans are by its own clock; on AWS these may be off against each other."

# Microseconds. A Unix time of today is exact to 0.2 as a float, so that the end of one span and the
# start of the next, which are one moment, may be that far apart.
_SAME = 2


def chrome_trace(run: Run) -> Json:
    """The run's spans, to be written as JSON.

    Times are in whole microseconds from the first span's start. Nothing is moved: where clocks
    differ, ranks that waited for each other seem not to have. ``otherData`` tells of ranks whose
    clocks are wrong for certain. Spans of one rank that overlap, which none of ours do, are put on
    threads of their own, since viewers drop them otherwise.

    Args:
        run: without spans, as of an older version, the trace has no events but the run's name.
    """
    zero = min((span.start for span in run.spans), default=0.0)
    events = [_meta("process_name", 0, name=f"{run.source} {run.name}")]
    tracks, ranks = _tracks(run.spans), {record.rank: record for record in run.ranks}
    names = _thread_names(rank for rank, _ in tracks)
    for tid, ((rank, spans), name) in enumerate(zip(tracks, names, strict=True)):
        events.append(_meta("thread_name", tid, name=name))
        events.append(_meta("thread_sort_index", tid, sort_index=tid))
        events += _events(spans, zero, tid, _args(rank, ranks))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"run": run.name, "on": run.on, **_times(run.on, run.spans)},
    }


def _tracks(spans: Iterable[Span]) -> list[tuple[int | None, list[Span]]]:
    """The launcher's spans and each rank's, in order of time, so that none overlap."""
    tracks: dict[int | None, list[list[Span]]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.start):
        lanes = tracks[span.rank]
        free = (lane for lane in lanes if _end(lane[-1]) <= span.start + _SAME / 1e6)
        if (lane := next(free, None)) is None:
            lanes.append(lane := [])
        lane.append(span)
    order = sorted(tracks, key=lambda rank: -1 if rank is None else rank)
    return [(rank, lane) for rank in order for lane in tracks[rank]]


def _end(span: Span) -> float:
    return span.start + span.seconds


def _thread_names(ranks: Iterable[int | None]) -> Iterator[str]:
    seen: dict[int | None, int] = defaultdict(int)
    for rank in ranks:
        seen[rank] += 1
        more = f" ({seen[rank]})" if seen[rank] > 1 else ""
        yield ("launcher" if rank is None else f"rank {rank}") + more


def _events(spans: list[Span], zero: float, tid: int, args: Json) -> Iterator[Json]:
    """Complete events; what is rounded never makes one reach into the next."""
    starts = [round((span.start - zero) * 1e6) for span in spans]
    for span, start, following in zip(spans, starts, [*starts[1:], None], strict=True):
        end = start + round(span.seconds * 1e6)
        if following is not None:
            end = max(start, min(end, following))
        yield {
            "ph": "X",
            "name": span.name,
            "cat": "launcher" if span.rank is None else "rank",
            "pid": _PID,
            "tid": tid,
            "ts": start,
            "dur": end - start,
            "args": args,
        }


def _meta(kind: str, tid: int, **args: Any) -> Json:
    return {"ph": "M", "name": kind, "pid": _PID, "tid": tid, "ts": 0, "args": args}


def _args(rank: int | None, ranks: Mapping[int | None, Rank]) -> Json:
    """What a click on a span shows of its rank."""
    record = ranks.get(rank, Rank()) if rank is not None else Rank()
    known = {"rank": rank, "rows": record.rows, "batches": record.batches}
    return {name: value for name, value in known.items() if value is not None}


def _times(on: str, spans: Sequence[Span]) -> Json:
    """When the trace begins, and what is to be known of clocks."""
    if not spans:
        return {}
    started = datetime.fromtimestamp(min(span.start for span in spans), UTC).isoformat()
    # On this machine all have one clock.
    return {"started": started} | ({"clocks": [_CLOCKS, *_wrong(spans)]} if on != "local" else {})


def _wrong(spans: Sequence[Span]) -> Iterator[str]:
    """Clocks that are wrong: no rank works before the launcher starts, or after its end."""
    own = [span for span in spans if span.rank is None]
    if not own:
        return
    first, last = min(span.start for span in own), max(map(_end, own))
    behind: dict[int | None, float] = defaultdict(float)
    ahead: dict[int | None, float] = defaultdict(float)
    for span in spans:
        behind[span.rank] = max(behind[span.rank], first - span.start)
        ahead[span.rank] = max(ahead[span.rank], _end(span) - last)
    for seconds, word in ((behind, "behind"), (ahead, "ahead")):
        for rank, most in seconds.items():
            if most > 0:
                yield f"rank {rank}: at least {most:.3f} s {word}"
