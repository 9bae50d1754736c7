"""What is missing or suspicious in a run's records: each finding says only what follows from them.

Nothing is dropped: a finding tells what the numbers mean, and the numbers stay as they are.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from workflow.results import Finding, Rank, Run
from workflow.results_files import plain
from workflow.results_original import Label

__all__ = ["fences", "original", "ours", "outliers", "trimmed_mean"]

PAGE = 1000
"""Objects in a page of S3's list: the original's summarizer reads one page."""

_FENCE = 1.5  # interquartile ranges, as the original has it
_FEWEST = 4  # values that have quartiles worth the name
_NAMED = 3


def fences(values: Sequence[float]) -> tuple[float, float] | None:
    """Return what lies within is no outlier: 1.5 interquartile ranges beyond the quartiles."""
    if len(values) < _FEWEST:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")  # as numpy's percentile
    margin = _FENCE * (high - low)
    return low - margin, high + margin


def trimmed_mean(values: Sequence[float]) -> float | None:
    """Return the mean without outliers, as the original publishes it for CPU time."""
    if not values:
        return None
    low, high = fences(values) or (-math.inf, math.inf)
    return statistics.fmean([value for value in values if low <= value <= high])


def original(run: Run, place: Label | None, planned: int | None) -> tuple[Run, list[Finding]]:
    """Judge a run of the original: its status and world size, and what to know about it.

    Args:
        run: as it was read, with as many ranks as there are records.
        place: what its path says.
        planned: its world size, where a log tells it.
    """
    found = [*_bits(run), *_batches(run, place)]
    lost = None if planned else _gap(run)
    if planned and planned > len(run.ranks):
        text = f"{len(run.ranks)} records of {planned} ranks, as the log says: sums lack the rest."
        found.append(Finding(run.place, "ranks missing", text))
        run = replace(run, world_size=planned, status="incomplete")
    elif len(run.ranks) == PAGE and (place is None or (place.partitions or PAGE + 1) > PAGE):
        found.append(Finding(run.place, "cut at 1,000", _cut(place)))
        run = replace(run, world_size=None, status="incomplete")
    elif lost:
        whole = place.partitions if place else None
        known = whole if whole and whole > len(run.ranks) else None
        found.append(Finding(run.place, "ranks missing", _lost(run, lost, known)))
        run = replace(run, world_size=known, status="incomplete")
    elif less := _less(run, place):
        found.append(Finding(run.place, "less data than named", less))
    return run, [*found, *_repeated(run), *outliers(run, "cpu_s", "CPU time")]


def _bits(run: Run) -> list[Finding]:
    """Rate times time are bits, and these are whole rows: else a number was changed or cut."""
    known = [rank for rank in run.ranks if rank.bits is not None]
    broken = [rank for rank in known if rank.rows is None]
    found = []
    if len(known) < len(run.ranks):
        text = f"{len(run.ranks) - len(known)} of {len(run.ranks)} records have no bits: no sums."
        found.append(Finding(run.place, "records incomplete", text))
    if broken:
        text = (
            f"In {len(broken)} of {len(known)} records rate x time is no whole number of rows of "
            "164,160 bits: rows are not known, and rates may be of other data."
        )
        found.append(Finding(run.place, "bits are not whole rows", text))
    other = [r for r in known if r.rows and r.rows_per_s and r.cpu_s and not _agree(r)]
    if other:
        text = (
            f"In {len(other)} of {len(known)} records sample_persec x time tells other rows than "
            "the bits do; rows here are from the bits."
        )
        found.append(Finding(run.place, "conflict", text))
    return found


def _agree(rank: Rank) -> bool:
    samples = (rank.rows_per_s or 0.0) * (rank.cpu_s or 0.0)
    return math.isclose(samples, rank.rows or 0, rel_tol=1e-6)


def _batches(run: Run, place: Label | None) -> list[Finding]:
    if run.batch_size is None:
        text = "The records have no batch size, or different ones."
        return [Finding(run.place, "batch size unknown", text)]
    if place is None or not place.batch_size or place.batch_size == run.batch_size:
        return []
    text = f"The path says batch size {place.batch_size}, the records {run.batch_size}, as here."
    return [Finding(run.place, "conflict", text)]


def _cut(place: Label | None) -> str:
    plan = place.partitions if place else None
    more = f"{place.size} would be about {plan:,} partitions; " if place and plan else ""
    return (
        f"Exactly 1,000 records, which is all that the original's summarizer reads: {more}"
        "sums are of these 1,000, the times of the whole run."
    )


def _numbers(run: Run) -> list[int] | None:
    """The partitions' numbers, one per rank and each once; None if they have none."""
    names = [rank.data[0] for rank in run.ranks if len(rank.data) == 1]
    found = [re.fullmatch(r"(?:[^/]+/)*(\d{1,7})\.pt", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    if not numbers or len(numbers) < len(run.ranks) or len(set(numbers)) < len(numbers):
        return None
    return numbers


def _gap(run: Run) -> int:
    """How many partitions lack between those that are there: 0 if these may be all.

    The original takes the first N partitions in the order of S3's list, which is that of texts; its
    first version took 1 to N, which has no gap in that order either.
    """
    numbers = _numbers(run)
    if numbers is None:
        return 0
    last, count = max(numbers), len(numbers)
    if last > 100 * count + 100:  # numbers of another kind
        return 0
    end = max(map(str, numbers))
    return sum(str(number) <= end for number in range(1, last + 1)) - count


def _lost(run: Run, lost: int, planned: int | None) -> str:
    count = len(run.ranks)
    if planned:
        return (
            f"{count} of {planned} partitions have a record ({planned} by the path's size; there "
            f"are gaps between those that are here). Sums are of the {count}."
        )
    return f"{count} records, and {lost} partitions between them lack. Sums are of the {count}."


def _less(run: Run, place: Label | None) -> str | None:
    plan = place.partitions if place else None
    if place is None or not plan or plan <= len(run.ranks) or run.bits is None:
        return None
    held = run.bits / 8 / 2**30
    return (
        f"{len(run.ranks)} records hold {held:.2f} of the {place.data_gb:g} GB (2^30 bytes) that "
        f"the path says; by the original's own rule it would be {plan:,} partitions. Rates are of "
        "what was read."
    )


def _repeated(run: Run) -> list[Finding]:
    names = Counter(rank.data for rank in run.ranks if rank.data)
    if not names or max(names.values()) == 1:
        return []
    least, most = min(names.values()), max(names.values())
    each = f"{least}" if least == most else f"{least} to {most}"
    again = sum(n for n in names.values() if n > 1)
    if least > 1:
        text = (
            f"{len(run.ranks):,} records name {len(names):,} partitions, each {each} times, as if "
            "a small dataset stood for a large one: rows are counted as often as they were read."
        )
        return [Finding(run.place, "partitions used again", text)]
    text = (
        f"{again} of {len(run.ranks):,} records name a partition that another one names as well: "
        "its rows are counted more than once."
    )
    return [Finding(run.place, "duplicate partitions", text)]


def outliers(run: Run, name: str, what: str) -> list[Finding]:
    """Name the ranks whose time lies beyond the fences; they stay in every number here."""
    timed = [(value, rank) for rank in run.ranks if (value := getattr(rank, name)) is not None]
    limits = fences([value for value, _ in timed])
    if limits is None:
        return []
    beyond = [(value, rank) for value, rank in timed if not limits[0] <= value <= limits[1]]
    if not beyond:
        return []
    beyond.sort(key=lambda pair: -abs(pair[0] - sum(limits) / 2))
    named = ", ".join(f"{_who(rank)} {value:.2f} s" for value, rank in beyond[:_NAMED])
    more = ", …" if len(beyond) > _NAMED else ""
    dropped = "; the original's means leave them out" if run.source == "original" else ""
    text = (
        f"Beyond {max(limits[0], 0):.2f} to {limits[1]:.2f} s of {what} (1.5 interquartile ranges) "
        f"lie {len(beyond)} of {len(timed)} ranks: {named}{more}. They count here{dropped}."
    )
    return [Finding(run.place, "outliers", text)]


def _who(rank: Rank) -> str:
    if rank.rank is not None:
        return f"rank {rank.rank}"
    return plain(rank.data[0], 60) if rank.data else "one with"


def ours(run: Run, excluded: int) -> tuple[Run, list[Finding]]:
    """Judge a run of `cosmic run` by its records; ``excluded`` rows are in no metric."""
    found = []
    numbers = Counter(rank.rank for rank in run.ranks)
    twice = sorted(n for n, count in numbers.items() if n is not None and count > 1)
    if twice:
        text = f"Rank {_some(twice)} has more than one record: its rows are counted more than once."
        found.append(Finding(run.place, "duplicate ranks", text))
    missing = _missing(run.world_size, numbers)
    if missing and run.status != "failed":
        text = f"No record of rank {_some(missing)} (of {run.world_size}): sums are of the others."
        found.append(Finding(run.place, "ranks missing", text))
        run = replace(run, status="incomplete")
    if excluded:
        text = (
            f"{excluded:,} of {run.rows or 0:,} rows are in no metric: they are not finite numbers."
        )
        found.append(Finding(run.place, "rows excluded", text))
    return run, [*found, *outliers(run, "inference_s", "inference")]


def _missing(world_size: int | None, numbers: Mapping[int | None, int]) -> list[int]:
    if not world_size or len(numbers) >= world_size:
        return []
    return [rank for rank in range(min(world_size, 100_000)) if rank not in numbers]


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:10])) + (", …" if len(ranks) > 10 else "")
