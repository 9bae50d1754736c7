"""What a run costs on AWS, item by item, and what stands there whether anything runs or not.

Pure functions of seconds, megabytes and counts. List prices, no free tiers; docs/cost.md explains
the model. AWS's MB and GB are 2^20 and 2^30 bytes, and so are those of memory here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeGuard

from lambda_worker.threads import LAMBDA_MB_PER_CORE
from workflow.prices import Price, Prices, PricesError, load_prices

if TYPE_CHECKING:
    from workflow.results import Rank, Run

__all__ = [
    "Architecture",
    "Cost",
    "Prices",
    "PricesError",
    "Usage",
    "as_job",
    "crowded",
    "gb_seconds",
    "load_prices",
    "of_hour",
    "of_run",
    "of_usage",
    "priced",
    "sound",
    "threads",
]

Architecture = Literal["x86", "arm"]
Exposure = Literal["LoadBalancer", "PublicAddress"]

LEAST_MB, MOST_MB = 128, 10_240  # what a function can be configured with
FREE_STORAGE_MB = 512
MB = 2**20 / 1e6  # Lambda's, in those of records
HOURS_PER_MONTH = 730
# As in deploy/template.yaml, which a test compares.
SERVER_VCPU, SERVER_GB, ZONES, SECRETS = 0.25, 0.5, 2, 2
# Of Step Functions, as in workflow/state_machine.asl.json, which a test walks through: states that
# a run enters; and of each rank its state, and its start as a child of the distributed Map.
RUN_TRANSITIONS, RANK_TRANSITIONS = 5, 2
STEPS = ("init", "summarize")
# Names and dimensions of CloudWatch's metrics: six of a rank, one each of init and summarize.
METRICS = 8
# Requests to S3, which a test counts: a rank reads its model (64 MB in parts) and opens a file of
# its own, which init has looked at; then comes one request for each 8 MiB of its rows.
RUN_READS, RUN_WRITES, RANK_READS, RANK_WRITES = 4, 9, 18, 1
READ_BYTES, ROW_BYTES = 8 * 2**20, 20_520
LOG_BYTES = 3_000  # of each invocation, with some 350 of Lambda's own lines; a test measures it
# Connections that one NLCU covers: new ones each second, and open ones.
NEW_PER_UNIT, OPEN_PER_UNIT = 800, 100_000


@dataclass(frozen=True)
class Cost:
    """What something costs.

    Attributes:
        items: dollars by name, those that are known to be zero too.
        assumptions: one sentence each, for people: what was not measured, what is left out.
    """

    items: Mapping[str, float]
    assumptions: tuple[str, ...] = ()

    @property
    def total_usd(self) -> float:
        """The sum of all items."""
        return math.fsum(self.items.values())


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one run takes of AWS.

    Attributes:
        rank_s: what is billed of each rank: seconds from the start of its instance to its end.
        step_s: the same of init and summarize, together.
        memory_mb: configured size of all functions, in Lambda's MB.
        run_s: wall-clock time of the whole run, which the server stands by for; None: no server.
        storage_mb: configured size of /tmp, in Lambda's MB.
        invocations: calls of functions.
        transitions: of Step Functions.
        reads, writes: requests to S3, GET and HEAD, and PUT and LIST.
        log_bytes: what goes into CloudWatch's logs.
        metrics: names and dimensions of CloudWatch's that are sent, for one hour.
        secret_reads: calls of Secrets Manager.
        load_balancer_units: NLCU-hours of the load balancer.
    """

    rank_s: Sequence[float]
    step_s: Sequence[float] = ()
    memory_mb: int
    run_s: float | None = None
    architecture: Architecture = "x86"
    storage_mb: int = FREE_STORAGE_MB
    invocations: int = 0
    transitions: int = 0
    reads: int = 0
    writes: int = 0
    log_bytes: float = 0
    metrics: int = 0
    secret_reads: int = 0
    load_balancer_units: float = 0


def of_usage(usage: Usage, prices: Prices, assumptions: tuple[str, ...] = ()) -> Cost:
    """Put prices to what a run takes; its items add up to what the run costs."""
    memory = prices.lambda_arm if usage.architecture == "arm" else prices.lambda_x86
    seconds = sum(map(_billed, usage.rank_s)) + sum(map(_billed, usage.step_s))
    above = max(0, usage.storage_mb - FREE_STORAGE_MB)
    items = {
        "Lambda, ranks": gb_seconds(usage.rank_s, usage.memory_mb) * memory.each,
        "Lambda, init and summarize": gb_seconds(usage.step_s, usage.memory_mb) * memory.each,
        "Lambda, requests": usage.invocations * prices.lambda_requests.each,
        "Lambda, /tmp above 512 MB": seconds * above / 1024 * prices.lambda_storage.each,
        "Step Functions": usage.transitions * prices.step_functions.each,
        "S3, requests": usage.reads * prices.s3_reads.each + usage.writes * prices.s3_writes.each,
        "CloudWatch, logs": usage.log_bytes / 2**30 * prices.logs.each,
        "CloudWatch, metrics": usage.metrics * prices.metrics.each / HOURS_PER_MONTH,
        "Secrets Manager, reads": usage.secret_reads * prices.secret_reads.each,
        "load balancer, units": usage.load_balancer_units * prices.load_balancer_units.each,
    }
    if usage.run_s is not None:
        hourly = of_hour(prices, usage.architecture).total_usd
        items["server, while the run lasts"] = usage.run_s / 3600 * hourly
    return Cost(items, assumptions)


