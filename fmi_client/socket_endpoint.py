"""A rank that joins through the rendezvous server, and stays in its job.

Who makes its connections is `punches`; what is here is when to ask for a link, whom to blame when
one breaks, and what waits while there is no server.
"""

from __future__ import annotations

import socket
from dataclasses import replace

from fmi_client.endpoint import Allocate, left_error
from fmi_client.errors import AuthenticationFailed, FmiError, RankFailed, RendezvousError
from fmi_client.join_request import JoinRequest
from fmi_client.joining import Joining
from fmi_client.protocol.addresses import Address, format_address
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.notice import Notice
from fmi_client.protocol.rendezvous import (
    LEFT,
    REJOIN_SECONDS,
    Draining,
    Event,
    Gone,
    Missing,
    PunchNow,
    Ready,
    Want,
    Welcome,
)
from fmi_client.punches import Punches
from fmi_client.transport.control import Control
from fmi_client.transport.link import SocketLink
from fmi_client.transport.patience import Patience
from fmi_client.transport.pulse import CHECK_SECONDS
from fmi_client.transport.reactor import Reactor, Timer
from fmi_client.transport.tls import server_trust

VERDICT_SECONDS = 1.0
"""A broken link means that somebody died, but not who: the neighbour may only have noticed
first. For so long the server's word is awaited before the neighbour is blamed."""


