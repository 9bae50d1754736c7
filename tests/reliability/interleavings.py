"""A world of servers, ranks and connections without I/O, in which anything may come at any time.

Job A runs in two epochs and job B beside it; all ranks have the same numbers, the same key or
none, and one NAT address, behind which a call may end at any of them. The bytes of each connection
keep their order, and nothing else has one. Ranks leave, die, lose their line and come back; new
processes take the place of those that are gone; servers die.

The parts that decide are the real ones: registry, both sides of joining, the handshake between
ranks, the inbox. The glue between them does what `rendezvous_server.server`,
`fmi_client.socket_endpoint` and `fmi_client.transport.punch` do with sockets. Beside it the world
keeps who really did what, and whatever a rank hears is compared with that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from random import Random
from typing import Any

from fmi_client.errors import FmiError
from fmi_client.protocol.frames import encode, unpack_ranks
from fmi_client.protocol.relay import RELAY_GO
from fmi_client.protocol.rendezvous import (
    Admission,
    Authenticated,
    RelayLeg,
    Request,
    ServerSide,
)
from rendezvous_server.jobs import Member, RelayPair
from rendezvous_server.registry import Outbox, Registry
from tests.reliability.interleaved_ranks import NAT, End, Group, Rank

KEY = b"k" * 32
STEPS = 350
LATER = 20.0
"""Seconds: longer than a server waits for ranks to come back, shorter than a ticket lasts."""


class Line:
    """A connection as the server sees it, and who is really at its other end."""

    def __init__(self, world: World, end: End, rank: Rank) -> None:
        self.world, self.end, self.rank = world, end, rank
        self.registry = world.registry
        self.side = ServerSide(Admission(None, allow_anonymous=True), NAT, world.now)
        self.member: Member | None = None
        self.pair: RelayPair | None = None
        self.partner: Line | None = None
        self.clean = False
        end.take, end.lost = self.take, self.lost

    @property
    def group(self) -> Group:
        assert self.member is not None
        return Group(self.rank.job, self.rank.epoch, self.member.job.run)

    def take(self, data: bytes) -> None:
        try:
            for event in self.side.receive(data, self.world.now):
                self.flush()
                self.handle(event)
            if self.side.failure is not None:
                raise self.side.failure
        except FmiError as error:
            self.flush()
            answer = self.side.refusal(error)
            self.world.seen[f"refused: {type(error).__name__}"] += 1
            self.end.send(encode(answer) if answer else b"")
            self.close()
        self.flush()

    def flush(self) -> None:
        self.end.send(self.side.outgoing)
        self.side.outgoing.clear()

    def handle(self, event: Authenticated | RelayLeg | Request) -> None:
        if isinstance(event, Authenticated):
            self.join(event)
        elif isinstance(event, RelayLeg):
            self.become_leg(self.registry.tickets.claim(event.ticket, self.world.now))
        elif event.message["t"] == "leave":
            self.clean = True
            self.close()
        elif self.member is not None and not self.end.closed:
            self.deliver(self.registry.request(self.member, event.message, self.world.now))

    def join(self, event: Authenticated) -> None:
        self.member, outbox = self.registry.join(event.hello, NAT, self, self.world.now)
        self.world.came[self.group].add(self.rank.number)
        self.world.inner[self.group, self.rank.number].add(self.rank.inner)
        self.world.seen["rejoined"] += event.hello.began
        self.end.send(encode(event.welcome | {"run": self.member.job.run}))
        self.deliver(outbox)

    def deliver(self, outbox: Outbox) -> None:
        for member, message in outbox:
            if message["t"] == "missing":
                line(member).check_missing(unpack_ranks(message["ranks"]))
            line(member).end.send(encode(message))
            if not member.present:
                line(member).close()

    def check_missing(self, missing: list[int]) -> None:
        lines = [each for each in self.world.lines if each.member and not each.end.closed]
        here = {each.rank.number for each in lines if each.group == self.group}
        assert set(missing) == set(range(self.rank.size)) - here, "others are missing"

    def become_leg(self, pair: RelayPair) -> None:
        first, self.pair = pair.first, pair
        if not isinstance(first, Line) or first.end.closed:
            pair.first = self
            return
        assert first.rank.whole == self.rank.whole, "legs of different jobs met"
        assert {first.rank.number, self.rank.number} == set(pair.ranks), "legs of other ranks met"
        self.world.seen["relayed"] += 1
        for leg, other in ((self, first), (first, self)):
            leg.end.send(RELAY_GO)
            leg.end.take, leg.partner = other.end.send, other

    def close(self) -> None:
        if not self.end.closed:
            self.end.close()
            self.lost()

    def lost(self) -> None:
        if self.pair is not None:
            self.pair.release()
        if self.partner is not None:
            self.partner.close()
        if self.member is None:
            return
        self.world.went.add((self.group, self.rank.number))
        now = self.world.now
        self.deliver(self.registry.leave(self.member, clean=self.clean, why="", now=now))


def line(member: Member) -> Line:
    assert isinstance(member.connection, Line)
    return member.connection


class World:
    """All of it, and what really happened. The same seed gives the same course of events."""

    def __init__(self, seed: int) -> None:
        self.random = draw = Random(seed)
        self.now = 1000.0
        self.one_cookie = draw.random() < 0.25
        """Whether the server is hostile, and gives the same cookie to all pairs."""
        self.key = draw.choice([KEY, None])
        self.seen: Counter[str] = Counter()
        self.came: defaultdict[Group, set[int]] = defaultdict(set)
        self.went: set[tuple[Group, int]] = set()
        self.asked: set[tuple[Group, int, int]] = set()
        self.inner: defaultdict[tuple[Group, int], set[Any]] = defaultdict(set)
        self.coming: list[End] = []
        self.late: list[End] = []
        """The same of ranks that compute, and hear their server late."""
        self.ranks: list[Rank] = []
        self.lines: list[Line] = []
        self.registry = self.make_registry()
        sizes = {"A": draw.choice([2, 2, 3]), "B": draw.choice([2, 2, 3])}
        first = [("A", 0, n, sizes["A"], 0) for n in range(sizes["A"])]
        first += [("B", 0, n, sizes["B"], 0) for n in range(sizes["B"])]
        later = draw.randrange(STEPS)
        self.cast = draw.sample(first, len(first))
        """Processes that are still to begin, and the step from which on they do."""
        self.cast += [("A", 1, n, sizes["A"], later) for n in range(sizes["A"])]

    def make_registry(self) -> Registry:
        cookies = Random(self.random.random())
        cookie = b"c" * 16
        return Registry(
            600, make_cookie=lambda: cookie if self.one_cookie else cookies.randbytes(16)
        )

    def connection(self) -> tuple[End, End]:
        one, other = End(self.coming), End(self.coming)
        one.other, other.other = other, one
        return one, other

    def serve(self, end: End, rank: Rank) -> None:
        self.lines.append(Line(self, end, rank))

    def crash(self) -> None:
        """The server dies, and another takes its place."""
        for each in self.lines:
            if each.member is not None:
                self.went.add((each.group, each.rank.number))
            each.end.close()
        self.lines = []
        self.registry = self.make_registry()
        self.seen["crashes"] += 1

    def wait(self) -> None:
        self.now += self.random.uniform(0, LATER)
        for member, message in self.registry.overdue(self.now):
            line(member).end.send(encode(message))

    def replace(self) -> None:
        """Begin a process in the place of one that is gone, or seems to be; or all of its job."""
        if self.ranks and not self.one_cookie:
            old = self.random.choice(self.ranks)
            for number in self.random.choice([[old.number], range(old.size)]):
                self.begin(old.job, old.epoch, number, old.size)

    def begin(self, job: str, epoch: int, number: int, size: int) -> None:
        self.ranks.append(Rank(self, job, epoch, number, size))
        self.ranks[-1].join()

    def step(self, number: int) -> None:
        draw, chance = self.random, self.random.random()
        coming = self.late if draw.random() < 0.02 else self.coming
        if chance < 0.006:
            draw.choice([self.crash, self.wait])()
        elif chance < 0.02:
            self.replace()
        elif self.cast and self.cast[0][-1] <= number and chance < 0.2:
            self.begin(*self.cast.pop(0)[:-1])
        elif coming and chance < 0.75:
            draw.choice(coming).deliver(draw.choice([1, 30, 4096, 4096, 4096]))
        elif alive := [rank for rank in self.ranks if not rank.over]:
            draw.choice(alive).act()


def play(seed: int) -> Counter[str]:
    """Let one course of events happen.

    Returns:
        How often what happened.

    Raises:
        AssertionError: a rank heard of another job, epoch or run.
    """
    world = World(seed)
    try:
        for number in range(STEPS):
            world.step(number)
    except AssertionError as error:
        error.add_note(f"play({seed}) shows it again")
        raise
    return world.seen
