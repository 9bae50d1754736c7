"""Jobs and their ranks: who waits, who is there, who wants to meet whom. No I/O.

Every method returns what is to be sent, as pairs of a member and a message; the caller
owns the connections. Times are Unix seconds, given by the caller.

A job lives through two states::

    WAITING   ranks come and may go; a rank that is lost frees its place
    RUNNING   all came ("ready" was sent); whoever is lost is announced; nobody new

and ends when its last rank leaves. Its name is free again at once, and for a rank that said
goodbye even before: a loop of jobs under one name does not depend on who is fastest.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from fmi_client.errors import (
    AuthenticationFailed,
    JobFull,
    ProtocolError,
    RankTaken,
    RendezvousError,
    ServerDraining,
)
from fmi_client.protocol import auth, frames
from fmi_client.protocol.addresses import Address, Version
from fmi_client.protocol.frames import Message
from fmi_client.protocol.hello import MAX_CANDIDATES, Hello
from fmi_client.protocol.rendezvous import (
    JobAborted,
    abort_message,
    pack_ranks,
    read_abort,
)
from rendezvous_server.reach import Reach, can_punch, sort_addresses

RELAY_BYTES = 2**40
"""What one job may have passed on: no job of a few hours needs 1 TiB, and at AWS's list price
of traffic to the Internet ($0.09 a GB, November 2026) that much costs about a hundred dollars."""

RELAY_PAIRS = 1024
"""Relayed pairs of one job at once: each costs two descriptors, and up to 256 KiB of memory."""

TICKET_SECONDS = 120.0
"""A rank may compute for a while between the server's word and its next call."""

SERVER = -1
"""The `by` of an abort that no rank asked for."""

LOST_KEPT = 16
"""Lost ranks of a job of which is kept when and why: the first is the cause of the others."""

SPARE_LINKS = 16
"""A rank may ask twice for a link with each of the others, and so many times more."""

ENDED_KEPT = 50
"""Jobs that are kept for looking at after their end; as many of those that ended well."""


class RelayFull(RendezvousError):
    """A job has as many pairs on the server as it may."""


@dataclass(slots=True, eq=False)
class Member:
    """One rank of a job. `connection` is the caller's own handle to it."""

    job: Job
    rank: int
    connection: Hashable
    reach: dict[Version, Reach]
    """By version of IP; where it has both, the one that it came by is first."""
    address: Address
    """Where it came from, as we see it."""
    joined: float
    tickets: list[bytes] = field(default_factory=list)
    """For its legs on the server: what it has not used goes with it."""


@dataclass(slots=True, eq=False)
class RelayPair:
    """Two ranks that may meet on the server; `first` is the handle of the leg that waits."""

    job: Job
    ranks: tuple[int, int]
    expires: float
    first: Hashable | None = None
    legs: int = 0
    refused: bool = False
    """One leg came when there was no room: the other must not wait for it in vain."""


