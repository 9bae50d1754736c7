"""How long a run would take at so many ranks of so much memory, what that costs, and what is best.

A model, of measured speeds: docs/cost.md says what is in it and what is not. Memory is in Lambda's
MB of 2^20 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from lambda_worker.threads import LAMBDA_MB_PER_CORE
from workflow import cost

if TYPE_CHECKING:
    from workflow.results import Rank, Run

__all__ = [
    "ENGINES",
    "Frontier",
    "NotMeasured",
    "Point",
    "Speed",
    "Unfit",
    "estimate",
    "frontier",
    "given",
    "measured",
    "world_sizes",
]

LIMIT_S = 900.0  # that AWS lets an invocation take
LEAST_MB = 512  # what deploy/template.yaml allows; a rank had 301 to 321 MB of its own
MEMORY = (512, 768, 1024, 1280, 1536, 1769, 2048, 2560, 3072, 3538, 4096, 5307, 7076, 8845, 10_240)
WORLD = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # times the powers of ten


class Unfit(ValueError):
    """No function can do it so; the text says why, and what to change."""


class NotMeasured(ValueError):
    """Results that tell no speed; the text says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a rank does in its time, and what that is known from.

    Attributes:
        rows_per_s: predicted by one thread with a core (vCPU) to itself.
        second_thread: how many times that on two threads with a core each: 1 to 2.
        start_s: from the start of the process until it can predict: imports, loading the model. By
            one core.
        wait_s: joining, and waiting in collectives.
        step_s: init and summarize, their start included. By one core.
        peak_mb: the least memory that holds a rank.
        notes: one sentence each, for people: what was measured, and where.
    """

    rows_per_s: float
    second_thread: float
    start_s: float
    wait_s: float = 0.0
    step_s: tuple[float, float] = (0.4, 0.4)
    peak_mb: int = LEAST_MB
    notes: tuple[str, ...] = ()

    def speedup(self, cores: float) -> float:
        """How many times one core's work ``cores`` do, by Amdahl's law through `second_thread`."""
        if cores <= 1:
            return cores
        parallel = 2 * (1 - 1 / min(max(self.second_thread, 1.0), 2.0))
        return 1 / (1 - parallel + parallel / cores)


class Point(NamedTuple):
    """One choice, and what comes of it.

    Attributes:
        seconds: wall-clock time of the whole run, without what AWS needs to start things.
        rank_s: what is billed of each rank.
    """

    world_size: int
    memory_mb: int
    cores: float
    seconds: float
    rank_s: float
    cost: cost.Cost

    @property
    def usd(self) -> float:
        """Of the whole run."""
        return self.cost.total_usd


class Frontier(NamedTuple):
    """Choices that no other beats in both time and cost, the cheapest first, the fastest last.

    Attributes:
        knee: that with the least product of time and cost: up to it a per cent of time costs less
            than a per cent of money, beyond it more.
    """

    points: tuple[Point, ...]
    knee: Point

    @property
    def cheapest(self) -> Point:
        """The first."""
        return self.points[0]

    @property
    def fastest(self) -> Point:
        """The last."""
        return self.points[-1]


def _documented(engine: str, one: float, two: float, start_s: float) -> Speed:
    note = (
        f"speed: {one:,.0f} rows/s on one core, {two:,.0f} on two, {engine}, fp32, a model of the "
        "published size, measured on an AMD EPYC (docs/performance.md) and not on Lambda; measure "
        "your own, and give it by --from or --rows-per-second"
    )
    return Speed(rows_per_s=one, second_thread=two / one, start_s=start_s, notes=(note,))


# Medians of docs/performance.md, which a test compares: images/s at batches of 128 of one process
# with one thread and with two, and the cold start.
ENGINES = {
    "torch": _documented("torch", 335, 552, 1.98),
    "onnx": _documented("onnx", 369, 643, 0.62),
    "openvino": _documented("openvino", 364, 519, 1.22),
}


def given(engine: Speed, rows_per_s: float) -> Speed:
    """An engine's speed with another rate of one core, which somebody has measured."""
    notes = (
        f"speed: {rows_per_s:,.6g} rows/s on one core, as given",
        "start of a rank, further cores: as in docs/performance.md for the engine, not on Lambda",
    )
    return replace(engine, rows_per_s=rows_per_s, notes=notes)


