"""Jobs and their ranks: who waits, who is there, who wants to meet whom. No I/O.

Every method returns what is to be sent, as pairs of a member and a message; the caller owns the
connections. Who is told something and is not in its job any more has no place there: that was the
last word, and its connection is to be closed. Times are Unix seconds, given by the caller.

A job lives through two states::

    WAITING   ranks come and may go; a rank that is lost frees its place
    RUNNING   all came ("ready" was sent); whoever is lost is announced; nobody new

and ends when its last rank leaves. Its name is free again at once, and for a rank that said
goodbye even before: a loop of jobs under one name does not depend on who is fastest.

A run of a job has a name of its own, random, that its ranks are told. They bring it when their
server died and they come to us: a run that we do not know is made anew, RUNNING if one of them
heard "ready". Who has not come back to it some time later may have finished meanwhile: whoever
wants a link with it is told so, and links that exist show whether it lives.

A rank that comes under a job's name is for ::

    the run whose name it brings      if that is here
    a new run                         if it brings one that began elsewhere;
                                      if it said goodbye to the latest, which others may be leaving;
                                      if it has not come back to the latest, which began elsewhere:
                                      it left that one, or is a second process in its own place
    the latest run                    otherwise, if there is one
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace

from fmi_client.errors import (
    JobFull,
    ProtocolError,
    RankTaken,
    RendezvousError,
    ServerDraining,
)
from fmi_client.protocol import auth, frames
from fmi_client.protocol.addresses import Address
from fmi_client.protocol.frames import Message
from fmi_client.protocol.hello import MAX_CANDIDATES, Hello
from fmi_client.protocol.notice import SERVER, Kind, Notice
from fmi_client.protocol.rendezvous import REJOIN_SECONDS, error_message
from rendezvous_server.awaited import Awaited
from rendezvous_server.jobs import Job, Member, RelayPair
from rendezvous_server.reach import can_punch, sort_addresses
from rendezvous_server.tickets import RELAY_PAIRS, SPARE_LINKS, TICKET_SECONDS, Tickets

RELAY_BYTES = 2**40
"""What one job may have passed on: no job of a few hours needs 1 TiB, and at AWS's list price
of traffic to the Internet ($0.09 a GB, November 2026) that much costs about a hundred dollars."""

MAX_RUNS = 8
"""Of one job at once: two overlap where ranks that are done begin the next one, and a server that
died can make it some more. What a run was called elsewhere we have to believe."""

OVERDUE_SLICE = 5000
"""Messages about ranks that did not come back at one time: a fraction of a second's work."""

ENDED_KEPT = 50
"""Jobs that are kept for looking at after their end; as many of those that ended well."""

READY: Message = {"t": "ready"}
DRAINING: Message = {"t": "draining"}

Outbox = list[tuple[Member, Message]]


