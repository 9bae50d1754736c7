"""Runs as rows of a table, and what the repeats of a configuration have in common.

Every column's definition and unit is in docs/results.md.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from workflow.results import METRICS, Rank, Run

__all__ = ["COLUMNS", "MEASURES", "Configuration", "Spread", "Value", "row", "summarise"]

Value = str | int | float | None

_MEASURED = (
    "total_s",
    "init_s",
    "join_s",
    "load_s",
    "inference_s",
    "collective_s",
    "rank_p50_s",
    "rank_p95_s",
    "rank_max_s",
    "straggler_ratio",
    "rank_cpu_p50_s",
    "peak_memory_mb",
    "memory_limit_mb",
    "rows_per_s_wall_clock",
    "rows_per_s_sum_of_ranks",
    "bits_per_s_wall_clock",
    "bits_per_s_sum_of_ranks",
    *METRICS,
)
MEASURES = (*_MEASURED, "cost_usd")
"""The columns of which a configuration has median, least and greatest."""

COLUMNS = (
    *("run", "source", "on", "data", "partition_mb", "data_gb", "world_size", "ranks_recorded"),
    *("batch_size", "repeat", "engine", "precision", "status", "error", "rows", "bits"),
    *_MEASURED,
    *("place", "cost_usd"),
)
"""All columns of a row, in their order."""


class Spread(NamedTuple):
    """A measure over the repeats of a configuration; all three are the same for one run."""

    median: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The runs of one configuration; what has a `Spread` is that of its runs that are ok.

    Attributes:
        runs: all of them, also those that failed.
        measures: by column, those of `MEASURES` that at least one run tells.
        speedup: median ``inference_s`` of world size 1 over this one's, all else equal; None
            without a run of world size 1.
        efficiency: ``speedup`` over ``world_size``: 1 is ideal.
        total_speedup: as ``speedup``, of ``total_s``: what a person who waits sees.
    """

    source: str
    on: str
    data: str
    world_size: int | None
    batch_size: int | None
    engine: str | None
    precision: str | None
    runs: tuple[Run, ...]
    ok: int
    failed: int
    incomplete: int
    measures: Mapping[str, Spread]
    speedup: float | None = None
    efficiency: float | None = None
    total_speedup: float | None = None


