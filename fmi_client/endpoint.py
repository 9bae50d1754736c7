"""One rank's presence in a job: its links, its line to the server, and how it fails.

An endpoint knows nothing of collectives. Communicators (the job's, and those split from
it) share it; the drivers wait until what they posted on its links is done. When anything
ends the job, `fail` ends everything that waits, on every communicator, with that error.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from fmi_client.errors import (
    Aborted,
    CollectiveMismatch,
    FmiError,
    JoinTimeout,
    PunchFailed,
    RankFailed,
    RendezvousError,
)
from fmi_client.protocol import auth
from fmi_client.protocol.peer import COLLECTIVE, Inbox, Key
from fmi_client.protocol.peer import STAGE_BYTES as PEER_STAGE_BYTES
from fmi_client.protocol.rendezvous import (
    Address,
    Draining,
    Event,
    Gone,
    Hello,
    JobAborted,
    Missing,
    Punch,
    Ready,
    Want,
    Welcome,
)
from fmi_client.transport.control import Control
from fmi_client.transport.link import Link, SocketLink
from fmi_client.transport.memory import STAGE_BYTES, MemoryLink
from fmi_client.transport.punch import Lobby
from fmi_client.transport.punch import Punch as PunchAttempt
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.sockets import bound_socket

VERDICT_SECONDS = 1.0
"""A broken link means that somebody died, but not who: the neighbour may only have noticed
first. For so long the server's word is awaited before the neighbour is blamed."""

PUNCH_SECONDS = 10.0

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

    def close(self) -> None:
        """Leave in order; what was sent still arrives."""
        for link in self.links.values():
            link.close()


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

    def close(self) -> None:
        super().close()
        for other in self._world:
            other._gone[self.rank] = _left_error(self.rank)
            if other is not self and self.rank in other.links:
                other.links[self.rank].abort(other._gone[self.rank])

    def die(self) -> None:
        """Vanish as a killed process does: the others are told by nobody but the server."""
        for other in self._world:
            if other is not self:
                other.fail(RankFailed(f"rank {self.rank} was lost", rank=self.rank))


