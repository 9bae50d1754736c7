"""What has been measured: runs of ours and of the original project, in one form.

Names end in their unit: _s seconds, _mb megabytes (10^6 bytes), _gb gigabytes (10^9), _usd dollars;
but partition_mb and data_gb are as the original's paths say, which means 2^20 and 2^30 bytes.
A value that a file does not tell is None: nothing is guessed, nothing stands for something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from workflow.plan import Span

__all__ = ["METRICS", "Finding", "Rank", "Read", "Results", "ResultsError", "Run", "Tabled", "read"]

Source = Literal["cosmic run", "cosmic infer", "original", "original, one process"]
Status = Literal["ok", "failed", "incomplete"]
METRICS = ("mae", "mse", "bias", "nmad", "r2")


class Finding(NamedTuple):
    """What is missing or suspicious in a file."""

    place: str
    kind: str  # a word or two: "ranks missing", "duplicates", "outliers", "cut at 1,000"
    text: str  # one line that says what it means for the numbers


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank's record.

    ``cpu_s`` is CPU time: the original's ``total_cpu_time``, by torch's profiler. Rates are as
    recorded: ours per elapsed time, the original's per CPU time.
    """

    rank: int | None = None
    rows: int | None = None
    batches: int | None = None
    bits: float | None = None
    init_s: float | None = None
    join_s: float | None = None
    load_s: float | None = None
    inference_s: float | None = None
    collective_s: float | None = None
    read_s: float | None = None
    wall_s: float | None = None
    cpu_s: float | None = None
    rows_per_s: float | None = None
    bits_per_s: float | None = None
    peak_memory_mb: float | None = None
    memory_limit_mb: float | None = None
    data: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one configuration, finished or not.

    Attributes:
        place: file or folder it was read from.
        name: the run's; for the original's, its result path.
        on: "local" or "aws".
        data: what was predicted, short: "small", "25MB partitions, 12.6GB", "mine.pt".
        world_size: ranks planned; `ranks` are those that left a record. The original's files do
            not tell the plan: it is as many as records, unless a log or a gap shows that some lack.
        repeat: 1 for the first run of a configuration.
        total_s: wall-clock time of the whole run, as its launcher saw it; for the original's, of
            the state machine's execution.
        inference_s: wall-clock time of the inference of all ranks together: the slowest rank's
            loop; for the original's, the Map state's duration, if its log tells that.
        metrics: those of `METRICS` that are known.
        predictions: URL of predictions.npz, or None.
        environment: as `workflow.environment.describe` returns it, or empty.
        cost_usd: what it costs on AWS, which no file tells: `cost.priced` adds it.
    """

    place: str
    source: Source
    name: str
    on: str = "local"
    data: str
    partition_mb: float | None = None
    data_gb: float | None = None
    world_size: int | None = None
    batch_size: int | None = None
    repeat: int = 1
    engine: str | None = None
    precision: str | None = None
    status: Status = "ok"
    error: str | None = None
    ranks: tuple[Rank, ...] = ()
    rows: int | None = None
    bits: float | None = None
    total_s: float | None = None
    inference_s: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    predictions: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    cost_usd: float | None = None


class Read(NamedTuple):
    """Runs of a file or a folder, and what is to be known about them."""

    runs: list[Run]
    findings: list[Finding]


class Tabled(NamedTuple):
    """A run of the original that only its tables tell of: its records are not here.

    Attributes:
        place: the table.
        cpu_s: mean CPU time of the ranks, by the profiler, without outliers.
        bits_per_s_sum_of_ranks: bits over that time, added up over the ranks.
        total_s, inference_s: as in `Run`.
    """

    place: str
    partition_mb: float
    data_gb: float
    repeat: int
    cpu_s: float | None
    bits: float | None
    bits_per_s_sum_of_ranks: float | None
    total_s: float | None
    inference_s: float | None


@dataclass(frozen=True)
class Results:
    """All that was read, and what is to be known about it."""

    runs: tuple[Run, ...]
    findings: tuple[Finding, ...]
    tabled: tuple[Tabled, ...] = ()


class ResultsError(ValueError):
    """A path cannot be read at all; the text says what to do."""


def read(paths: Sequence[str]) -> Results:
    """Read files and folders of results: ours, and the original project's (docs/results.md).

    What a file holds raises nothing: if it is damaged, too large or of no known form, a finding
    says so. What is given twice is read once.

    Args:
        paths: of this machine. A folder is read with all that is below it.

    Raises:
        ResultsError: a path does not exist, or is not of this machine.
    """
    from workflow.results_read import gather

    return gather(paths)