class Registry:
    """All jobs of one server.

    Args:
        ttl: seconds after which a job is ended, whatever it does.
        max_jobs, max_ranks: bounds of what the server holds at once.
        relay: whether ranks that cannot be linked directly may meet here.
        relay_bytes: what may be passed on for one job, all in all.
        relay_pairs, tag: see `Tickets`.
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
        tag: bytes = b"",
    ) -> None:
        self._ttl = ttl
        self._max_jobs = max_jobs
        self._max_ranks = max_ranks
        self._relay = relay
        self._relay_bytes = relay_bytes
        self._make_cookie = make_cookie
        self.tickets = Tickets(relay_pairs, tag)
        self.jobs: dict[Job, None] = {}  # a set, in the order of their beginning
        self._by_name: dict[str, Job] = {}
        self._by_run: dict[tuple[str, bytes], Job] = {}
        self._runs: dict[str, dict[Job, None]] = {}
        """All jobs of a name, whichever has it: they are of one epoch."""
        self._awaiting: set[Job] = set()
        """Jobs that ran on another server, and whose ranks are still coming back."""
        self._awaited = Awaited()
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
            raise _draining()
        if self.ranks >= self._max_ranks:
            raise RendezvousError(f"the server holds {self._max_ranks} ranks already")
        job, outbox = self._find_job(hello, now)
        if hello.rank in job.members:
            outbox += self._replace(job.members[hello.rank], hello)
        reach = sort_addresses(observed, hello.candidates[:MAX_CANDIDATES])
        identity, certificate = hello.identity, hello.certificate
        member = Member(job, hello.rank, connection, reach, observed, now, identity, certificate)
        job.members[hello.rank] = member
        job.absent = None
        self.ranks += 1
        if job.lost:
            job.lost.pop(hello.rank, None)
        if job.running:
            if askers := self._awaited.pop(job, hello.rank):
                job.wanted.setdefault(hello.rank, {}).update(askers)
            return member, outbox + _welcome_back(member)
        if hello.began:
            job.back_until = now + REJOIN_SECONDS
            self._awaiting.add(job)
        if hello.began or len(job.members) == job.size:
            job.running, job.ready = True, now
            outbox += [(each, READY) for each in job.members.values()]
        return member, outbox

    def _replace(self, old: Member, hello: Hello) -> Outbox:
        """Make room for a rank that is here already, if only its line broke before we noticed."""
        if not hello.identity or not auth.same(hello.identity, old.identity):
            raise RankTaken(f"rank {old.rank} of job {old.job.name!r} is here already")
        del old.job.members[old.rank]
        self.tickets.void(old)
        self.ranks -= 1
        for askers in old.job.wanted.values():
            askers.pop(old.rank, None)  # what it still wants it asks for again
        self._awaited.forget_asker(old.job, old.rank)
        return [(old, {"t": "error", "code": "taken", "why": "you have joined again"})]

    def _find_job(self, hello: Hello, now: float) -> tuple[Job, Outbox]:
        """Return the job that a rank becomes a member of, and whom that sends away."""
        outbox = self._compare_epochs(hello, now)
        job = self._find_run(hello)
        if job is None:
            return self._open(hello, now), outbox
        _check(job, hello)
        return job, outbox

    def _compare_epochs(self, hello: Hello, now: float) -> Outbox:
        """End all runs of the job that are of an older epoch than a rank that comes."""
        epoch = next((job.epoch for job in self._runs.get(hello.job, ())), hello.epoch)
        if hello.epoch < epoch:
            raise RendezvousError(
                f"job {hello.job!r} is at epoch {epoch}; a rank of epoch {hello.epoch} is late"
            )
        if hello.epoch == epoch:
            return []
        reason = f"job {hello.job!r} was started again with epoch {hello.epoch}"
        old = list(self._runs[hello.job])
        return [pair for job in old for pair in self._end(job, "superseded", reason, now)]

    def _find_run(self, hello: Hello) -> Job | None:
        """Return the run that a rank is for; None: it begins one."""
        known = self._by_run.get((hello.job, hello.run))
        latest = self._by_name.get(hello.job)
        if known is not None or latest is None:
            return known
        if hello.began:
            return None
        if hello.rank in latest.gone:
            return None if latest.gone[hello.rank]["clean"] else latest
        back = latest.back_until is None or hello.rank in latest.members
        return latest if back else None

    def _open(self, hello: Hello, now: float) -> Job:
        if len(self.jobs) >= self._max_jobs:
            raise RendezvousError(f"the server holds {self._max_jobs} jobs already")
        if len(self._runs.get(hello.job, ())) >= MAX_RUNS:
            raise RendezvousError(f"{MAX_RUNS} runs of job {hello.job!r} are here already")
        run = hello.run or auth.nonce()
        job = Job(hello.job, hello.size, hello.epoch, now, now + self._ttl, run)
        job.tls = bool(hello.certificate)
        self.jobs[job] = None
        self._by_run[job.name, run] = job
        self._runs.setdefault(job.name, {})[job] = None
        # A run that began elsewhere has no need of the name, which the next run may have already.
        self._by_name[job.name] = self._by_name.get(job.name, job) if hello.began else job
        return job

    # -------------------------------------------------------------------- leaving
    def leave(self, member: Member, *, clean: bool, why: str, now: float) -> Outbox:
        """A rank's connection ended, after "leave" (`clean`) or without."""
        job = member.job
        if not member.present:
            return []
        del job.members[member.rank]
        job.absent = None
        self.ranks -= 1
        self.tickets.void(member)
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

    def _forget(self, job: Job, now: float) -> None:
        self.jobs.pop(job, None)
        runs = self._runs[job.name]
        del runs[job]
        if not runs:
            del self._runs[job.name]
        self._by_run.pop((job.name, job.run), None)
        self._awaiting.discard(job)
        self._awaited.forget(job)
        if self._by_name.get(job.name) is job:
            del self._by_name[job.name]
        job.ended = now
        job.gone, job.wanted = {}, {}  # what is kept of it must be small
        (self.ended_well if job.well else self.ended_badly).append(job)

    def _end(self, job: Job, kind: str, reason: str, now: float) -> Outbox:
        """End a job for all its ranks."""
        notice = Notice(SERVER, kind, reason)
        job.aborted = job.aborted or notice
        message = notice.encode("aborted")
        return [(member, message) for member in self._empty(job, now)]

    def _empty(self, job: Job, now: float) -> list[Member]:
        """Forget a job; returns who was in it."""
        members = list(job.members.values())
        self.ranks -= len(members)
        for member in members:
            self.tickets.void(member)
            if not job.running:
                job.note(member.rank)
        job.members.clear()
        self._forget(job, now)
        return members

    def hand_over(self, name: str, now: float) -> list[Hashable]:
        """Jobs of that name go on at another server: forget them.

        Returns:
            Their ranks' connections, which are the caller's to cut: the ranks come again there.
        """
        moved = [job for job in self.jobs if job.name == name]
        return [member.connection for job in moved for member in self._empty(job, now)]

    def expire(self, now: float) -> Outbox:
        """End the jobs, and forget the tickets, whose time is over."""
        self.tickets.expire(now)
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

    def overdue(self, now: float) -> Outbox:
        """Tell some of those who want a link with a rank that should be back; others next time."""
        outbox: Outbox = []
        for job in [job for job in self._awaiting if (job.back_until or 0) <= now]:
            for peer, askers in self._awaited.drain(job):
                said = _not_back(peer)
                outbox += [(job.members[each], said) for each in askers if each in job.members]
                if len(outbox) >= OVERDUE_SLICE:
                    return outbox
            self._awaiting.discard(job)
        return outbox

    def drain(self, now: float) -> Outbox:
        """Take nobody new. Ranks of incomplete jobs are sent away, to come back elsewhere."""
        self.draining = True
        outbox: Outbox = []
        for job in list(self.jobs):
            if job.running:
                outbox += [(member, DRAINING) for member in job.members.values()]
            else:
                refusal = error_message(_draining())
                outbox += [(member, refusal) for member in self._empty(job, now)]
        return outbox

    # ------------------------------------------------------------------- requests
    def request(self, member: Member, message: Message, now: float) -> Outbox:
        """Answer an authenticated rank's message.

        Raises:
            ProtocolError: there is no such request.
        """
        match message["t"]:
            case "link":
                got = frames.field(message, "got", int) if "got" in message else 0
                return self._link(member, frames.field(message, "peer", int), got, now)
            case "abort":
                return _abort(member, Notice.decode(message, member.rank))
            case "who":
                return [(member, self._missing(member.job))]
        raise ProtocolError(f"unknown request {message['t']!r}")

    def _link(self, member: Member, peer: int, got: int, now: float) -> Outbox:
        job = member.job
        if peer >= job.size or peer == member.rank or not job.running:
            raise ProtocolError(f"link: there is no peer {peer}")
        other = job.members.get(peer)
        if other is None and (peer in job.gone or now >= (job.back_until or 0)):
            return [(member, job.gone.get(peer) or _not_back(peer))]
        if other is None:
            self._awaited.add(job, peer, member.rank, got)
            return []
        asked = job.wanted.get(member.rank, {})
        if peer not in asked:
            job.wanted.setdefault(peer, {})[member.rank] = got
            return [(other, _want(member.rank))]
        self.punches += 1
        job.links += 1
        outbox = self._introduce(member, other, now)
        for (_, message), has in zip(outbox, (asked.pop(peer), got), strict=True):
            message |= {"got": has} if has else {}
        return outbox

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
            if peer.certificate:
                message["cert"] = peer.certificate
            if self._relay:
                message["ticket"] = self.tickets.issue(member, pair)
            outbox.append((member, message))
        return outbox

    # ---------------------------------------------------------------------- relay
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
            job.absent = {"t": "missing", "ranks": frames.pack_ranks(absent, job.size)}
        return job.absent