def gb_seconds(seconds: Sequence[float], memory_mb: int) -> float:
    """What Lambda bills of invocations that took ``seconds`` each: whole milliseconds, rounded up.

    Args:
        seconds: of each invocation, from the start of a new instance or the call of a warm one.
        memory_mb: configured, not used, in Lambda's MB.
    """
    return math.fsum(map(_billed, seconds)) * memory_mb / 1024


def _billed(seconds: float) -> float:
    # The tenth of a microsecond is for sums of floats, which 0.3 + 0.6 already needs.
    return math.ceil(seconds * 1000 - 1e-4) / 1000


def of_hour(
    prices: Prices,
    architecture: Architecture = "x86",
    *,
    exposure: Exposure = "LoadBalancer",
    rows: int = 0,
) -> Cost:
    """What stands there for an hour, whether anything runs or not: as deploy/template.yaml has it.

    Args:
        exposure: the template's parameter; a load balancer has an address in each of two zones.
        rows: of data that the bucket keeps.
    """
    vcpu, memory = _server(prices, architecture)
    items = {"Fargate, server": SERVER_VCPU * vcpu.each + SERVER_GB * memory.each}
    addresses = 1
    if exposure == "LoadBalancer":
        items["load balancer"] = prices.load_balancer.each
        addresses += ZONES
    items["public IPv4 addresses"] = addresses * prices.public_ipv4.each
    items["Secrets Manager, secrets"] = SECRETS * prices.secrets.each / HOURS_PER_MONTH
    items["S3, the data"] = rows * ROW_BYTES / 2**30 * prices.s3_storage.each / HOURS_PER_MONTH
    return Cost(items)


def _server(prices: Prices, architecture: Architecture) -> tuple[Price, Price]:
    if architecture == "arm":
        return prices.fargate_arm_vcpu, prices.fargate_arm_gb
    return prices.fargate_x86_vcpu, prices.fargate_x86_gb


def priced(
    runs: Iterable[Run], prices: Prices, memory_mb: int | None = None
) -> tuple[list[Run], list[str]]:
    """Add to each run what it costs, if that is known; the arguments are those of `of_run`.

    Returns:
        The runs, and what was assumed, once each.
    """
    found, assumed = [], dict[str, None]()
    for run in runs:
        cost = None
        # A file of a stranger may say infinity, of which there is no price.
        with suppress(ArithmeticError, ValueError):
            cost = of_run(run, prices, memory_mb)
        assumed |= dict.fromkeys(cost.assumptions if cost else ())
        found.append(replace(run, cost_usd=cost.total_usd if cost else None))
    return found, list(assumed)


def of_run(
    run: Run, prices: Prices, memory_mb: int | None = None, architecture: Architecture = "x86"
) -> Cost | None:
    """Say what a run cost on AWS, or would have cost at Lambda's prices if it ran elsewhere.

    Args:
        memory_mb: configured size of its functions, in Lambda's MB; None: what the records say,
            else the smallest that has the run's threads and memory, as the assumptions tell.
        architecture: whose price per GB and second.

    Returns:
        None where the seconds of its ranks or the size of its functions are not known, or no
        function has the memory that a rank took.
    """
    seconds, told = _rank_seconds(run)
    size = (memory_mb, ()) if memory_mb is not None else _size(run)
    if not seconds or size is None:
        return None
    memory, why = size
    steps = [
        s.seconds for s in run.spans if s.rank is None and s.name in STEPS and sound(s.seconds)
    ]
    total = run.total_s if _is_job(run) and sound(run.total_s) else None
    usage = Usage(
        rank_s=seconds,
        step_s=steps,
        memory_mb=memory,
        architecture=architecture,
        run_s=total,
        invocations=len(seconds),
    )
    usage = as_job(usage, max(run.rows or 0, 0)) if _is_job(run) else usage
    return of_usage(usage, prices, (*told, *why, *_missing(run, len(seconds), steps)))


