"""One rank's presence in a job: its links, its line to the server, and how it fails.

An endpoint knows nothing of collectives. Communicators (the job's, and those split from
it) share it; the drivers wait until what they posted on its links is done. When anything
ends the job, `fail` ends everything that waits, on every communicator, with that error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from fmi_client.errors import CollectiveMismatch, FmiError, RankFailed
from fmi_client.protocol.inbox import STAGE_BYTES as PEER_STAGE_BYTES
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.notice import Kind, Notice
from fmi_client.protocol.peer import COLLECTIVE, WAITING, Key, Payload
from fmi_client.protocol.roll import Roll
from fmi_client.transport.link import Link
from fmi_client.transport.memory import STAGE_BYTES, MemoryLink

ROLL_SECONDS = 0.07
"""How long ranks may take to answer before they are named as missing, and """

ANSWER_SECONDS = 50e-6
"""so much more for each rank of the job: that much of the server's time each takes."""

ALONE_SECONDS = 0.5
"""So much longer a rank waits for who called the roll to name the missing; then it is content with
what it knows itself."""

CALLS_KEPT = 1024
"""So far behind us another rank's different call is still recognised."""

MAX_SECONDS = 1e8
"""Three years: "for ever" in a form that every clock can add to."""

Allocate = Callable[[int], memoryview]
"""Makes a writable buffer of so many bytes."""


