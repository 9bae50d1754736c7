"""Spans of a run, and the trace that is made of them."""

from __future__ import annotations

import json
import math
import random
import re
from collections import defaultdict
from typing import Any

import pytest

from lambda_worker.timing import Stopwatch
from workflow.plan import Span
from workflow.results import Rank, Run
from workflow.spans import all_spans, launcher_spans, rank_spans
from workflow.trace import chrome_trace

NOW = 1_795_745_689.3487027
OWN = (
    Span(None, "server", NOW, 0.5),
    Span(None, "init", NOW + 0.5, 0.5),
    Span(None, "infer", NOW + 1, 7),
    Span(None, "summarize", NOW + 8, 0.25),
)
STAGES = ("join", "load", "tune", "barrier", "infer", "allreduce")


def make_run(*spans: Span, **fields: Any) -> Run:
    usual = {"place": "results/a", "source": "cosmic run", "name": "a", "data": "small"}
    return Run(**usual | {"spans": spans} | fields)


def of_rank(rank: int, start: float, seed: int = 0) -> list[Span]:
    """Stages without a gap, as a record has them: each moment is rounded by itself."""
    chance = random.Random(seed)
    spans, zero = [], 1000 + chance.random()
    last = zero
    for name in STAGES:
        now = last + chance.random()
        spans.append(Span(rank, name, start + last - zero, now - last))
        last = now
    return spans


def record(rank: object, spans: object) -> dict[str, object]:
    return {"rank": rank, "spans": spans}


# -- reading -------------------------------------------------------------------------------------


def test_the_launchers_steps_come_first_then_each_ranks() -> None:
    clock = Stopwatch()
    clock.lap("init")
    clock.lap("infer")
    records = [record(0, [["join", NOW, 1.5]]), {"rank": 1}, record(2, [["load", NOW, 0]])]
    spans = all_spans(clock, records)
    assert [(span.rank, span.name) for span in spans] == [
        *[(None, "init"), (None, "infer"), (0, "join"), (2, "load")]
    ]
    assert spans[2] == Span(0, "join", NOW, 1.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 3},  # of an older version
        record(3, None),
        record(3, "spans"),
        record(3, {"join": 1}),
        record(None, [["join", NOW, 1]]),  # would be taken for the launcher's
        record("3", [["join", NOW, 1]]),
    ]
    + [
        record(3, [span])
        for span in (
            *("join", [], ["join"], ["join", NOW], ["join", NOW, 1, 1], [1, NOW, 1], None),
            *(["join", str(NOW), 1], ["join", NOW, None], ["join", NOW, -0.1], ["join", -5, 1]),
            *(["join", math.nan, 1], ["join", NOW, math.nan], ["join", math.inf, 1]),
            *(["join", NOW, math.inf], ["join", 10**400, 1], ["join", NOW, 10**400]),
        )
    ],
)
def test_what_is_no_span_is_left_out(wrong: dict[str, object]) -> None:
    assert rank_spans(wrong) == []


def test_the_others_of_a_record_with_a_wrong_span_are_read() -> None:
    both = record(3, [["join", NOW, -1], ["load", NOW, 1]])
    assert rank_spans(both) == [Span(3, "load", NOW, 1)]


# -- the trace -----------------------------------------------------------------------------------


