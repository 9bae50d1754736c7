"""The figures that the original project has published, calculated anew from its files.

Per configuration, the mean over its runs, also of runs that are incomplete, as it was published.
docs/results.md says how the figures come about, and why they differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from workflow.results import Run, Tabled
from workflow.results_checks import trimmed_mean

__all__ = ["Published", "published"]


class Published(NamedTuple):
    """A configuration of the original, with means over ``runs``.

    Attributes:
        incomplete: of ``runs``, those that lack ranks or data.
        tabled: of ``runs``, those that only a table of the original tells of.
        data: both sizes, for people.
        cpu_s: of each run, the mean CPU time of its ranks without outliers.
        bits_per_s_sum_of_ranks: each run's sum of bits over CPU time: what was published.
        bits_per_s_wall_clock: bits over the Map state's duration; None unless all runs have it and
            all their ranks: the bits of some in the time of all are no rate.
        bits_per_s_end_to_end: bits over the duration of the whole execution; likewise.
    """

    partition_mb: float
    data_gb: float
    data: str
    runs: int
    incomplete: int
    tabled: int
    cpu_s: float | None
    bits_per_s_sum_of_ranks: float | None
    bits_per_s_wall_clock: float | None
    bits_per_s_end_to_end: float | None


class _Figures(NamedTuple):
    """What one run adds to the means."""

    whole: bool
    tabled: bool
    cpu_s: float | None
    summed: float | None
    wall_clock: float | None
    end_to_end: float | None


def published(runs: Iterable[Run], tabled: Iterable[Tabled] = ()) -> list[Published]:
    """Return the original's scaling runs by partition and size of the data; empty without any."""
    groups: dict[tuple[float, float], list[_Figures]] = {}
    for run in runs:
        if run.partition_mb is not None and run.data_gb is not None and _scaling(run):
            groups.setdefault((run.partition_mb, run.data_gb), []).append(_of_run(run))
    for row in tabled:
        groups.setdefault((row.partition_mb, row.data_gb), []).append(_of_row(row))
    return [_means(*key, groups[key]) for key in sorted(groups)]


def _scaling(run: Run) -> bool:
    """Neither of the runs that vary the batch size, nor further files of a run's folder."""
    last = run.name.rpartition("/")[2]
    return run.source == "original" and "/Batches/" not in run.name and "_" not in last


def _of_run(run: Run) -> _Figures:
    whole = run.status == "ok"
    cpu_s = trimmed_mean([rank.cpu_s for rank in run.ranks if rank.cpu_s is not None])
    rates = [_rate(whole, run.bits, seconds) for seconds in (run.inference_s, run.total_s)]
    return _Figures(whole, False, cpu_s, _summed(run), *rates)


def _of_row(row: Tabled) -> _Figures:
    """A table does not tell how many ranks it is of: only by the bits one can see that some lack.

    Partitions do not fill the size that they are named for: 95.3 % of 100 GB were all there is.
    """
    whole = row.bits is not None and row.bits >= 0.95 * 8 * row.data_gb * 2**30
    rates = [_rate(whole, row.bits, seconds) for seconds in (row.inference_s, row.total_s)]
    return _Figures(whole, True, row.cpu_s, row.bits_per_s_sum_of_ranks, *rates)


def _means(partition_mb: float, data_gb: float, runs: Sequence[_Figures]) -> Published:
    return Published(
        partition_mb,
        data_gb,
        f"{partition_mb:g}MB partitions, {data_gb:g}GB",
        len(runs),
        sum(not run.whole for run in runs),
        sum(run.tabled for run in runs),
        cpu_s=_mean(run.cpu_s for run in runs),
        bits_per_s_sum_of_ranks=_mean(run.summed for run in runs),
        bits_per_s_wall_clock=_mean(run.wall_clock for run in runs),
        bits_per_s_end_to_end=_mean(run.end_to_end for run in runs),
    )


def _summed(run: Run) -> float | None:
    rates = [rank.bits_per_s for rank in run.ranks if rank.bits_per_s is not None]
    return math.fsum(rates) if rates and len(rates) == len(run.ranks) else None


def _rate(whole: bool, bits: float | None, seconds: float | None) -> float | None:
    return bits / seconds if whole and bits is not None and seconds else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    numbers = [value for value in known if value is not None]
    return statistics.fmean(numbers) if numbers and len(numbers) == len(known) else None
