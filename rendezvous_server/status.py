"""What an operator may know of a server: one snapshot, bounded however much there is. No I/O.

Times are Unix seconds by the server's clock, and `now` is in the snapshot, so that ages are right
whatever the reader's clock says. A snapshot is made of plain values: it is what /status answers.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fmi_client.protocol.addresses import Address, format_address
from fmi_client.protocol.notice import SERVER, Notice
from rendezvous_server.jobs import Job
from rendezvous_server.registry import Registry

Snapshot = dict[str, Any]

JOBS_SHOWN = 50
ENDED_SHOWN = 30
RANGES_SHOWN = 20
RANKS_SHOWN = 500
"""Of a job that was asked for by its name."""
PAIRS_SHOWN = 100
TEXT_SHOWN = 300
"""Characters of what ranks said; the rest is in the server's log."""

REFUSALS_KEPT = 200
LATELY_SECONDS = 600.0


def _counter(text: str) -> Any:
    return field(default=0, metadata={"text": text})


@dataclass(slots=True)
class Counters:
    """What happened since the start. The names and texts are those of /metrics."""

    connections: int = _counter("Connections accepted")
    joins: int = _counter("Ranks that joined")
    refusals: int = _counter("Connections refused")
    handshake_timeouts: int = _counter("Connections that proved nothing in time")
    crowded_out: int = _counter("Connections cut before their time for want of room")
    lost_ranks: int = _counter("Ranks whose connection ended without goodbye")
    jobs_started: int = _counter("Jobs whose ranks were all present")
    relay_limits: int = _counter("Jobs ended, and legs refused, by a limit")


@dataclass(frozen=True, slots=True)
class Query:
    """Which jobs are asked for: those whose name holds `text`, or is it (`exact`)."""

    text: str = ""
    exact: bool = False

    def takes(self, job: Job) -> bool:
        return job.name == self.text if self.exact else self.text in job.name


@dataclass(frozen=True, slots=True)
class Refusal:
    """A connection that was turned away."""

    at: float
    address: str
    kind: str
    why: str


class Refusals:
    """The latest connections that were turned away; a flood of them takes no more memory."""

    def __init__(self) -> None:
        self._kept: deque[Refusal] = deque(maxlen=REFUSALS_KEPT)

    def add(self, at: float, address: Address, kind: str, why: str) -> None:
        self._kept.append(Refusal(at, format_address(address), kind, why[:TEXT_SHOWN]))

    def lately(self, now: float) -> list[Snapshot]:
        """By kind, the most frequent first; of each the latest one."""
        recent = [each for each in self._kept if now - each.at <= LATELY_SECONDS]
        latest = {each.kind: each for each in recent}
        counts = Counter(each.kind for each in recent)
        return [
            {"kind": kind, "count": count, "at": _time(latest[kind].at)}
            | {"address": latest[kind].address, "why": latest[kind].why}
            for kind, count in counts.most_common()
        ]

    def overflows(self, now: float) -> bool:
        """Whether there were more lately than are kept."""
        kept = self._kept
        return len(kept) == REFUSALS_KEPT and now - kept[0].at <= LATELY_SECONDS


def take(
    registry: Registry,
    facts: Mapping[str, Any],
    refusals: Refusals,
    now: float,
    query: Query = Query(),
    pairs: Iterable[Snapshot] = (),
) -> Snapshot:
    """Make a snapshot.

    Args:
        facts: what the caller knows of the server: version, totals, limits.
        pairs: what is on the relay now, for a job that is asked for by its name.

    Returns:
        format, now, server, counts, matching, jobs (those in trouble for longest first), ended
        (the latest first) and refusals; see docs/live.md.
    """
    found = [job for job in registry.jobs if query.takes(job)]
    shown = heapq.nsmallest(JOBS_SHOWN, found, key=_urgency)
    jobs = [_job(job) for job in shown]
    if query.exact:
        for entry, job in zip(jobs, shown, strict=True):
            entry |= _details(job, pairs)
    return {
        "format": 1,
        "now": _time(now),
        "server": dict(facts) | {"draining": registry.draining},
        "counts": _counts(registry),
        "query": {"text": query.text, "exact": query.exact},
        "matching": len(found),
        "jobs": jobs,
        "ended": [_ended(job) for job in _latest_ended(registry, query)],
        "refusals": refusals.lately(now),
        "refusals_overflow": refusals.overflows(now),
    }


def _counts(registry: Registry) -> dict[str, int]:
    running = sum(job.running for job in registry.jobs)
    troubled = sum(1 for job in registry.jobs if job.running and not job.well)
    total = len(registry.jobs)
    return {
        "jobs": total,
        "waiting": total - running,
        "running": running,
        "troubled": troubled,
        "ranks": registry.ranks,
    }


def _urgency(job: Job) -> tuple[bool, float]:
    """Jobs in trouble first, for longest first: one that waits is, from its first rank on."""
    if job.running and job.lost:
        return False, min(at for at, _ in job.lost.values())
    return job.well, job.began


