"""Joining a job through the rendezvous server, and staying in it."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from fmi_client.endpoint import MAX_SECONDS, Allocate, Endpoint, left_error, some_ranks
from fmi_client.errors import FmiError, JoinTimeout, RankFailed, RendezvousError
from fmi_client.hints import HINTS, Choice, settle
from fmi_client.protocol import auth
from fmi_client.protocol.addresses import Address, format_address, plain, version
from fmi_client.protocol.hello import MAX_JOB_NAME, MAX_SIZE, Hello
from fmi_client.protocol.rendezvous import (
    Draining,
    Event,
    Gone,
    JobAborted,
    Missing,
    Punch,
    Ready,
    Want,
    Welcome,
)
from fmi_client.transport.control import Control
from fmi_client.transport.link import SocketLink
from fmi_client.transport.lobby import Lobby
from fmi_client.transport.pulse import CHECK_SECONDS
from fmi_client.transport.punch import Punch as PunchAttempt
from fmi_client.transport.reactor import Reactor, Timer
from fmi_client.transport.sockets import bound_pair, parse_endpoint
from fmi_client.transport.store import parse_store

VERDICT_SECONDS = 1.0
"""A broken link means that somebody died, but not who: the neighbour may only have noticed
first. For so long the server's word is awaited before the neighbour is blamed."""

PUNCH_SECONDS = 10.0

MISSING_SECONDS = 0.5
"""How long the server may take to say who is missing. It is asked before the deadline: ranks
that give up at the same moment would otherwise name each other."""

MAX_SERVERS = 8
"""Addresses of the server that are tried: each may cost a moment."""

NOWHERE = ("", 0)
"""The server of a job that has none."""

CHANNELS = ("auto", "direct", "relay", "object")

LEAVE_SECONDS = 0.5
"""How long the server may take to hear our goodbye."""


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """What `connect` was asked for, checked."""

    server: Address
    job: str
    rank: int
    size: int
    epoch: int
    timeout: float
    key: bytes | None = field(repr=False)
    token: auth.Token | None = field(repr=False)
    channel: str = "auto"
    store: str = ""

    @classmethod
    def make(
        cls,
        server: str | None,
        job: str,
        rank: int,
        size: int,
        key: bytes | str | None,
        token: str | None,
        epoch: int,
        timeout: float,
        channel: str | Choice = "auto",
        store: str | None = None,
    ) -> Self:
        """Check the arguments; key and token default to FMI_KEY and FMI_TOKEN.

        Raises:
            ValueError: the text names the argument.
        """
        if not 1 <= len(job) <= MAX_JOB_NAME:
            raise ValueError(f"job must be a name of 1 to {MAX_JOB_NAME} characters")
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"size={size}: a job has 1 to {MAX_SIZE} ranks")
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank} is not a rank of a job of {size}: 0 … {size - 1}")
        if not 0 <= epoch < 2**31:
            raise ValueError(f"epoch={epoch} is not from 0 to 2**31 - 1")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout} s: joining needs a positive, finite time")
        channel, server, store = settle(channel, server, store, size)
        _check_channel(channel, server, store)
        key = key if key is not None else os.environ.get("FMI_KEY") or None
        token = token or os.environ.get("FMI_TOKEN") or None
        return cls(
            parse_endpoint(server) if server is not None else NOWHERE,
            job,
            int(rank),
            int(size),
            int(epoch),
            min(float(timeout), MAX_SECONDS),
            auth.parse_key(key),
            auth.Token.parse(token) if token else None,
            channel,
            store or "",
        )

    def not_all_came(self, missing: list[int]) -> JoinTimeout:
        """Return what to raise when the time was not enough for `missing`; none: unknown ranks."""
        who = f": {some_ranks(missing)}" if missing else ""
        return JoinTimeout(
            f"job {self.job!r}: {len(missing) or 'some'} of {self.size} ranks "
            f"did not join within {self.timeout:.3g} s{who}",
            missing=missing,
            rank=self.rank,
            op="connect",
        )

    def hello(self, own: tuple[Address, ...]) -> Hello:
        """Return what the server is told, with a nonce made now: a snapshot has no old one."""
        expires = self.token.expires if self.token else 0
        return Hello(self.job, self.size, self.rank, self.epoch, expires, own, auth.nonce())


