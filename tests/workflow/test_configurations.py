"""Runs as rows, and what repeats of a configuration have in common."""

from __future__ import annotations

from typing import Any

import pytest

from workflow.configurations import COLUMNS, Spread, row, summarise
from workflow.results import Rank, Run


def _run(seconds: float = 2.0, **more: Any) -> Run:
    fields: dict[str, Any] = {
        "place": "p",
        "source": "cosmic run",
        "name": "r",
        "data": "small",
        "world_size": 1,
        "batch_size": 32,
        "engine": "torch",
        "precision": "fp32",
        "inference_s": seconds,
    }
    return Run(**{**fields, **more})


def test_a_row_has_all_columns_in_their_order() -> None:
    assert tuple(row(_run())) == COLUMNS


def test_a_row_of_a_bare_run_knows_nothing_it_was_not_told() -> None:
    unknown = row(Run(place="p", source="original", name="r", data="d"))
    told = {
        **{"run": "r", "source": "original", "on": "local", "data": "d", "ranks_recorded": 0},
        **{"repeat": 1, "status": "ok", "place": "p"},
    }
    assert unknown == {**dict.fromkeys(COLUMNS), **told}


def test_times_of_ranks() -> None:
    loops = [1.0, 2.0, 3.0, 4.0, 10.0]
    ranks = tuple(
        Rank(rank=n, inference_s=s, join_s=s / 10, cpu_s=s * 2) for n, s in enumerate(loops)
    )
    found = row(_run(ranks=ranks))
    assert (found["rank_p50_s"], found["rank_max_s"]) == (3.0, 10.0)
    assert found["rank_p95_s"] == pytest.approx(8.8)  # numpy.percentile's
    assert found["straggler_ratio"] == pytest.approx(10 / 3)
    assert (found["join_s"], found["rank_cpu_p50_s"]) == (1.0, 6.0)


def test_wall_clock_and_sum_of_ranks_are_two_things() -> None:
    ranks = (Rank(rows_per_s=10.0, bits_per_s=100.0), Rank(rows_per_s=20.0, bits_per_s=200.0))
    found = row(_run(4.0, rows=60, bits=600.0, ranks=ranks))
    assert (found["rows_per_s_wall_clock"], found["rows_per_s_sum_of_ranks"]) == (15.0, 30.0)
    assert (found["bits_per_s_wall_clock"], found["bits_per_s_sum_of_ranks"]) == (150.0, 300.0)


def test_a_sum_of_ranks_is_of_all_ranks_or_none() -> None:
    found = row(_run(ranks=(Rank(rows_per_s=10.0), Rank())))
    assert found["rows_per_s_sum_of_ranks"] is None


@pytest.mark.parametrize("status", ["failed", "incomplete"])
def test_some_ranks_rows_in_the_time_of_all_are_no_rate(status: str) -> None:
    found = row(_run(4.0, rows=60, bits=600.0, status=status, ranks=(Rank(rows_per_s=10.0),)))
    assert (found["rows_per_s_wall_clock"], found["bits_per_s_wall_clock"]) == (None, None)
    assert (found["rows_per_s_sum_of_ranks"], found["rows"]) == (10.0, 60)


def test_no_time_gives_no_rate() -> None:
    assert row(_run(0.0, rows=10))["rows_per_s_wall_clock"] is None


def test_memory_of_the_largest_rank_and_the_smallest_limit() -> None:
    ranks = tuple(Rank(peak_memory_mb=m, memory_limit_mb=2 * m) for m in (300.0, 400.0))
    found = row(_run(ranks=ranks))
    assert (found["peak_memory_mb"], found["memory_limit_mb"]) == (400.0, 600.0)


def test_repeats_give_median_least_and_greatest() -> None:
    (found,) = summarise(_run(seconds, repeat=n) for n, seconds in enumerate((5.0, 2.0, 3.0), 1))
    assert found.measures["inference_s"] == Spread(3.0, 2.0, 5.0)
    assert (found.ok, found.failed, found.incomplete) == (3, 0, 0)


def test_failed_and_incomplete_runs_are_counted_and_not_measured() -> None:
    runs = [_run(2.0), _run(9.0, status="failed"), _run(1.0, status="incomplete")]
    (found,) = summarise(runs)
    assert found.measures["inference_s"] == Spread(2.0, 2.0, 2.0)
    assert (found.ok, found.failed, found.incomplete, len(found.runs)) == (1, 1, 1, 3)


def test_speedup_against_world_size_1_of_the_same() -> None:
    runs = [_run(8.0, total_s=10.0), _run(2.5, total_s=5.0, world_size=4), _run(7.0, data="large")]
    large, one, four = summarise(runs)
    assert (one.speedup, one.efficiency, one.total_speedup) == (1.0, 1.0, 1.0)
    assert four.speedup == pytest.approx(3.2)
    assert four.efficiency == pytest.approx(0.8)
    assert four.total_speedup == pytest.approx(2.0)
    assert large.data == "large"


@pytest.mark.parametrize(
    "other", [{"batch_size": 64}, {"data": "x"}, {"engine": "onnx"}, {"precision": "bf16"}]
)
def test_no_speedup_against_something_else(other: dict[str, Any]) -> None:
    found = summarise([_run(8.0, **other), _run(2.0, world_size=4)])
    assert next(c for c in found if c.world_size == 4).speedup is None


def test_no_speedup_where_world_size_1_failed() -> None:
    found = summarise([_run(8.0, status="failed"), _run(2.0, world_size=4)])
    assert found[1].speedup is None


def test_sizes_are_sorted_as_numbers() -> None:
    names = ["100MB, 2GB", "25MB, 10GB", "25MB, 2GB"]
    found = summarise(_run(data=name) for name in names)
    assert [c.data for c in found] == ["25MB, 2GB", "25MB, 10GB", "100MB, 2GB"]


def test_a_decimal_point_is_part_of_a_number() -> None:
    names = ["25MB, 12.6GB", "25MB, 10GB", "25MB, 1GB"]
    found = summarise(_run(data=name) for name in names)
    assert [c.data for c in found] == ["25MB, 1GB", "25MB, 10GB", "25MB, 12.6GB"]