def estimate(
    rows: int,
    world_size: int,
    memory_mb: int,
    speed: Speed,
    prices: cost.Prices,
    architecture: cost.Architecture = "x86",
) -> Point:
    """Say what a run of ``rows`` takes and costs.

    Raises:
        Unfit: a function cannot have so much memory, a rank needs more, or longer than 900 s.
    """
    if rows < 1 or world_size < 1:
        raise Unfit("a run has at least one row and one rank")
    if not cost.LEAST_MB <= memory_mb <= cost.MOST_MB:
        raise Unfit(f"{memory_mb:,} MB: a function has {cost.LEAST_MB} to {cost.MOST_MB:,}")
    if memory_mb < speed.peak_mb:
        raise Unfit(f"{memory_mb:,} MB are too few: a rank needs {speed.peak_mb:,} (--memory)")
    cores = memory_mb / LAMBDA_MB_PER_CORE
    whole = min(cores, 1.0)
    work = math.ceil(rows / world_size) / (speed.rows_per_s * speed.speedup(cores))
    rank_s = speed.start_s / whole + speed.wait_s + work
    if rank_s > LIMIT_S:
        ranks = f"{world_size:,} rank{'s' if world_size > 1 else ''} of {memory_mb:,} MB"
        more = ", or more memory (--memory)" if memory_mb < cost.MOST_MB else ""
        raise Unfit(
            f"{ranks} would take {rank_s:,.0f} s each, and Lambda ends them after {LIMIT_S:.0f} s: "
            f"take more ranks (--world-size, --max-world-size){more}"
        )
    steps = [seconds / whole for seconds in speed.step_s]
    usage = cost.Usage(
        rank_s=[rank_s] * world_size,
        step_s=steps,
        memory_mb=memory_mb,
        run_s=sum(steps) + rank_s,
        architecture=architecture,
    )
    costs = cost.of_usage(cost.as_job(usage, rows), prices)
    return Point(world_size, memory_mb, cores, sum(steps) + rank_s, rank_s, costs)


def frontier(
    rows: int,
    speed: Speed,
    prices: cost.Prices,
    architecture: cost.Architecture = "x86",
    *,
    world_sizes: Iterable[int],
    memory: Iterable[int] | None = None,
) -> Frontier:
    """Try all pairs, and keep those that no other beats in both time and cost.

    Of those within a per cent of one another in time only the cheapest is kept.

    Args:
        memory: sizes to try; None: from the least that holds a rank to the most there is.

    Raises:
        Unfit: no pair can do it; the text is that of the last one tried.
    """
    points: list[Point] = []
    refused: Unfit | None = None
    sizes = {max(mb, speed.peak_mb) for mb in MEMORY} if memory is None else set(memory)
    for world_size in sorted(set(world_sizes)):
        for mb in sorted(sizes):
            try:
                points.append(estimate(rows, world_size, mb, speed, prices, architecture))
            except Unfit as error:
                refused = error
    if not points:
        raise refused or Unfit("nothing to choose from")
    best = _undominated(points)
    return Frontier(best, min(best, key=lambda point: point.seconds * point.usd))