@dataclass(slots=True, eq=False)
class Job:
    name: str
    size: int
    epoch: int
    began: float
    """When its first rank came."""
    expires: float
    members: dict[int, Member] = field(default_factory=dict)
    running: bool = False
    gone: dict[int, Message] = field(default_factory=dict)
    """Ranks that left or were lost while the job ran, with what was said of them."""
    wanted: set[tuple[int, int]] = field(default_factory=set)
    """Links asked for by one side: (who asked, with whom)."""
    relay_bytes: int = 0
    relay_pairs: int = 0
    """Pairs with a leg on the server now."""
    ready: float = 0.0
    """When its last rank came, if it is running."""
    links: int = 0
    """Pairs told to punch."""
    relayed: int = 0
    """Of these, pairs that met on the server."""
    came: bytearray = field(default_factory=bytearray)
    """Ranks that went away again before all were there, as a bitmap."""
    left: int = 0
    lost_count: int = 0
    """Ranks that left, and that were lost, while the job ran."""
    lost: dict[int, tuple[float, str]] = field(default_factory=dict)
    """When and why ranks were lost that did not come back; `LOST_KEPT` of them."""
    aborted: JobAborted | None = None
    """What a rank or the server said when it ended the job for everybody."""
    ended: float = 0.0
    absent: Message | None = None
    """The answer to "who", until somebody comes or goes: at a deadline all ranks ask at once."""

    @property
    def well(self) -> bool:
        """Whether nothing went wrong (so far)."""
        return self.running and not self.lost_count and self.aborted is None

    def lose(self, rank: int, now: float, why: str) -> None:
        self.lost_count += self.running
        if len(self.lost) < LOST_KEPT:
            self.lost[rank] = now, why

    def note(self, rank: int) -> None:
        """Remember that a rank was here before the job was complete."""
        if not self.came:
            self.came = bytearray((self.size + 7) // 8)
        self.came[rank // 8] |= 1 << rank % 8


Outbox = list[tuple[Member, Message]]


class Registry:
    """All jobs of one server.

    Args:
        ttl: seconds after which a job is ended, whatever it does.
        max_jobs, max_ranks: bounds of what the server holds at once.
        relay: whether ranks that cannot be linked directly may meet here.
        relay_bytes: what may be passed on for one job, all in all.
        relay_pairs: how many pairs of one job may be here at once.
        make_cookie: source of the pairs' random cookies.
    """

    def __init__(
        self,
        ttl: float,
        max_jobs: int = 10_000,
        max_ranks: int = 100_000,
        relay: bool = True,
        relay_bytes: int = RELAY_BYTES,
        relay_pairs: int = RELAY_PAIRS,
        make_cookie: Callable[[], bytes] = lambda: os.urandom(auth.COOKIE_BYTES),
    ) -> None:
        self._ttl = ttl
        self._max_jobs = max_jobs
        self._max_ranks = max_ranks
        self._relay = relay
        self._relay_bytes = relay_bytes
        self._relay_pairs = relay_pairs
        self._make_cookie = make_cookie
        self._tickets: dict[bytes, RelayPair] = {}
        self.jobs: dict[Job, None] = {}  # a set, in the order of their beginning
        self._by_name: dict[str, Job] = {}
        # Those that ended well must not push out the one that somebody looks for.
        self.ended_well: deque[Job] = deque(maxlen=ENDED_KEPT)
        self.ended_badly: deque[Job] = deque(maxlen=ENDED_KEPT)
        self.ranks = 0
        self.draining = False
        self.punches = 0
        """Pairs told to punch, ever."""

    # -------------------------------------------------------------------- joining
    def join(
        self, hello: Hello, observed: Address, connection: Hashable, now: float
    ) -> tuple[Member, Outbox]:
        """Take a rank in.

        Raises:
            ServerDraining, JobFull, RankTaken, RendezvousError: it cannot join.
        """
        if self.draining:
            raise ServerDraining("the server is shutting down; try again in a few seconds")
        if self.ranks >= self._max_ranks:
            raise RendezvousError(f"the server holds {self._max_ranks} ranks already")
        job, outbox = self._find_job(hello, now)
        if hello.rank in job.members:
            raise RankTaken(f"rank {hello.rank} of job {job.name!r} is here already")
        reach = sort_addresses(observed, hello.candidates[:MAX_CANDIDATES])
        member = Member(job, hello.rank, connection, reach, observed, now)
        job.members[hello.rank] = member
        job.absent = None
        self.ranks += 1
        if job.lost:
            job.lost.pop(hello.rank, None)
        if len(job.members) == job.size:
            job.running, job.ready = True, now
            outbox += [(each, {"t": "ready"}) for each in job.members.values()]
        return member, outbox

    def _find_job(self, hello: Hello, now: float) -> tuple[Job, Outbox]:
        job = self._by_name.get(hello.job)
        outbox: Outbox = []
        if job is not None and hello.epoch == job.epoch and _finished(job, hello.rank):
            job = None  # the next job of that name: this rank is the first to come back
        if job is not None and hello.epoch > job.epoch:
            reason = f"job {job.name!r} was started again with epoch {hello.epoch}"
            outbox = self._end(job, "superseded", reason, now)
            job = None
        if job is None:
            if len(self.jobs) >= self._max_jobs:
                raise RendezvousError(f"the server holds {self._max_jobs} jobs already")
            job = Job(hello.job, hello.size, hello.epoch, now, now + self._ttl)
            self._by_name[hello.job] = job
            self.jobs[job] = None
            return job, outbox
        if hello.epoch < job.epoch:
            raise RendezvousError(
                f"job {job.name!r} is at epoch {job.epoch}; a rank of epoch {hello.epoch} is late"
            )
        if job.size != hello.size:
            raise JobFull(f"job {job.name!r} has {job.size} ranks, not {hello.size}")
        if job.running and hello.rank not in job.members:
            raise JobFull(f"job {job.name!r} runs already; a new attempt needs a higher epoch")
        return job, outbox

    # -------------------------------------------------------------------- leaving
    def leave(self, member: Member, *, clean: bool, why: str, now: float) -> Outbox:
        """A rank's connection ended, after "leave" (`clean`) or without."""
        job = member.job
        if job.members.get(member.rank) is not member:
            return []  # the job has ended already
        del job.members[member.rank]
        job.absent = None
        self.ranks -= 1
        self._void(member)
        job.left += clean and job.running
        if not clean:
            job.lose(member.rank, now, why)
        if not job.running:
            job.note(member.rank)
        if not job.members:
            self._forget(job, now)
        if not job.running or not job.members:
            return []
        message = {"t": "gone", "rank": member.rank, "clean": clean, "why": why}
        job.gone[member.rank] = message
        return [(each, message) for each in job.members.values()]

    def _void(self, member: Member) -> None:
        for ticket in member.tickets:
            self._tickets.pop(ticket, None)
        member.tickets.clear()

    def _forget(self, job: Job, now: float) -> None:
        self.jobs.pop(job, None)
        if self._by_name.get(job.name) is job:
            del self._by_name[job.name]
        job.ended = now
        job.gone, job.wanted = {}, set()  # what is kept of it must be small
        (self.ended_well if job.well else self.ended_badly).append(job)

    def _end(self, job: Job, kind: str, reason: str, now: float) -> Outbox:
        """End a job for all its ranks; their connections are the caller's to close."""
        job.aborted = job.aborted or JobAborted(SERVER, kind, reason)
        message = abort_message("aborted", JobAborted(SERVER, kind, reason))
        outbox = [(member, message) for member in job.members.values()]
        self.ranks -= len(job.members)
        for member in job.members.values():
            self._void(member)
        if not job.running:
            for rank in job.members:
                job.note(rank)
        job.members.clear()
        self._forget(job, now)
        return outbox

    def expire(self, now: float) -> Outbox:
        """End the jobs, and forget the tickets, whose time is over."""
        for ticket in [t for t, pair in self._tickets.items() if pair.expires <= now]:
            del self._tickets[ticket]
        late = [job for job in self.jobs if job.expires <= now]
        return [
            pair
            for job in late
            for pair in self._end(
                job,
                "expired",
                f"job {job.name!r} was ended by the server after {self._ttl:.0f} s",
                now,
            )
        ]

    def drain(self) -> Outbox:
        """Take nobody new. Ranks of incomplete jobs are told to come back elsewhere."""
        self.draining = True
        outbox: Outbox = []
        for job in self.jobs:
            if job.running:
                outbox += [(member, {"t": "draining"}) for member in job.members.values()]
            else:
                why = "the server is shutting down; join again in a few seconds"
                refusal = {"t": "error", "code": "draining", "why": why}
                outbox += [(member, refusal) for member in job.members.values()]
        return outbox

    # ------------------------------------------------------------------- requests
    def request(self, member: Member, message: Message, now: float) -> Outbox:
        """Answer an authenticated rank's message.

        Raises:
            ProtocolError: there is no such request.
        """
        match message["t"]:
            case "link":
                return self._link(member, frames.field(message, "peer", int), now)
            case "abort":
                said = read_abort(message, member.rank)
                member.job.aborted = member.job.aborted or said
                aborted = abort_message("aborted", said)
                return [(other, aborted) for other in _others(member)]
            case "who":
                return [(member, self._missing(member.job))]
        raise ProtocolError(f"unknown request {message['t']!r}")

    def _link(self, member: Member, peer: int, now: float) -> Outbox:
        job = member.job
        if peer >= job.size or peer == member.rank or not job.running:
            raise ProtocolError(f"link: there is no peer {peer}")
        other = job.members.get(peer)
        if other is None:
            return [(member, job.gone[peer])]
        if (peer, member.rank) not in job.wanted:
            job.wanted.add((member.rank, peer))
            return [(other, {"t": "want", "peer": member.rank})]
        job.wanted.discard((peer, member.rank))
        self.punches += 1
        job.links += 1
        return self._introduce(member, other, now)

    def _introduce(self, one: Member, other: Member, now: float) -> Outbox:
        cookie = self._make_cookie()
        shared = [each for each in one.reach if each in other.reach]
        hope = any(can_punch(one.reach[each], other.reach[each]) for each in shared)
        common = {"t": "punch", "cookie": cookie, "hopeless": not hope}
        pair = RelayPair(one.job, (one.rank, other.rank), now + TICKET_SECONDS)
        outbox: Outbox = []
        for member, peer in ((one, other), (other, one)):
            if len(member.tickets) >= 2 * one.job.size + SPARE_LINKS:
                raise ProtocolError("link: asked for too often")
            at = [list(address) for each in shared for address in peer.reach[each].addresses]
            message = common | {"peer": peer.rank, "at": at}
            if self._relay:
                ticket = os.urandom(auth.COOKIE_BYTES)
                self._tickets[ticket] = pair
                member.tickets.append(ticket)
                message["ticket"] = ticket
            outbox.append((member, message))
        return outbox

    # ---------------------------------------------------------------------- relay
    def claim(self, ticket: bytes, now: float) -> RelayPair:
        """Use up a ticket: one leg of its pair is here. `release` must follow.

        Raises:
            AuthenticationFailed: there is no such ticket, or its job is over.
            RelayFull: the job has as many pairs here as it may.
        """
        pair = self._tickets.pop(ticket, None)
        if pair is None or pair.expires <= now or pair.job not in self.jobs:
            raise AuthenticationFailed("authentication failed")
        if pair.legs == 0:
            pair.refused |= pair.job.relay_pairs >= self._relay_pairs
            if pair.refused:
                raise RelayFull(
                    f"job {pair.job.name!r} relays {self._relay_pairs} pairs already "
                    "(--relay-pairs)"
                )
            pair.job.relay_pairs += 1
        pair.legs += 1
        return pair

    def met(self, pair: RelayPair) -> None:
        """Both legs are here."""
        pair.job.relayed += 1

    def release(self, pair: RelayPair) -> None:
        """A leg ended."""
        pair.legs -= 1
        if pair.legs == 0:
            pair.job.relay_pairs -= 1

    def may_relay(self, job: Job, size: int) -> bool:
        """Count bytes that are to be passed on; whether they may be."""
        job.relay_bytes += size
        return job.relay_bytes <= self._relay_bytes

    def end_relayed(self, job: Job, now: float) -> Outbox:
        """End a job that relays too much: without its links it could only hang."""
        reason = (
            f"job {job.name!r} has relayed its limit of {self._relay_bytes} bytes; "
            "see the server's --relay-bytes"
        )
        return self._end(job, "relay", reason, now)

    def _missing(self, job: Job) -> Message:
        if job.absent is None:
            absent = set(range(job.size)) - job.members.keys()
            job.absent = {"t": "missing", "ranks": pack_ranks(absent, job.size)}
        return job.absent


def _finished(job: Job, rank: int) -> bool:
    """Whether a rank said goodbye to a job that the others may still be leaving."""
    return rank in job.gone and job.gone[rank]["clean"] is True


def _others(member: Member) -> Iterable[Member]:
    return [other for other in member.job.members.values() if other is not member]