def checked(run: Run) -> dict[int, list[dict[str, Any]]]:
    """The events of each thread by time, of a trace that its format's documentation allows."""
    trace = json.loads(json.dumps(chrome_trace(run), allow_nan=False))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    assert isinstance(trace["otherData"], dict)
    by_thread: dict[int, list[dict[str, Any]]] = defaultdict(list)
    named = set()
    for event in trace["traceEvents"]:
        assert (event["pid"], type(event["tid"]), type(event["ts"])) == (1, int, int)
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            kinds = {
                "process_name": "name",
                "thread_name": "name",
                "thread_sort_index": "sort_index",
            }
            assert list(event["args"]) == [kinds[event["name"]]]
            named |= {event["tid"]} if event["name"] == "thread_name" else set()
            continue
        assert event.keys() == {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"}
        assert event["ph"] == "X"
        assert type(event["dur"]) is int
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        by_thread[event["tid"]].append(event)
    assert named == set(by_thread)
    for events in by_thread.values():
        ends = [event["ts"] + event["dur"] for event in events]
        assert [
            end for end, after in zip(ends, events[1:], strict=False) if end > after["ts"]
        ] == []
    return by_thread


def thread_names(run: Run) -> list[str]:
    """As viewers order them."""
    events = chrome_trace(run)["traceEvents"]
    meta = {name: {} for name in ("process_name", "thread_name", "thread_sort_index")}
    for event in events:
        if event["ph"] == "M":
            meta[event["name"]][event["tid"]] = event["args"]
    order = meta["thread_sort_index"]
    tids = sorted(order, key=lambda tid: order[tid]["sort_index"])
    return [meta["thread_name"][tid]["name"] for tid in tids]


def test_a_thread_for_the_launcher_and_each_rank() -> None:
    spans = [span for rank in (10, 2, 0) for span in of_rank(rank, NOW + 1, rank)]
    ranks = (Rank(rank=2, rows=417, batches=4),)
    run = make_run(*spans, *OWN, ranks=ranks)
    assert thread_names(run) == ["launcher", "rank 0", "rank 2", "rank 10"]
    assert chrome_trace(run)["traceEvents"][0]["args"] == {"name": "cosmic run a"}
    by_thread = checked(run)
    assert [(e["name"], e["ts"], e["dur"]) for e in by_thread[0]] == [
        ("server", 0, 500_000),
        ("init", 500_000, 500_000),
        ("infer", 1_000_000, 7_000_000),
        ("summarize", 8_000_000, 250_000),
    ]
    assert [event["name"] for event in by_thread[2]] == list(STAGES)
    assert by_thread[2][0]["ts"] == 1_000_000
    assert by_thread[2][0]["args"] == {"rank": 2, "rows": 417, "batches": 4}
    assert by_thread[0][0]["args"] == {}
    assert {event["cat"] for event in by_thread[0]} == {"launcher"}
    started = chrome_trace(run)["otherData"]["started"]
    assert re.fullmatch(r"2026-11-27T..:..:..\.\d+\+00:00", started)


def test_a_thousand_ranks() -> None:
    spans = [span for rank in range(1000) for span in of_rank(rank, NOW + rank / 997, rank)]
    ranks = tuple(Rank(rank=rank, rows=rank) for rank in range(1000))
    random.Random(0).shuffle(spans)
    by_thread = checked(make_run(*OWN, *spans, ranks=ranks))
    assert [len(events) for events in by_thread.values()] == [4] + [6] * 1000
    assert by_thread[1000][0]["args"] == {"rank": 999, "rows": 999}


def test_nothing_is_lost_by_rounding() -> None:
    """Spans that follow each other at every fraction of a microsecond."""
    for seed in range(200):
        (events,) = checked(make_run(*of_rank(0, NOW + seed / 7e6, seed))).values()
        for span, event in zip(of_rank(0, NOW, seed), events, strict=True):
            assert event["dur"] == pytest.approx(span.seconds * 1e6, abs=2)


def test_spans_that_overlap_get_threads_of_their_own() -> None:
    twice = [Span(1, "load", NOW, 5), Span(1, "infer", NOW + 1, 5), Span(1, "gather", NOW + 6, 1)]
    run = make_run(*twice)
    assert thread_names(run) == ["rank 1", "rank 1 (2)"]
    names = [[event["name"] for event in events] for events in checked(run).values()]
    assert names == [["load", "gather"], ["infer"]]


def test_a_run_without_spans() -> None:
    run = make_run()
    assert checked(run) == {}
    assert chrome_trace(run)["otherData"] == {"run": "a", "on": "local"}


def test_times_that_no_calendar_knows_are_left_out() -> None:
    odd = [["join", *times] for times in ((1e300, 1), (NOW, 1e300), (math.nan, 1), (-1, 1))]
    assert rank_spans(record(0, [*odd, ["load", NOW, 1]])) == [Span(0, "load", NOW, 1)]
    steps = [*([None, *each] for each in odd), "init", [], [None], [None, "init", NOW, 1]]
    assert launcher_spans({"spans": steps}) == [Span(None, "init", NOW, 1)]


def test_empty_spans_are_kept() -> None:
    events = checked(make_run(Span(0, "join", NOW, 0), Span(0, "load", NOW, 0)))[0]
    assert [(event["ts"], event["dur"]) for event in events] == [(0, 0), (0, 0)]


def test_clocks_that_are_wrong_for_certain_are_told_and_not_corrected() -> None:
    spans = [*of_rank(0, NOW + 1), *of_rank(1, NOW - 40), *of_rank(2, NOW + 3600)]
    run = make_run(*OWN, *spans, on="aws")
    note, behind, ahead = chrome_trace(run)["otherData"]["clocks"]
    assert "by its own clock" in note
    assert behind == "rank 1: at least 40.000 s behind"
    late = spans[-1].start + spans[-1].seconds - (OWN[-1].start + OWN[-1].seconds)
    assert ahead == f"rank 2: at least {late:.3f} s ahead"
    by_thread = checked(run)
    assert by_thread[2][0]["ts"] == 0
    assert by_thread[0][0]["ts"] == by_thread[1][0]["ts"] - 1_000_000 == 40_000_000


def test_on_aws_without_the_launchers_spans_nobody_knows() -> None:
    (note,) = chrome_trace(make_run(*of_rank(0, NOW), on="aws"))["otherData"]["clocks"]
    assert "by its own clock" in note