class Endpoint:
    """What all kinds of endpoint share: links, the running collectives, and failure."""

    def __init__(self, rank: int, size: int, allocate: Allocate) -> None:
        self.rank = rank
        self.size = size
        self.join_seconds = 0.0
        """How long joining took."""
        self._roll_seconds = ROLL_SECONDS + size * ANSWER_SECONDS
        self._alone_seconds = ALONE_SECONDS + 2 * self._roll_seconds
        self.links: dict[int, Link] = {}
        self._gone: dict[int, RankFailed] = {}
        """Ranks that have left in order, and what it means to need one."""
        self.failure: FmiError | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when the endpoint becomes ready or fails; set by the driver."""
        self._allocate = allocate
        self._calls: dict[int, dict[int, bytes]] = {}
        """By communicator and number, what this rank called; the last `CALLS_KEPT`."""
        self._early: dict[tuple[int, int], dict[bytes, int]] = {}
        """What others called ahead of us, each with the first who did."""
        self.running: set[Key] = set()
        """The collectives that this rank has begun and not ended."""
        self._roll: Roll | None = None
        self._group: Sequence[int] = ()
        """Who has to answer, where this rank has called the roll."""
        self._rooms = 0

    # ---------------------------------------------------------------------- links
    def link(self, peer: int) -> Link:
        """Return the link with `peer`, which may still have to be made."""
        link = self.links.get(peer)
        if link is None:
            link = self.links[peer] = self._self_link() if peer == self.rank else self._make(peer)
            link.make_room(self._rooms > 0)
        return link

    def look(self) -> bool:
        """See, without waiting, whether others have ended the job; True: an answer is on its way.

        Only where they cannot tell us by themselves, as a server's connection does, while it lasts.
        """
        return False

    def make_room(self, room: bool) -> None:
        """While a send is stuck (calls may nest), take in what nobody awaits from all peers.

        The peer may be stuck, too, in a send to us or to a third rank that is.
        """
        self._rooms += 1 if room else -1
        for link in self.links.values():
            link.make_room(self._rooms > 0)

    def _make(self, peer: int) -> Link:
        raise NotImplementedError

    def _self_link(self) -> Link:
        link = MemoryLink(self.rank, self._inbox(self.rank))
        link.partner = link
        return link

    def _inbox(self, peer: int, stage_bytes: int = PEER_STAGE_BYTES, hold: bool = False) -> Inbox:
        return Inbox(
            self._allocate, lambda key, sign: self._unexpected(peer, key, sign), stage_bytes, hold
        )

    # ---------------------------------------------------------------- who does what
    def begin(self, context: int, seq: int, signature: bytes) -> None:
        """A collective starts here; a peer may have begun another one in its place."""
        calls = self._calls.setdefault(context, {})
        calls[seq] = signature
        calls.pop(seq - CALLS_KEPT, None)
        for theirs, peer in self._early.pop((context, seq), {}).items():
            if theirs != signature:
                self.mismatch(peer, signature, theirs, seq)

    def _unexpected(self, peer: int, key: Key, signature: bytes) -> None:
        """Compare what `peer` called with our call of that number, past, present or to come.

        A past one, too: a rank that called another gather may send to one whose part is done.
        """
        kind, context, seq = key
        if kind != COLLECTIVE:
            return
        calls = self._calls.get(context, {})
        mine = calls.get(seq)
        if mine is None and seq > next(reversed(calls), -1) - CALLS_KEPT:
            self._early.setdefault((context, seq), {}).setdefault(signature, peer)
        elif mine is not None and mine != signature:
            self.mismatch(peer, mine, signature, seq)

    def ask(self, peer: int, context: int, seq: int, signature: bytes) -> None:
        """Let `peer`, for whom we have waited a while, see in what: it may do something else."""
        self.link(peer).send((WAITING, context, seq), signature, Payload(b"", ()))

    def mismatch(self, peer: int, mine: bytes, theirs: bytes, seq: int) -> None:
        """Ranks called different things: end the job everywhere, saying who called what."""
        ours, others = mine.decode(errors="replace"), theirs.decode(errors="replace")
        details = f"rank {self.rank} called {ours}; rank {peer} called {others}"
        op = ours.split("(")[0]
        self.tell(Notice(self.rank, Kind.MISMATCH, details, op, seq))
        self.fail(CollectiveMismatch(details=details, rank=self.rank, peer=peer, op=op, seq=seq))

    # ------------------------------------------------------------------- lateness
    def late(self, call: Notice, group: Sequence[int]) -> None:
        """The deadline of a collective of `group` passed here: call the roll, if nobody has.

        After a moment those who did not answer are the ones that are missing, on all ranks.
        """
        if self._roll is not None or self.failure is not None:
            return
        self._roll, self._group = Roll(call), group
        self._later(self._alone_seconds, self._conclude_alone)
        self.tell(replace(call, ranks=tuple({*call.ranks, *self._waits_for()})))
        self._called()

    def _called(self) -> None:
        """What we called has been heard; where a server passes that on, it says so."""
        self._later(self._roll_seconds, self._conclude)

    def _waits_for(self) -> list[int]:
        return [peer for peer, link in self.links.items() if link.busy and peer != self.rank]

    def _answer(self, call: Notice) -> None:
        """Another rank calls the roll."""
        if self._roll is not None:
            self._roll.add(call)  # as we did
            return
        self._roll = Roll(call)
        self._later(self._alone_seconds, self._conclude_alone)
        begun = next(reversed(self._calls.get(call.context, {})), -1)
        if self.running or begun >= (call.seq or 0):
            waits_for = tuple(self._waits_for())
            self.tell(replace(call, by=self.rank, kind=Kind.HERE, ranks=waits_for))

    def _conclude(self) -> None:
        """Name the missing to all."""
        if self._roll is None or self.failure is not None:
            return
        # Who has left in order had nothing left to do.
        self._end_with(self._roll.verdict([r for r in self._group if r not in self._gone]))

    def _end_with(self, verdict: Notice) -> None:
        self.tell(verdict)
        self.fail(verdict.error(self.rank))

    def _conclude_alone(self) -> None:
        if self._roll is not None and self.failure is None:
            self._end_with(self._roll.verdict())

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        raise NotImplementedError

    # -------------------------------------------------------------------- failure
    def tell(self, notice: Notice) -> None:
        """Let all other ranks of the job know."""
        raise NotImplementedError

    def give_up(self, error: FmiError) -> None:
        """End the job everywhere for a reason that only this rank has noticed."""
        if self.failure is not None:
            return
        self.tell(Notice.of(error, self.rank))
        self.fail(error)

    def excuse(self, peer: int) -> FmiError | None:
        """Return why `peer` cannot answer, where that is known and says more than a timeout."""
        return None

    def fail(self, error: FmiError) -> None:
        """End everything that waits, and everything later, with `error`."""
        if self.failure is not None:
            return
        self.failure = error
        for link in list(self.links.values()):
            link.abort(error)
        self.on_change()

    def told(self, notice: Notice) -> None:
        """Another rank ended the job, or waits in vain."""
        if notice.kind == Kind.TIMEOUT:
            self._answer(notice)
        elif notice.kind == Kind.HERE:
            if self._roll is not None:
                self._roll.add(notice)
        else:
            self.fail(notice.error(self.rank))

    @property
    def left(self) -> bool:
        """Whether nothing is left to do after `leave`."""
        return True

    def leave(self) -> None:
        """Begin to leave in order: what was sent still arrives. `close` must follow."""
        for link in self.links.values():
            link.close()

    def close(self) -> None:
        """Give everything back; what is called or still waits from now on fails."""
        self.fail(FmiError("this communicator is closed", rank=self.rank))


class MemoryEndpoint(Endpoint):
    """A rank of a job that lives in one process; see `communicator.memory_world`."""

    def __init__(
        self, rank: int, world: list[MemoryEndpoint], size: int, allocate: Allocate
    ) -> None:
        super().__init__(rank, size, allocate)
        self._world = world

    def _make(self, peer: int) -> Link:
        other = self._world[peer]
        link = MemoryLink(peer, self._inbox(peer, STAGE_BYTES))
        back = MemoryLink(self.rank, other._inbox(self.rank, STAGE_BYTES))
        link.partner, back.partner = back, link
        other.links[self.rank] = back
        if peer in self._gone:
            link.abort(self._gone[peer])
        return link

    def tell(self, notice: Notice) -> None:
        for other in self._world:
            if other is not self:
                other.told(notice)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, call)

    def leave(self) -> None:
        super().leave()
        for other in self._world:
            other._gone[self.rank] = left_error(self.rank)
            if other is not self and self.rank in other.links:
                other.links[self.rank].abort(other._gone[self.rank])

    def die(self) -> None:
        """Vanish as a killed process does: the others are told by nobody but the server."""
        for other in self._world:
            if other is not self:
                other.fail(RankFailed(f"rank {self.rank} was lost", rank=self.rank))


def left_error(peer: int) -> RankFailed:
    """Return what it means to need a rank that said goodbye."""
    return RankFailed(f"rank {peer} has left the job, but is needed", rank=peer)
