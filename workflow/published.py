"""The figures that the original project has published, calculated anew from its files.

Per configuration, the mean over its runs, also of runs that are incomplete, as it was published.
docs/results.md says how the figures come about, and why they differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from workflow.results import Run
from workflow.results_checks import trimmed_mean

__all__ = ["Published", "published"]


class Published(NamedTuple):
    """A configuration of the original, with means over ``runs``.

    Attributes:
        incomplete: of ``runs``, those that lack ranks.
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
    cpu_s: float | None
    bits_per_s_sum_of_ranks: float | None
    bits_per_s_wall_clock: float | None
    bits_per_s_end_to_end: float | None


def published(runs: Iterable[Run]) -> list[Published]:
    """Return the original's scaling runs by partition and size of the data; empty without any."""
    groups: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        if run.partition_mb is not None and run.data_gb is not None and _scaling(run):
            groups.setdefault((run.partition_mb, run.data_gb), []).append(run)
    return [_figures(*key, groups[key]) for key in sorted(groups)]


def _scaling(run: Run) -> bool:
    """Neither of the runs that vary the batch size, nor further files of a run's folder."""
    last = run.name.rpartition("/")[2]
    return run.source == "original" and "/Batches/" not in run.name and "_" not in last


def _figures(partition_mb: float, data_gb: float, runs: Sequence[Run]) -> Published:
    return Published(
        partition_mb,
        data_gb,
        runs[0].data,
        len(runs),
        sum(run.status != "ok" for run in runs),
        _mean(trimmed_mean([r.cpu_s for r in run.ranks if r.cpu_s is not None]) for run in runs),
        _mean(_summed(run) for run in runs),
        _mean(_rate(run, run.inference_s) for run in runs),
        _mean(_rate(run, run.total_s) for run in runs),
    )


def _summed(run: Run) -> float | None:
    rates = [rank.bits_per_s for rank in run.ranks if rank.bits_per_s is not None]
    return math.fsum(rates) if rates and len(rates) == len(run.ranks) else None


def _rate(run: Run, seconds: float | None) -> float | None:
    if run.status != "ok" or run.bits is None or not seconds:
        return None
    return run.bits / seconds


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    numbers = [value for value in known if value is not None]
    return statistics.fmean(numbers) if numbers and len(numbers) == len(known) else None