def _check(job: Job, hello: Hello) -> None:
    """Refuse who is none of the ranks that the job waits for."""
    if job.size != hello.size:
        raise JobFull(f"job {job.name!r} has {job.size} ranks, not {hello.size}")
    if job.tls != bool(hello.certificate):
        raise RendezvousError(
            f"job {job.name!r} was begun {'with' if job.tls else 'without'} tls://; "
            "its ranks must all come alike"
        )
    if job.run == hello.run:
        if hello.rank in job.gone:
            raise RendezvousError(f"job {job.name!r} goes on without rank {hello.rank}")
    elif job.running and hello.rank not in job.members:
        raise JobFull(f"job {job.name!r} runs already; a new attempt needs a higher epoch")


def _draining() -> ServerDraining:
    return ServerDraining("the server is shutting down; try again in a few seconds")


def _want(asker: int) -> Message:
    return {"t": "want", "peer": asker}


def _not_back(rank: int) -> Message:
    """Say that a rank of a job from another server is not here.

    It is said as of one that left: it may have finished, and links with it that exist need not end.
    """
    why = "did not come back after the server's restart"
    return {"t": "gone", "rank": rank, "clean": True, "why": why}


def _welcome_back(member: Member) -> Outbox:
    """Tell a rank of a running job what it may have missed."""
    job = member.job
    askers = job.wanted.get(member.rank, {}).keys()
    messages = [READY, *job.gone.values(), *map(_want, askers & job.members.keys())]
    if job.aborted is not None:
        messages.append(job.aborted.encode("aborted"))
    return [(member, message) for message in messages]


def _abort(member: Member, said: Notice) -> Outbox:
    """Pass on what a rank says to all.

    At a deadline all ranks may call the roll, and all answer: only the first is heard by all,
    itself too, and the others' words go to that one. A thousand ranks would say a million.
    """
    job = member.job
    if said.kind == Kind.HERE or (said.kind == Kind.TIMEOUT and job.aborted is not None):
        caller = job.members.get(job.aborted.by) if job.aborted is not None else None
        answer = replace(said, kind=Kind.HERE).encode("aborted")
        return [(caller, answer)] if caller is not None else []
    by = said.by if job.aborted is None else job.aborted.by
    if said.kind == Kind.MISSING and by != said.by and by in job.members:
        return []  # who called the roll names them; the others only lost patience
    if job.aborted is None or said.kind == Kind.MISSING:
        job.aborted = said
    aborted = said.encode("aborted")
    itself = said.kind == Kind.TIMEOUT
    return [(m, aborted) for m in job.members.values() if m is not member or itself]
