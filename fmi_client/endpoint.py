"""One rank's presence in a job: its links, its line to the server, and how it fails.

An endpoint knows nothing of collectives. Communicators (the job's, and those split from
it) share it; the drivers wait until what they posted on its links is done. When anything
ends the job, `fail` ends everything that waits, on every communicator, with that error.
"""

from __future__ import annotations

from collections.abc import Callable

from fmi_client.errors import (
    Aborted,
    CollectiveMismatch,
    FmiError,
    RankFailed,
    RendezvousError,
)
from fmi_client.protocol.peer import COLLECTIVE, Inbox, Key
from fmi_client.protocol.peer import STAGE_BYTES as PEER_STAGE_BYTES
from fmi_client.protocol.rendezvous import JobAborted
from fmi_client.transport.link import Link
from fmi_client.transport.memory import STAGE_BYTES, MemoryLink

Allocate = Callable[[int], memoryview]
"""Makes a writable buffer of so many bytes."""


class Endpoint:
    """What all kinds of endpoint share: links, the running collectives, and failure."""

    def __init__(self, rank: int, size: int, allocate: Allocate) -> None:
        self.rank = rank
        self.size = size
        self.links: dict[int, Link] = {}
        self.failure: FmiError | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when the endpoint becomes ready or fails; set by the driver."""
        self._allocate = allocate
        self._running: dict[int, tuple[int, bytes]] = {}
        self._early: dict[tuple[int, int], tuple[int, bytes]] = {}

    # ---------------------------------------------------------------------- links
    def link(self, peer: int) -> Link:
        """Return the link with `peer`, which may still have to be made."""
        link = self.links.get(peer)
        if link is None:
            link = self.links[peer] = self._self_link() if peer == self.rank else self._make(peer)
        return link

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
        self._running[context] = (seq, signature)
        early = self._early.pop((context, seq), None)
        if early is not None and early[1] != signature:
            self.mismatch(early[0], signature, early[1], seq)

    def _unexpected(self, peer: int, key: Key, signature: bytes) -> None:
        kind, context, seq = key
        if kind != COLLECTIVE:
            return
        running = self._running.get(context, (-1, b""))
        if seq > running[0]:
            self._early.setdefault((context, seq), (peer, signature))
        elif seq == running[0] and signature != running[1]:
            self.mismatch(peer, running[1], signature, seq)

    def mismatch(self, peer: int, mine: bytes, theirs: bytes, seq: int) -> None:
        """Ranks called different things: end the job everywhere, saying who called what."""
        ours, others = mine.decode(errors="replace"), theirs.decode(errors="replace")
        details = f"rank {self.rank} called {ours}; rank {peer} called {others}"
        op = ours.split("(")[0]
        self.tell("mismatch", details, op, seq)
        self.fail(CollectiveMismatch(details=details, rank=self.rank, peer=peer, op=op, seq=seq))

    # -------------------------------------------------------------------- failure
    def tell(self, kind: str, reason: str, op: str | None = None, seq: int | None = None) -> None:
        """Let all other ranks of the job know that it is over, and why."""
        raise NotImplementedError

    def fail(self, error: FmiError) -> None:
        """End everything that waits, and everything later, with `error`."""
        if self.failure is not None:
            return
        self.failure = error
        for link in list(self.links.values()):
            link.abort(error)
        self.on_change()

    def told(self, event: JobAborted) -> None:
        """Another rank ended the job."""
        self.fail(_abort_error(event, self.rank))

    @property
    def left(self) -> bool:
        """Whether nothing is left to do after `leave`."""
        return True

    def leave(self) -> None:
        """Begin to leave in order: what was sent still arrives. `close` must follow."""
        for link in self.links.values():
            link.close()

    def close(self) -> None:
        """Give everything back."""


def _abort_error(event: JobAborted, rank: int) -> FmiError:
    if event.kind == "mismatch":
        return CollectiveMismatch(
            details=event.reason, rank=rank, peer=event.by, op=event.op, seq=event.seq
        )
    if event.by < 0:
        return RendezvousError(event.reason, rank=rank)
    return Aborted(by=event.by, reason=event.reason, rank=rank, op=event.op, seq=event.seq)


class MemoryEndpoint(Endpoint):
    """A rank of a job that lives in one process; see `communicator.memory_world`."""

    def __init__(
        self, rank: int, world: list[MemoryEndpoint], size: int, allocate: Allocate
    ) -> None:
        super().__init__(rank, size, allocate)
        self._world = world
        self._gone: dict[int, RankFailed] = {}

    def _make(self, peer: int) -> Link:
        other = self._world[peer]
        link = MemoryLink(peer, self._inbox(peer, STAGE_BYTES))
        back = MemoryLink(self.rank, other._inbox(self.rank, STAGE_BYTES))
        link.partner, back.partner = back, link
        other.links[self.rank] = back
        if peer in self._gone:
            link.abort(self._gone[peer])
        return link

    def tell(self, kind: str, reason: str, op: str | None = None, seq: int | None = None) -> None:
        for other in self._world:
            if other is not self:
                other.told(JobAborted(self.rank, kind, reason, op, seq))

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