class SocketEndpoint(Joining):
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
        super().__init__(reactor, request, allocate)
        self.missing: list[int] | None = None
        """Ranks that had not joined when we asked; None before the answer."""
        self.local: Address | None = None
        """Our end of the connection to the server, once there is one."""
        self.observed: Address | None = None
        """Where the server sees us, once it has let us in."""
        self._peers: dict[int, SocketLink] = {}
        """All links but the one with ourselves."""
        self._asked: set[int] = set()
        """Peers for a link with which the server has been asked, and has not answered yet."""
        self._away: FmiError | None = None
        """Why there is no server just now; another is looked for."""
        self._patience = Patience(reactor, self._nobody_came)
        self._untold: list[Notice] = []
        """What the next server is to pass on."""
        self._relayed: dict[int, int] = {}
        """The servers that were lost before each relayed link was made."""
        self._lost_control: FmiError | None = None
        """Why no link can be made: for good, or until a server is found after all."""
        self._checks: Timer | None = None
        trust = (server_trust(), request.server[0]) if request.tls else None
        self._punches = Punches(
            reactor,
            request,
            lambda: self._control.server,
            on_linked=self._linked,
            on_failed=self._unlinked,
            ask=self._ask,
        )
        self._control = Control(
            reactor,
            servers,
            self._punches.port,
            request.token,
            self._hello,
            self._on_event,
            self._on_away,
            self._on_lost,
            trust,
        )

    @property
    def ready(self) -> bool:
        return self._control.joined

    def connect(self) -> None:
        self._control.connect()

    def ask_missing(self) -> None:
        if self._control.side is not None and self._control.welcomed:
            self._control.side.who()
            self._control.flush()

    def join_error(self) -> FmiError:
        timeout, where = self._request.timeout, format_address(self._request.server)
        if self._control.sent_away is not None:
            return self._control.sent_away.at(rank=self.rank, op="connect")
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
        return replace(self._request.hello(own), certificate=self._punches.certificate)

    def _on_event(self, event: Event) -> None:
        match event:
            case Welcome(seen):
                self.observed = seen
            case Ready() if self.join_seconds:
                self._rejoined()
            case Ready():
                self._check_links()
                self._joined()
            case Missing(ranks):
                self.missing = ranks
                self.on_change()
            case Want(peer) if 0 <= peer < self.size:
                self._wanted(peer)
            case PunchNow():
                self._punch(event)
            case Gone():
                self._note_gone(event)
            case Notice(by=by) if by == self.rank:
                super()._called()  # the server lets us call the roll
            case Notice():
                self.told(event)
            case Draining() | Want():
                pass

    def _on_lost(self, error: FmiError) -> None:
        """Links that exist live on without the server; a job that is not complete cannot."""
        if self._leaving:
            self.on_change()
            return
        error.at(rank=self.rank, op=None if self.ready else "connect")
        if self.ready:
            self._wait_no_more(error)
        else:
            self._lost_control = error
            self.fail(error)

    def _on_away(self, error: FmiError) -> None:
        """The server is lost, and another is looked for: who needs one waits."""
        self._away = error.at(rank=self.rank)
        self._asked.clear()
        self._patience.end()
        for link in self._peers.values():
            if self._lost_with_server(link):
                self._blame(link)
        if self.failure is not None and not self._untold:
            self._control.close()  # the server ended the job, or nothing is left to be said
        else:
            self._patience.begin(REJOIN_SECONDS)

    def _nobody_came(self) -> None:
        assert self._away is not None
        why = f"{self._away.message}, and no other came within {REJOIN_SECONDS:.3g} s"
        last = self._control.last_error
        self._wait_no_more(RendezvousError(f"{why}; the last attempt: {last}", rank=self.rank))

    def _wait_no_more(self, error: FmiError) -> None:
        """No link can be made, unless its connection is on the way already."""
        self._lost_control = error
        self._patience.end()
        for link in self._pending():
            if link.peer not in self._punches.under_way:
                link.fail(error)
        self._punches.hurry(error)

    def _rejoined(self) -> None:
        """There is a server again. It knows nothing of what the last one was asked for."""
        self._away = self._lost_control = None
        self._patience.end()
        untold, self._untold = self._untold, []
        for notice in untold:
            self.tell(notice)
        for link in self._pending():
            self._ask(link.peer)

    def _pending(self) -> list[SocketLink]:
        return [link for link in self._peers.values() if link.pending]

    def _note_gone(self, gone: Gone) -> None:
        if not gone.clean:
            self.fail(RankFailed(f"rank {gone.rank} was lost: {gone.why}", rank=gone.rank))
            return
        error = RankFailed(f"rank {gone.rank} {gone.why}", rank=gone.rank)
        self._gone[gone.rank] = left_error(gone.rank) if gone.why == LEFT else error
        link = self._peers.get(gone.rank)
        if link is None:
            return
        if link.lost:
            link.fail(self._gone[gone.rank].fresh())
        elif self._punches.chosen(gone.rank):
            # The peer may have sent all that we need before it left.
            self._reactor.call_later(VERDICT_SECONDS, lambda: self._never_linked(link))
        else:
            self._never_linked(link)

    def _never_linked(self, link: SocketLink) -> None:
        if link.pending:
            self._punches.forget(link.peer)
            link.fail(self._gone[link.peer].fresh())

    # ---------------------------------------------------------------------- links
    def _make(self, peer: int) -> SocketLink:
        link = SocketLink(peer, self._reactor, self._inbox(peer, hold=True), self._link_lost)
        self._peers[peer] = link
        if peer in self._gone:
            link.fail(self._gone[peer].fresh())
        elif self._lost_control is None:
            self._ask(peer)
        elif self._control.trying:
            self._patience.begin()
        else:
            link.fail(self._lost_control)
        return link

    def _ask(self, peer: int) -> None:
        """Ask for a link; where there is no server, that is done when there is one."""
        if self._control.present and self._control.side is not None:
            link = self._peers.get(peer)
            got = link.received if link is not None and link.suspended else 0
            self._asked.add(peer)
            self._control.side.link(peer, got)
            self._control.flush()

    def _wanted(self, peer: int) -> None:
        link = self._peers.get(peer)
        if link is None:
            self._gone.pop(peer, None)  # it came back so late that we had given it up
            self.link(peer)
        elif isinstance(link.error, FmiError):
            self.give_up(link.error)  # the peer would wait for it in vain
        elif link.pending and peer not in self._asked:
            self._ask(peer)  # it has lost what it was told, so our own punch is in vain

    def _punch(self, told: PunchNow) -> None:
        self._asked.discard(told.peer)
        link = self._peers.get(told.peer)
        if link is not None:
            self._punches.begin(link, told)

    def _linked(self, link: SocketLink, sock: socket.socket, kind: str, first: bytes) -> None:
        if link.suspended and not link.resume(self._punches.got(link.peer)):
            sock.close()
            self.give_up(relay_error(link))
            return
        self._relayed[link.peer] = self._control.losses
        link.attach(sock, kind, first)

    def _unlinked(self, link: SocketLink, error: FmiError) -> None:
        looks = self._away is not None and self._lost_control is None
        # With a server's next word there may be another attempt.
        waits = looks or link.peer in self._asked
        if not waits or isinstance(error, AuthenticationFailed):
            link.fail(error)

    def look(self) -> bool:
        """Whether the server is about to be found again.

        Who only polls must wait for that: a poll is one step of the handshake, and the server
        does not wait for the next poll.
        """
        return self.ready and self.failure is None and self._control.trying

    def excuse(self, peer: int) -> FmiError | None:
        punch, link = self._punches.under_way.get(peer), self._peers.get(peer)
        if punch is not None and not punch.connected:
            return punch.error()
        if self._away is None or link is None or not link.pending:
            return None
        return self._lost_control or self._away

    def _check_links(self) -> None:
        """Every second: notice a link that leads nowhere any more."""
        for link in list(self._peers.values()):
            link.check()
        self._checks = self._reactor.call_later(CHECK_SECONDS, self._check_links)

    def _link_lost(self, link: SocketLink) -> None:
        """A link broke: wait for the server to say who died before blaming the neighbour."""
        if link.peer in self._gone:
            link.fail(self._gone[link.peer].fresh())
        elif self._lost_control is not None or self._lost_with_server(link):
            self._blame(link)
        elif link.kind == "direct" and link.revive():
            self._asked.discard(link.peer)
            self._punches.again(link, broken_error(link))
        else:
            self._reactor.call_later(VERDICT_SECONDS, lambda: self._blame(link))

    def _lost_with_server(self, link: SocketLink) -> bool:
        now = self._control.losses
        return link.kind == "relay" and (self._relayed[link.peer] < now or self._control.closed)

    def _blame(self, link: SocketLink) -> None:
        if not link.lost:
            return  # it has another connection by now, or waits for one
        if link.kind == "relay" and link.error is None:
            link.suspend()  # the peer lives: it was the relay's end, or that of the way to it
            if self._lost_control is not None:
                link.fail(self._lost_control)
            else:
                self._ask(link.peer)
        elif link.error is None:
            link.fail(broken_error(link))

    # --------------------------------------------------------------------- ending
    def tell(self, notice: Notice) -> None:
        if self._control.welcomed and self._control.side is not None:
            self._control.side.tell(notice)
            self._control.flush()
        elif self.ready and not self._control.closed:
            self._untold.append(notice)

    def _called(self) -> None:
        """Not yet: the server lets the first do so, which hears its own call (`_on_event`)."""

    @property
    def left(self) -> bool:
        return self._control.closed

    def leave(self) -> None:
        if self._leaving:
            return
        self._leaving = True
        # First, or a handshake that ends just now would make a link that nobody closes.
        self._punches.close()
        super().leave()
        self._control.leave()

    def close(self) -> None:
        if self._checks is not None:
            self._checks.cancel()
        self._punches.close()
        self._control.close()
        super().close()


def broken_error(link: SocketLink) -> RankFailed:
    """Return the error of a peer whose direct link broke."""
    why = getattr(link.lost_because, "strerror", None) or link.lost_because
    return RankFailed(f"the link to rank {link.peer} broke: {why}", rank=link.peer)


def relay_error(link: SocketLink) -> RendezvousError:
    """Return the error of a link that broke with the server that relayed it."""
    return RendezvousError(
        f"the connection to the server was lost that relayed the link to rank {link.peer}, "
        "and with it data that is not kept; the job has to start anew",
        peer=link.peer,
    )
