"""The links that a rank is making as the server told it: one attempt for each peer."""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial

from fmi_client.errors import AuthenticationFailed, FmiError
from fmi_client.join_request import JoinRequest
from fmi_client.protocol.addresses import Address
from fmi_client.protocol.peer import Handshake
from fmi_client.protocol.rendezvous import PunchNow
from fmi_client.protocol.tls import Pinned
from fmi_client.transport.link import SocketLink
from fmi_client.transport.lobby import Lobby
from fmi_client.transport.punch import Punch
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.sockets import bound_pair
from fmi_client.transport.tls import make_identity, pin

PUNCH_SECONDS = 10.0

REPLACE_SECONDS = 0.5
"""A connection that the peer has only to confirm gets so long, before a new attempt takes its
place because the peer asked for one."""

MAX_LEGS = 4
LEG_PAUSE = 0.5
"""A relay's leg that comes to nothing is tried again, so often and within so many seconds."""


class Punches:
    """The attempts, and the port and certificate that this rank makes links with.

    Args:
        server: returns where relay legs go.
        on_linked: given a link, and its connection as `SocketLink.attach` takes it.
        on_failed: given a link, and why there is no connection.
        ask: asks the server for a link with a peer once more.
    """

    def __init__(
        self,
        reactor: Reactor,
        request: JoinRequest,
        server: Callable[[], Address],
        *,
        on_linked: Callable[[SocketLink, socket.socket, str, bytes], None],
        on_failed: Callable[[SocketLink, FmiError], None],
        ask: Callable[[int], None],
    ) -> None:
        self._reactor = reactor
        self._request = request
        self._server = server
        self._on_linked = on_linked
        self._on_failed = on_failed
        self._ask = ask
        self._identity = make_identity() if request.tls else None
        self.under_way: dict[int, Punch] = {}
        self._told: dict[int, PunchNow] = {}
        """By peer, what the server said last."""
        self._refusals: Counter[int] = Counter()
        """Legs for each peer that came to nothing."""
        listeners = bound_pair(but=request.server[1])
        self.port: int = listeners[0].getsockname()[1]
        """The local port of everything that a NAT is to map alike."""
        self._lobby = Lobby(reactor, listeners, request.rank, self.under_way.get)

    @property
    def certificate(self) -> bytes:
        """What the peers are to be told, as DER; empty where nothing is encrypted."""
        return self._identity.certificate if self._identity is not None else b""

    def got(self, peer: int) -> int:
        """Return how many bytes of the link the peer had when the server told us to punch."""
        return self._told[peer].got

    def chosen(self, peer: int) -> bool:
        """Whether, for all we know, the link exists already for the peer."""
        punch = self.under_way.get(peer)
        return punch is not None and punch.chosen

    def begin(self, link: SocketLink, told: PunchNow) -> None:
        """Punch as the server has told us, if the link still waits for it."""
        if not link.pending:
            return
        peer = link.peer
        self._told[peer] = told
        if self.chosen(peer):
            old = self.under_way[peer]
            self._reactor.call_later(REPLACE_SECONDS, lambda: self._replace(old, link, told))
            return
        self.forget(peer)
        try:
            tls = self._pin(told)
        except AuthenticationFailed as error:
            link.fail(error.at(rank=self._request.rank, peer=peer))
            return
        punch = self.under_way[peer] = self._punch(link, told, tls)
        punch.start()
        self._lobby.call(punch)

    def again(self, link: SocketLink, error: FmiError) -> None:
        """Punch as last time, since that connection broke; `error` soon, if it is in vain."""
        self.begin(link, self._told[link.peer])
        self.under_way[link.peer].hurry(error)

    def _replace(self, old: Punch, link: SocketLink, told: PunchNow) -> None:
        if self.under_way.get(link.peer) is old:
            self.forget(link.peer)
            self.begin(link, told)

    def _pin(self, told: PunchNow) -> Pinned | None:
        """Return what to encrypt a link with, which must be encrypted or not as we are."""
        if self._identity is None:
            return None
        return pin(self._identity, told.certificate, server_side=self._request.rank > told.peer)

    def _punch(self, link: SocketLink, told: PunchNow, tls: Pinned | None) -> Punch:
        to = self._request
        return Punch(
            self._reactor,
            told,
            rank=to.rank,
            port=self.port,
            server=self._server(),
            channel=to.channel,
            seconds=PUNCH_SECONDS,
            new_handshake=partial(
                Handshake, to.rank, told.peer, to.epoch, to.key, told.cookie, to.job, tls
            ),
            on_linked=lambda *connection: self._linked(link, *connection),
            on_failed=lambda error: self._failed(link, error),
            on_refused=lambda: self._refused(told),
        )

    def _linked(self, link: SocketLink, sock: socket.socket, kind: str, first: bytes) -> None:
        del self.under_way[link.peer]
        self._on_linked(link, sock, kind, first)

    def _failed(self, link: SocketLink, error: FmiError) -> None:
        del self.under_way[link.peer]
        self._on_failed(link, error)

    def _refused(self, told: PunchNow) -> None:
        """A leg came to nothing: the server may have died that it reached, and not the job's."""

        def ask() -> None:
            if self._told.get(told.peer) is told and told.peer in self.under_way:
                self._ask(told.peer)

        self._refusals[told.peer] += 1
        if self._refusals[told.peer] <= MAX_LEGS:
            self._reactor.call_later(random.uniform(0, LEG_PAUSE), ask)

    def hurry(self, error: FmiError) -> None:
        """If nothing comes about soon, fail with `error`."""
        for punch in self.under_way.values():
            punch.hurry(error)

    def forget(self, peer: int) -> None:
        """Give up the attempt at this peer, if there is one."""
        punch = self.under_way.pop(peer, None)
        if punch is not None:
            punch.cancel()

    def close(self) -> None:
        """Give up all attempts, and let nobody in; harmless the second time."""
        for peer in list(self.under_way):
            self.forget(peer)
        self._lobby.close()