def as_job(usage: Usage, rows: int) -> Usage:
    """The same, with what a run of our state machine counts up for so many ranks and rows."""
    ranks = len(usage.rank_s)
    return replace(
        usage,
        invocations=ranks + len(STEPS),
        transitions=RUN_TRANSITIONS + ranks * RANK_TRANSITIONS,
        reads=RUN_READS + ranks * (RANK_READS + math.ceil(rows / ranks * ROW_BYTES / READ_BYTES)),
        writes=RUN_WRITES + ranks * RANK_WRITES,
        log_bytes=(ranks + len(STEPS)) * LOG_BYTES,
        metrics=METRICS,
        secret_reads=ranks * SECRETS,
        load_balancer_units=_units(ranks, usage.run_s or 0.0),
    )


def _units(ranks: int, run_s: float) -> float:
    """NLCU-hours of one connection for each rank: by new or by open ones, whichever is more."""
    return max(ranks / 3600 / NEW_PER_UNIT, ranks * run_s / 3600 / OPEN_PER_UNIT)


def _is_job(run: Run) -> bool:
    """Whether it was one of our state machine's steps, and not a process, or the original's."""
    return run.source == "cosmic run"


def _rank_seconds(run: Run) -> tuple[list[float], list[str]]:
    """Seconds that would be billed of each rank, and what they are."""
    elapsed = [_elapsed(rank) for rank in run.ranks]
    if known := [seconds for seconds in elapsed if sound(seconds)]:
        return known, ["time of a rank: its elapsed time, with the start of its process if told"]
    if cpu := [rank.cpu_s for rank in run.ranks if sound(rank.cpu_s)]:
        return cpu, ["time of a rank: CPU time, since no other is known; AWS bills elapsed time"]
    return [], []


def sound(value: object) -> TypeGuard[float]:
    """Whether a number from a file, which may be anybody's, can be seconds, MB or a count."""
    return isinstance(value, int | float) and 0 <= value < math.inf


def _elapsed(rank: Rank) -> float | None:
    """From the start of the process to the record; of one process: loading and inference."""
    handler = rank.wall_s
    if handler is None and rank.inference_s is not None:
        handler = (rank.load_s or 0.0) + rank.inference_s
    return None if handler is None else handler + (rank.init_s or 0.0)


def _size(run: Run) -> tuple[int, tuple[str, ...]] | None:
    """The functions' size in Lambda's MB and how it is known; None: there is none so large."""
    if run.source == "original":
        text = "10,240 MB, as the original's log says that its functions were configured"
        return MOST_MB, (text,)
    limits = [rank.memory_limit_mb for rank in run.ranks if sound(rank.memory_limit_mb)]
    if run.on == "aws":  # where the environment is that of the machine that has started the run
        return (round(max(limits) / MB), ()) if limits else None
    peaks = [rank.peak_memory_mb for rank in run.ranks if sound(rank.peak_memory_mb)]
    least = math.ceil(max(peaks, default=0.0) / MB)
    if least > MOST_MB:
        return None
    count = threads(run)
    whole = f"{count} thread{'s' if count > 1 else ''}"
    if count * LAMBDA_MB_PER_CORE > MOST_MB:
        return MOST_MB, (f"10,240 MB, the most there is: less than a core for each of {whole}",)
    size = max(count * LAMBDA_MB_PER_CORE, least, LEAST_MB)
    known = "" if _told(run, "threads") else " (how many it had is not known)"
    text = f"{size:,} MB, the least that has {whole}{known} at 1,769 MB each and its peak memory"
    return size, (text,)


def threads(run: Run) -> int:
    """Of each rank of a run on this kind of machine; 1 if its environment does not tell."""
    most = _told(run, "threads") or 1
    if run.source != "cosmic run":
        return most
    return min(most, max(1, (_told(run, "cores_usable") or 1) // (run.world_size or 1)))


def _told(run: Run, name: str) -> int | None:
    """A whole number above zero of the run's environment, which may come from anybody's file."""
    value = run.environment.get(name)
    return int(value) if sound(value) and value >= 1 else None


def crowded(run: Run) -> bool:
    """Whether its ranks had to share this machine's cores, and took longer than by themselves."""
    usable = _told(run, "cores_usable")
    return run.on != "aws" and usable is not None and len(run.ranks) * threads(run) > usable


def _missing(run: Run, ranks: int, steps: Sequence[float]) -> list[str]:
    """What the costs leave out, for want of knowledge; they are those of so many ranks."""
    lost = (run.world_size or 0) - ranks
    texts = (
        [f"{lost} of {run.world_size} ranks left no record, and are not in it"] if lost > 0 else []
    )
    if run.world_size is None and run.status == "incomplete":
        texts.append("ranks left no record, nobody knows how many, and are not in it")
    if crowded(run):
        texts.append("its ranks shared cores: with one each they would take less, and cost less")
    if not _is_job(run):
        return [*texts, "Lambda only: no state machine, no server, no storage"]
    if not steps:
        texts.append("init and summarize are not in it: their time is not known")
    if not sound(run.total_s):
        texts.append("the server is not in it: the time of the whole run is not known")
    return texts
