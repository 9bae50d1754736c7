"""Knocking: connections to a peer from the port that its NAT knows of, tried until one stands.

Where routers refuse, two sides that both knock may do so for ever: the refusal makes the NAT
that it passes forget that its own host knocked. So one side gives way. It sends SYNs that get
out of its own NATs but not as far as the router that would refuse them, and lets the other come.
"""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable

from fmi_client.protocol.addresses import Address, format_address, version
from fmi_client.transport.attempts import Attempts
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.sockets import RETRY, answers

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.25
"""Seconds between attempts at one address; jittered, so that two sides do not miss in step."""

RUNGS = (2, 3, 4)
"""Hops of the SYNs that only open our own NATs: behind one, two, or three of them."""

RUNG_SECONDS = 0.03
"""How long the peer has to come through an open door, beside two round trips."""

_NOT_THE_PEER = OSError(errno.ECONNRESET, "connected, but not to the peer")


class Knocking:
    """Attempts at each address of a peer until `stop`.

    Args:
        addresses: where it may be; of each IP version, the outermost first.
        port: local port to bind.
        gives_way: whether this side does, where routers refuse.
        on_open: given each socket that is connected, and where it leads.
    """

    def __init__(
        self,
        reactor: Reactor,
        addresses: tuple[Address, ...],
        port: int,
        *,
        gives_way: bool,
        on_open: Callable[[socket.socket, Address], None],
    ) -> None:
        self._reactor = reactor
        self._addresses = addresses
        self._gives_way = gives_way
        self._on_open = on_open
        self._attempts = Attempts(reactor, port)
        self._stopped = False
        outside = {version(each): each for each in reversed(addresses)}
        self._outside = frozenset(outside.values())
        """Of each IP version, the outermost address."""
        self.last_error = "no answer" if outside else "one has only IPv4, the other only IPv6"

    def start(self) -> None:
        for address in self._addresses:
            self._attempt(address, FIRST_PAUSE)

    def again(self, address: Address) -> None:
        """Who was reached there was not the peer, or has broken off."""
        self._retry(address, LONGEST_PAUSE, _NOT_THE_PEER)

    def stop(self) -> None:
        self._stopped = True
        self._attempts.close()

    def _attempt(self, address: Address, pause: float) -> None:
        began = self._reactor.now()

        def failed(error: OSError) -> None:
            refused = error.errno == errno.ECONNREFUSED and address in self._outside
            if not refused:
                self._retry(address, pause, error)
            elif self._gives_way and pause > FIRST_PAUSE:
                took = self._reactor.now() - began
                self._note(address, error)
                self._climb(address, list(RUNGS), 2 * took + RUNG_SECONDS)
            else:
                self._retry(address, min(pause, RUNG_SECONDS / 4), error)

        self._connect(address, failed)

    def _climb(self, address: Address, rungs: list[int], seconds: float) -> None:
        """Open our own NATs for the other side, with a SYN for each of `rungs`, its hops."""
        if not rungs:
            self._attempt(address, FIRST_PAUSE)
            return

        def further() -> None:
            self._climb(address, rungs[1:], seconds)

        def ended(error: OSError) -> None:
            # Over IPv6 we are told that the hops were too few: the doors are open nevertheless.
            told = error.errno == errno.EHOSTUNREACH
            self._reactor.call_later(seconds if told else 0.0, further)

        def give_up(sock: socket.socket) -> None:
            if self._attempts.goes_on(sock) and not answers(sock):
                self._attempts.give_up(sock)
                further()

        sock = self._connect(address, ended, rungs[0])
        if sock is not None:
            self._reactor.call_later(seconds, lambda: give_up(sock))

    def _connect(
        self, address: Address, on_error: Callable[[OSError], None], hops: int | None = None
    ) -> socket.socket | None:
        if self._stopped:
            return None
        return self._attempts.begin(
            address, lambda sock: self._on_open(sock, address), on_error, hops
        )

    def _note(self, address: Address, error: OSError) -> None:
        if address in self._outside:  # private ones may be anybody's
            self.last_error = f"{format_address(address)}: {error.strerror}"

    def _retry(self, address: Address, pause: float, error: OSError) -> None:
        self._note(address, error)
        if error.errno in RETRY and not self._stopped:
            later = min(2 * pause, LONGEST_PAUSE)
            wait = pause * random.uniform(0.5, 1.5)
            self._reactor.call_later(wait, lambda: self._attempt(address, later))