class SocketEndpoint(Endpoint):
    """A rank that joined through the rendezvous server.

    Args:
        server: the server's address, with the host resolved.
        key: the job's key, or None.
        token: what admits us to the server, or None.
    """

    def __init__(
        self,
        reactor: Reactor,
        server: Address,
        *,
        job: str,
        rank: int,
        size: int,
        epoch: int,
        key: bytes | None,
        token: auth.Token | None,
        allocate: Allocate,
    ) -> None:
        super().__init__(rank, size, allocate)
        self._reactor = reactor
        self._job = job
        self._epoch = epoch
        self._key = key
        self._token = token
        self.ready = False
        self.missing: list[int] | None = None
        """Ranks that had not joined when we asked; None before the answer."""
        self.observed: Address | None = None
        self._server = server
        self._left: set[int] = set()
        self._punches: dict[int, PunchAttempt] = {}
        self._lost_control: FmiError | None = None
        self._started = time.monotonic()
        self.join_seconds = 0.0
        listener = bound_socket(0)
        self._port: int = listener.getsockname()[1]
        self._lobby = Lobby(reactor, listener, rank, self._punches.get)
        self._control = Control(
            reactor, server, self._port, token, self._hello, self._on_event, self._on_lost
        )

    def connect(self) -> None:
        """Begin to join; `on_change` is called when all ranks are there, or on failure."""
        self._control.connect()

    def _hello(self, local: Address) -> Hello:
        return Hello(
            job=self._job,
            size=self.size,
            rank=self.rank,
            epoch=self._epoch,
            expires=self._token.expires if self._token else 0,
            candidates=(local,),
            nonce=auth.nonce(),
        )

    def ask_missing(self) -> None:
        """Ask the server who has not come; `missing` holds the answer."""
        if self._control.side is not None and self.observed is not None:
            self._control.side.who()
            self._control.flush()

    def join_error(self, timeout: float) -> FmiError:
        """Return what to raise when `timeout` seconds were not enough."""
        where = f"{self._server[0]}:{self._server[1]}"
        if self.observed is None:
            return RendezvousError(
                f"cannot join through the rendezvous server {where} within {timeout:.3g} s "
                f"({self._control.last_error}); is it running, and is the address right?",
                rank=self.rank,
                op="connect",
            )
        missing = self.missing or []
        return JoinTimeout(
            f"job {self._job!r}: {len(missing) or 'some'} of {self.size} ranks did not join "
            f"within {timeout:.3g} s{': ' + _some(missing) if missing else ''}",
            missing=missing,
            rank=self.rank,
            op="connect",
        )

    # ------------------------------------------------------------- the server's word
    def _on_event(self, event: Event) -> None:
        match event:
            case Welcome(observed):
                self.observed = observed
            case Ready():
                self.ready = True
                self.join_seconds = time.monotonic() - self._started
                self.on_change()
            case Missing(ranks):
                self.missing = ranks
                self.on_change()
            case Want(peer) if peer not in self.links and 0 <= peer < self.size:
                self.link(peer)
            case Punch():
                self._punch(event)
            case Gone():
                self._gone(event)
            case JobAborted():
                self.told(event)
            case Draining() | Want():
                pass

    def _on_lost(self, error: FmiError) -> None:
        """Links that exist live on without the server; a job that is not complete cannot."""
        self._lost_control = error.at(rank=self.rank, op=None if self.ready else "connect")
        if not self.ready:
            self.fail(self._lost_control)
            return
        for link in list(self.links.values()):
            if link.kind == "pending" and link.peer not in self._punches:
                link.abort(self._lost_control)

    def _gone(self, gone: Gone) -> None:
        if not gone.clean:
            self.fail(RankFailed(f"rank {gone.rank} was lost: {gone.why}", rank=gone.rank))
            return
        self._left.add(gone.rank)
        link = self.links.get(gone.rank)
        if link is not None and (link.kind == "pending" or getattr(link, "lost", False)):
            link.abort(_left_error(gone.rank))

    # ---------------------------------------------------------------------- links
    def _make(self, peer: int) -> SocketLink:
        link = SocketLink(peer, self._reactor, self._inbox(peer, hold=True), self._link_lost)
        if peer in self._left:
            link.abort(_left_error(peer))
        elif self._lost_control is not None:
            link.abort(self._lost_control)
        elif self._control.side is not None:
            self._control.side.link(peer)
            self._control.flush()
        return link

    def _punch(self, instruction: Punch) -> None:
        peer = instruction.peer
        link = self.links.get(peer)
        if not isinstance(link, SocketLink) or link.kind != "pending" or peer in self._punches:
            return
        punch = PunchAttempt(
            self._reactor,
            instruction,
            rank=self.rank,
            epoch=self._epoch,
            key=self._key,
            port=self._port,
            seconds=PUNCH_SECONDS,
            on_linked=lambda sock, first: self._linked(link, sock, first),
            on_failed=lambda error: self._unlinked(link, error),
        )
        self._punches[peer] = punch
        punch.start()
        self._lobby.call(punch)

    def _linked(self, link: SocketLink, sock: socket.socket, first: bytes) -> None:
        del self._punches[link.peer]
        link.attach(sock, "direct", first)

    def _unlinked(self, link: SocketLink, error: PunchFailed) -> None:
        del self._punches[link.peer]
        link.abort(error)

    def _link_lost(self, link: SocketLink) -> None:
        """A link broke: wait for the server to say who died before blaming the neighbour."""
        if link.peer in self._left:
            link.fail(_left_error(link.peer))
        elif self._lost_control is not None:
            self._blame(link)
        else:
            self._reactor.call_later(VERDICT_SECONDS, lambda: self._blame(link))

    def _blame(self, link: SocketLink) -> None:
        if link.error is None:
            because = link.lost_because
            link.fail(RankFailed(f"the link to rank {link.peer} broke: {because}", rank=link.peer))

    # --------------------------------------------------------------------- ending
    def tell(self, kind: str, reason: str, op: str | None = None, seq: int | None = None) -> None:
        if self._control.side is not None:
            self._control.side.abort(kind, reason, op, seq)
            self._control.flush()

    def close(self) -> None:
        if self._control.side is not None:
            self._control.side.leave()
        super().close()
        for punch in self._punches.values():
            punch.cancel()
        self._lobby.close()
        self._control.close()


def _left_error(peer: int) -> RankFailed:
    return RankFailed(f"rank {peer} has left the job, but is needed", rank=peer)


def _some(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:10]))
    return f"{shown}, …" if len(ranks) > 10 else shown


def resolve(host: str, port: int) -> Address:
    """Look up an IPv4 address; blocking.

    Raises:
        RendezvousError: there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise RendezvousError(f"cannot resolve {host!r}: {error.strerror}", op="connect") from None
    ip, resolved_port = found[0][4][:2]
    return str(ip), int(resolved_port)


def from_environment(key: bytes | str | None, token: str | None) -> tuple[bytes | None, str | None]:
    """Fill in what the caller left out from FMI_KEY and FMI_TOKEN."""
    key = key if key is not None else os.environ.get("FMI_KEY") or None
    return auth.parse_key(key), token or os.environ.get("FMI_TOKEN") or None