def summarise(runs: Iterable[Run]) -> list[Configuration]:
    """Group ``runs`` by configuration, in the order of data, engine, world size and batch size."""
    groups: dict[_Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    found = [_configuration(key, groups[key]) for key in sorted(groups, key=_order)]
    alone = {_but_world(c): c for c in found if c.world_size == 1}
    return [_compared(c, alone.get(_but_world(c))) for c in found]


def row(run: Run) -> dict[str, Value]:
    """Return a run as a row: each of `COLUMNS`, None where it is not known.

    Times are wall-clock seconds, except ``rank_cpu_p50_s``. ``total_s`` and ``inference_s`` are the
    run's. ``rank_p50_s``, ``rank_p95_s`` and ``rank_max_s`` are the median, 95th percentile and
    slowest of the ranks' inference loops; ``straggler_ratio`` is the slowest over the median.
    ``init_s``, ``join_s``, ``load_s`` and ``collective_s`` are those of the rank that took longest
    for it. Rates: ``…_wall_clock`` is all rows (bits) over ``inference_s``, None unless all ranks
    are there; ``…_sum_of_ranks`` adds up the ranks' own rates, which the original has per CPU time,
    and is None if a rank has none.
    """
    loops = _known(run.ranks, "inference_s")
    clock = run.inference_s if run.status == "ok" else None
    return {
        "run": run.name,
        "source": run.source,
        "on": run.on,
        "data": run.data,
        "partition_mb": run.partition_mb,
        "data_gb": run.data_gb,
        "world_size": run.world_size,
        "ranks_recorded": len(run.ranks),
        "batch_size": run.batch_size,
        "repeat": run.repeat,
        "engine": run.engine,
        "precision": run.precision,
        "status": run.status,
        "error": run.error,
        "rows": run.rows,
        "bits": run.bits,
        "total_s": run.total_s,
        "init_s": _most(run.ranks, "init_s"),
        "join_s": _most(run.ranks, "join_s"),
        "load_s": _most(run.ranks, "load_s"),
        "inference_s": run.inference_s,
        "collective_s": _most(run.ranks, "collective_s"),
        "rank_p50_s": _percentile(loops, 50),
        "rank_p95_s": _percentile(loops, 95),
        "rank_max_s": max(loops, default=None),
        "straggler_ratio": _ratio(max(loops, default=None), _percentile(loops, 50)),
        "rank_cpu_p50_s": _percentile(_known(run.ranks, "cpu_s"), 50),
        "peak_memory_mb": _most(run.ranks, "peak_memory_mb"),
        "memory_limit_mb": min(_known(run.ranks, "memory_limit_mb"), default=None),
        "rows_per_s_wall_clock": _ratio(run.rows, clock),
        "rows_per_s_sum_of_ranks": _sum(run.ranks, "rows_per_s"),
        "bits_per_s_wall_clock": _ratio(run.bits, clock),
        "bits_per_s_sum_of_ranks": _sum(run.ranks, "bits_per_s"),
        **{name: run.metrics.get(name) for name in METRICS},
        "place": run.place,
        "cost_usd": run.cost_usd,
    }


def _known(ranks: Sequence[Rank], name: str) -> list[float]:
    return [value for rank in ranks if (value := getattr(rank, name)) is not None]


def _most(ranks: Sequence[Rank], name: str) -> float | None:
    return max(_known(ranks, name), default=None)


def _sum(ranks: Sequence[Rank], name: str) -> float | None:
    """All ranks' together: a sum over some of them would look like that of all."""
    known = _known(ranks, name)
    return math.fsum(known) if known and len(known) == len(ranks) else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _percentile(values: Sequence[float], percent: int) -> float | None:
    """Interpolated linearly, as numpy does."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


_NUMBER = re.compile(r"\d{1,15}(?:\.\d{1,15})?")
_Key = tuple[str, str, str, int | None, int | None, str | None, str | None]


def _key(run: Run) -> _Key:
    return (
        run.source,
        run.on,
        run.data,
        run.world_size,
        run.batch_size,
        run.engine,
        run.precision,
    )


def _order(key: _Key) -> tuple[object, ...]:
    """Sorted by what a reader looks for; unknown sizes first."""
    source, on, data, world_size, batch_size, engine, precision = key
    numbers = [float(digits) for digits in _NUMBER.findall(data)]
    words = _NUMBER.sub("", data)
    return (
        source,
        on,
        words,
        numbers,
        engine or "",
        precision or "",
        world_size or 0,
        batch_size or 0,
    )


def _configuration(key: _Key, runs: Sequence[Run]) -> Configuration:
    source, on, data, world_size, batch_size, engine, precision = key
    status = [run.status for run in runs]
    return Configuration(
        source=source,
        on=on,
        data=data,
        world_size=world_size,
        batch_size=batch_size,
        engine=engine,
        precision=precision,
        runs=tuple(sorted(runs, key=lambda run: run.repeat)),
        ok=status.count("ok"),
        failed=status.count("failed"),
        incomplete=status.count("incomplete"),
        measures=_measures([row(run) for run in runs if run.status == "ok"]),
    )


def _measures(rows: Sequence[Mapping[str, Value]]) -> dict[str, Spread]:
    found = {}
    for name in MEASURES:
        values = [value for r in rows if isinstance(value := r[name], int | float)]
        if values:
            found[name] = Spread(statistics.median(values), min(values), max(values))
    return found


def _but_world(c: Configuration) -> tuple[object, ...]:
    return (c.source, c.on, c.data, c.batch_size, c.engine, c.precision)


def _compared(c: Configuration, alone: Configuration | None) -> Configuration:
    if alone is None:
        return c
    speedup = _faster(alone, c, "inference_s")
    return replace(
        c,
        speedup=speedup,
        efficiency=_ratio(speedup, c.world_size),
        total_speedup=_faster(alone, c, "total_s"),
    )


def _faster(alone: Configuration, c: Configuration, name: str) -> float | None:
    if name not in alone.measures or name not in c.measures:
        return None
    return _ratio(alone.measures[name].median, c.measures[name].median)