def _check_channel(channel: str, server: str | None, store: str | None) -> None:
    if channel not in CHANNELS:
        raise ValueError(f"channel={channel!r} is none of {', '.join(CHANNELS + HINTS)}")
    if channel == "object":
        parse_store(store or "")
    elif store is not None:
        raise ValueError(f"store={store!r} is for channel='object' or a hint only")
    elif server is None:
        raise ValueError(f"channel={channel!r} needs a server")


class SocketEndpoint(Endpoint):
    """A rank that joins through the rendezvous server.

    Args:
        servers: addresses of the rendezvous server, from `resolve`.
        request: what to join, and as whom.
    """

    def __init__(
        self,
        reactor: Reactor,
        servers: tuple[Address, ...],
        request: JoinRequest,
        allocate: Allocate,
    ) -> None:
        super().__init__(request.rank, request.size, allocate)
        self._reactor = reactor
        self._request = request
        self.missing: list[int] | None = None
        """Ranks that had not joined when we asked; None before the answer."""
        self.join_seconds = 0.0
        self.local: Address | None = None
        """Our end of the connection to the server, once there is one."""
        self.observed: Address | None = None
        """Where the server sees us, once it has let us in."""
        self._left: set[int] = set()
        self._leaving = False
        self._punches: dict[int, PunchAttempt] = {}
        self._told: dict[int, Punch] = {}
        self._lost_control: FmiError | None = None
        self._checks: Timer | None = None
        self._started = reactor.now()
        listeners = bound_pair(but=request.server[1])
        self._port: int = listeners[0].getsockname()[1]
        self._lobby = Lobby(reactor, listeners, request.rank, self._punches.get)
        self._control = Control(
            reactor,
            servers,
            self._port,
            request.token,
            self._hello,
            self._on_event,
            self._on_lost,
        )

    @property
    def ready(self) -> bool:
        """Whether all ranks of the job are there."""
        return self._control.joined

    @property
    def settled(self) -> bool:
        """Whether joining has ended, well or not."""
        return self.ready or self.failure is not None

    def connect(self) -> None:
        """Begin to join; `on_change` is called when it is `settled`."""
        self._control.connect()

    def ask_missing(self) -> None:
        """Ask the server who has not come; `missing` holds the answer."""
        if self._control.side is not None and self._control.welcomed:
            self._control.side.who()
            self._control.flush()

    def join_error(self) -> FmiError:
        """Return what to raise when the time for joining was not enough."""
        timeout, where = self._request.timeout, format_address(self._request.server)
        if not self._control.welcomed:
            return RendezvousError(
                f"cannot join through the rendezvous server {where} within {timeout:.3g} s "
                f"({self._control.last_error}); is it running, and is the address right?",
                rank=self.rank,
                op="connect",
            )
        return self._request.not_all_came(self.missing or [])

    # ------------------------------------------------------------- the server's word
    def _hello(self, own: tuple[Address, ...]) -> Hello:
        self.local = own[0]
        return self._request.hello(own)

    def _on_event(self, event: Event) -> None:
        match event:
            case Welcome(seen):
                self.observed = seen
            case Ready():
                self.join_seconds = self._reactor.now() - self._started
                self._check_links()
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
        if self._leaving:
            self.on_change()
            return
        self._lost_control = error.at(rank=self.rank, op=None if self.ready else "connect")
        if not self.ready:
            self.fail(self._lost_control)
            return
        for link in list(self.links.values()):
            if isinstance(link, SocketLink) and link.pending and link.peer not in self._punches:
                link.fail(self._lost_control)
        for punch in self._punches.values():
            punch.hurry(self._lost_control)

    def _gone(self, gone: Gone) -> None:
        if not gone.clean:
            self.fail(RankFailed(f"rank {gone.rank} was lost: {gone.why}", rank=gone.rank))
            return
        self._left.add(gone.rank)
        link = self.links.get(gone.rank)
        if not isinstance(link, SocketLink):
            return
        if link.lost:
            link.fail(left_error(gone.rank))
            return
        punch = self._punches.get(gone.rank)
        if punch is not None and punch.chosen:
            # For the peer the link exists: it may have sent all that we need before it left.
            self._reactor.call_later(VERDICT_SECONDS, lambda: self._never_linked(link))
        else:
            self._never_linked(link)

    def _never_linked(self, link: SocketLink) -> None:
        if link.pending:
            self._forget_punch(link.peer)
            link.fail(left_error(link.peer))

    def _forget_punch(self, peer: int) -> None:
        punch = self._punches.pop(peer, None)
        if punch is not None:
            punch.cancel()

    # ---------------------------------------------------------------------- links
    def _make(self, peer: int) -> SocketLink:
        link = SocketLink(peer, self._reactor, self._inbox(peer, hold=True), self._link_lost)
        if peer in self._left:
            link.fail(left_error(peer))
        elif self._lost_control is not None:
            link.fail(self._lost_control)
        elif self._control.side is not None:
            self._control.side.link(peer)
            self._control.flush()
        return link

    def _punch(self, instruction: Punch) -> None:
        peer = instruction.peer
        link = self.links.get(peer)
        if not isinstance(link, SocketLink) or not link.pending or peer in self._punches:
            return
        self._told[peer] = instruction
        punch = PunchAttempt(
            self._reactor,
            instruction,
            job=self._request.job,
            rank=self.rank,
            epoch=self._request.epoch,
            key=self._request.key,
            port=self._port,
            server=self._control.server,
            seconds=PUNCH_SECONDS,
            on_linked=lambda sock, kind, first: self._linked(link, sock, kind, first),
            on_failed=lambda error: self._unlinked(link, error),
            channel=self._request.channel,
        )
        self._punches[peer] = punch
        punch.start()
        self._lobby.call(punch)

    def _linked(self, link: SocketLink, sock: socket.socket, kind: str, first: bytes) -> None:
        del self._punches[link.peer]
        link.attach(sock, kind, first)

    def _unlinked(self, link: SocketLink, error: FmiError) -> None:
        del self._punches[link.peer]
        link.fail(error)

    def excuse(self, peer: int) -> FmiError | None:
        punch = self._punches.get(peer)
        return punch.error() if punch is not None and not punch.connected else None

    def _check_links(self) -> None:
        """Every second: notice a link that leads nowhere any more."""
        for link in list(self.links.values()):
            if isinstance(link, SocketLink):
                link.check()
        self._checks = self._reactor.call_later(CHECK_SECONDS, self._check_links)

    def _link_lost(self, link: SocketLink) -> None:
        """A link broke: wait for the server to say who died before blaming the neighbour."""
        if link.peer in self._left:
            link.fail(left_error(link.peer))
        elif self._lost_control is not None:
            self._blame(link)
        elif link.revive():
            self._punch(self._told[link.peer])
            self._punches[link.peer].hurry(broken_error(link))
        else:
            self._reactor.call_later(VERDICT_SECONDS, lambda: self._blame(link))

    def _blame(self, link: SocketLink) -> None:
        if link.kind == "relay" and self._lost_control is not None:
            link.fail(self._lost_control)  # it led through the server
        elif link.error is None:
            link.fail(broken_error(link))

    # --------------------------------------------------------------------- ending
    def tell(self, event: JobAborted) -> None:
        if self._control.side is not None:
            self._control.side.abort(event)
            self._control.flush()

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._reactor.call_later(seconds, call)

    @property
    def left(self) -> bool:
        return self._control.closed

    def leave(self) -> None:
        if self._leaving:
            return
        self._leaving = True
        # First, or a handshake that ends just now would make a link that nobody closes.
        for peer in list(self._punches):
            self._forget_punch(peer)
        self._lobby.close()
        super().leave()
        self._control.leave()

    def close(self) -> None:
        if self._checks is not None:
            self._checks.cancel()
        self._lobby.close()
        self._control.close()
        super().close()


def broken_error(link: SocketLink) -> RankFailed:
    return RankFailed(f"the link to rank {link.peer} broke: {link.lost_because}", rank=link.peer)


def ask_before(timeout: float) -> float:
    """Return how many seconds before the end of `timeout` to ask who is missing."""
    return min(MISSING_SECONDS, timeout / 4)


def resolve(host: str, port: int) -> tuple[Address, ...]:
    """Look up the addresses of a host, those of IPv4 first; blocking.

    Only IPv4 has NATs, and only the server can tell us what they make of our address.

    Raises:
        RendezvousError: there is no such host.
    """
    with contextlib.suppress(ValueError):
        return ((plain(host), port),)
    flags = socket.AI_ADDRCONFIG  # what we have no addresses for is not looked up
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:
        raise RendezvousError(f"cannot resolve {host!r}: {error.strerror}", op="connect") from None
    addresses = dict.fromkeys((str(name[0]), int(name[1])) for *_, name in found)
    return tuple(sorted(addresses, key=version))[:MAX_SERVERS]