def _latest_ended(registry: Registry, query: Query) -> list[Job]:
    ended = [job for job in registry.ended_badly if query.takes(job)]
    ended += [job for job in registry.ended_well if query.takes(job)]
    return sorted(ended, key=lambda job: -job.ended)[:ENDED_SHOWN]


def _job(job: Job) -> Snapshot:
    entry = _common(job) | {
        "state": "RUNNING" if job.running else "WAITING",
        "ready": _time(job.ready) if job.running else None,
        "expires": _time(job.expires),
        "here": len(job.members),
        "relay_pairs": job.relay_pairs,
    }
    entry["missing"] = ""
    if not job.running:
        absent = job.size - len(job.members)
        entry["missing"] = _text(_gaps(sorted(job.members), job.size), absent)
    last = next(reversed(job.members.values()), None)
    if last is not None:
        entry["latest"] = _rank(last.rank, last.joined, last.address)
    return entry


def _common(job: Job) -> Snapshot:
    return {
        "name": job.name,
        "size": job.size,
        "epoch": job.epoch,
        "began": _time(job.began),
        "left": job.left,
        "lost_count": job.lost_count,
        "lost": [
            {"rank": rank, "at": _time(at), "why": why[:TEXT_SHOWN]}
            for rank, (at, why) in job.lost.items()
        ],
        "said": _said(job.aborted) if job.aborted is not None else None,
        "links": job.links,
        "links_relayed": job.relayed,
        "relay_bytes": job.relay_bytes,
    }


def _said(said: Notice) -> Snapshot:
    about = sorted(set(said.ranks))
    return {
        "by": None if said.by == SERVER else said.by,
        "kind": said.kind[:TEXT_SHOWN],
        "about": _text(_ranges(about), len(about)),
        "operation": said.op and said.op[:TEXT_SHOWN],
        "reason": said.reason[:TEXT_SHOWN],
    }


def _ended(job: Job) -> Snapshot:
    came = job.size if job.running else int.from_bytes(job.came).bit_count()
    never = "" if job.running else _text(_absent(job.came, job.size), job.size - came)
    return _common(job) | {
        "state": "ENDED",
        "well": job.well,
        "complete": job.running,
        "ready": _time(job.ready) if job.running else None,
        "ended": _time(job.ended),
        "came": came,
        "never_came": never,
    }


def _details(job: Job, pairs: Iterable[Snapshot]) -> Snapshot:
    """More of a job that was asked for: its ranks one by one."""
    ranks = heapq.nsmallest(RANKS_SHOWN, job.members)
    relaying = sorted((p for p in pairs if p["job"] == job.name), key=lambda p: p["ranks"])
    gone = sorted(rank for rank, message in job.gone.items() if message["clean"])
    return {
        "ranks": [_rank(r, job.members[r].joined, job.members[r].address) for r in ranks],
        "left_ranks": _text(_ranges(gone), len(gone)),
        "relaying": relaying[:PAIRS_SHOWN],
    }


def _rank(rank: int, joined: float, address: Address) -> Snapshot:
    return {"rank": rank, "joined": _time(joined), "address": format_address(address)}


def _time(seconds: float) -> float:
    return round(seconds, 1)


# ---------------------------------------------------------------------- ranges of ranks
# These are asked for a few ranges only, and then take no longer than for a few.
Range = tuple[int, int]


def _gaps(present: Iterable[int], size: int) -> Iterator[Range]:
    """Ranges of ranks below `size` that are not among `present`, which is sorted."""
    expected = 0
    for rank in present:
        if rank > expected:
            yield expected, rank - 1
        expected = rank + 1
    if expected < size:
        yield expected, size - 1


def _ranges(ranks: Sequence[int]) -> Iterator[Range]:
    """Ranges that sorted `ranks` form."""
    start = 0
    for end in range(1, len(ranks) + 1):
        if end == len(ranks) or ranks[end] != ranks[end - 1] + 1:
            yield ranks[start], ranks[end - 1]
            start = end


def _absent(bitmap: bytes | bytearray, size: int) -> Iterator[Range]:
    """Ranges of ranks below `size` that are not in a bitmap: without looking at each."""
    rest = ~int.from_bytes(bitmap, "little") & ((1 << size) - 1)
    while rest:
        first = (rest & -rest).bit_length() - 1
        run = rest >> first
        end = first + (~run & (run + 1)).bit_length() - 1
        yield first, end - 1
        rest = rest >> end << end


def _text(ranges: Iterator[Range], total: int) -> str:
    """Return "3, 17-19"; of many ranges the first, and how many of `total` are in the others."""
    shown = list(islice(ranges, RANGES_SHOWN))
    more = total - sum(b - a + 1 for a, b in shown)
    texts = [f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in shown]
    return ", ".join(texts) + (f" and {more:,} more" if more else "")