def _undominated(points: Sequence[Point]) -> tuple[Point, ...]:
    """In the order of cost; of equals in cost the fastest only."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.usd, point.seconds)):
        if not best or point.seconds < 0.99 * best[-1].seconds:
            best.append(point)
    return tuple(best)


def world_sizes(most: int, rows: int) -> list[int]:
    """Return 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, … up to ``most``, but not more than rows."""
    most = min(most, rows)
    steps = {math.floor(10**power * step) for power in range(6) for step in WORLD}
    return sorted({size for size in steps if size <= most} | {most})


def measured(runs: Iterable[Run]) -> Speed:
    """Take the speed from runs of ours that ended well.

    Of several engines, precisions and batch sizes, those of the fastest count.

    Raises:
        NotMeasured: there is none that tells how long its rows took.
    """
    every = list(runs)
    groups: dict[tuple[str | None, str | None, int | None], list[Run]] = {}
    for run in every:
        if run.status == "ok" and run.source in ("cosmic run", "cosmic infer") and _rates(run):
            groups.setdefault((run.engine, run.precision, run.batch_size), []).append(run)
    if not groups:
        raise NotMeasured(_why_not(every))
    speeds = [_speed(group) for group in groups.values()]
    return max(speeds, key=lambda speed: speed.rows_per_s)


def _why_not(runs: Sequence[Run]) -> str:
    if not runs:
        return "no runs in there"
    if all(run.status != "ok" for run in runs):
        return f"none of its {len(runs):,} runs ended well, so there is no speed to take from it"
    if all(run.source.startswith("original") for run in runs):
        return "the original's records have CPU time by a profiler, and no elapsed time of a rank"
    return "none of its runs tells both its ranks' rows and their seconds"


def _speed(group: Sequence[Run]) -> Speed:
    default = ENGINES.get(group[0].engine or "torch", ENGINES["torch"])
    ranks = [rank for run in group for rank in run.ranks]
    rates = [rate for run in group for rate in _rates(run)]
    peaks = [rank.peak_memory_mb for rank in ranks if cost.sound(rank.peak_memory_mb)]
    # Of new processes only: Lambda's first run has no others, and warm ones would flatter it.
    cold = [rank.init_s + (rank.load_s or 0.0) for rank in ranks if rank.init_s]
    wait = [(rank.join_s or 0.0) + (rank.collective_s or 0.0) for rank in ranks]
    cold, wait = ([value for value in values if cost.sound(value)] for values in (cold, wait))
    steps = [
        _step(group, name, usual) for name, usual in zip(cost.STEPS, default.step_s, strict=True)
    ]
    return Speed(
        rows_per_s=median(rates),
        second_thread=default.second_thread,
        start_s=median(cold) if cold else default.start_s,
        wait_s=median(wait) if wait else 0.0,
        step_s=(steps[0], steps[1]),
        peak_mb=max(math.ceil(max(peaks) * 1e6 / 2**20), cost.LEAST_MB) if peaks else LEAST_MB,
        notes=_notes(group, rates, bool(cold)),
    )


def _step(group: Iterable[Run], name: str, usual: float) -> float:
    """Seconds of a launcher's step; on AWS its spans are Step Functions', so not the function's."""
    local = [run.spans for run in group if run.on != "aws"]
    told = [span.seconds for spans in local for span in spans if span[:2] == (None, name)]
    told = [seconds for seconds in told if cost.sound(seconds)]
    return median(told) if told else usual


def _notes(group: Sequence[Run], rates: Sequence[float], cold: bool) -> tuple[str, ...]:
    first = group[0]
    batch = "batch size unknown" if first.batch_size is None else f"batches of {first.batch_size}"
    what = ", ".join(filter(None, (first.engine, first.precision, batch)))
    crowded = any(map(cost.crowded, group))
    time = "CPU time, as ranks shared cores" if crowded else "elapsed time of its inference"
    by = f"{len(rates):,} rank{'s' if len(rates) > 1 else ''} of {len(group):,} "
    notes = [
        f"speed: {median(rates):,.0f} rows/s on one core: median of {by}run"
        f"{'s' if len(group) > 1 else ''} ({what}), by {time}; on further cores as "
        "docs/performance.md has it for this engine, measured on two"
    ]
    if not cold:
        notes.append("start of a rank: as in docs/performance.md, for no rank tells its own")
    return tuple(notes)


def _rates(run: Run) -> list[float]:
    """Rows per second that one core did, of each rank that tells."""
    cores = _cores(run)
    if cores is None:
        return []
    most = ENGINES.get(run.engine or "torch", ENGINES["torch"]).speedup(cores)
    shared = cost.crowded(run)
    told = [(rank.rows, _core_seconds(rank, most, shared)) for rank in run.ranks]
    return [rows / took for rows, took in told if rows and rows > 0 and cost.sound(took) and took]


def _core_seconds(rank: Rank, most: float, shared: bool) -> float | None:
    """How long one core would have taken for a rank's rows, as far as that is known."""
    if shared:
        return rank.cpu_s
    if rank.inference_s is None:
        return None
    # Threads that had nothing to do are no speed-up; CPU time tells.
    busy = rank.cpu_s / rank.inference_s if rank.cpu_s and rank.inference_s else most
    return rank.inference_s * min(most, max(busy, 1.0) if most > 1 else most)


def _cores(run: Run) -> float | None:
    """That each rank had for itself, if all was well; None: unknown."""
    if run.on != "aws":
        return float(cost.threads(run))
    limits = [rank.memory_limit_mb for rank in run.ranks if rank.memory_limit_mb]
    return max(limits) * 1e6 / 2**20 / LAMBDA_MB_PER_CORE if limits else None
