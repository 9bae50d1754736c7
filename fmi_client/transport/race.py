"""Connecting to a server that has several addresses ("Happy Eyeballs", RFC 8305)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence

from fmi_client.protocol.addresses import Address
from fmi_client.transport.attempts import Attempts
from fmi_client.transport.reactor import Reactor, Timer

HEAD_START = 0.25
"""Seconds before the next address is tried beside one that does not answer (RFC 8305, 5)."""


class Race:
    """Tries one address after the other, without long waits; the first that answers wins.

    Args:
        addresses: in the order of preference.
        port: local port to bind.
        on_open: given the connected socket and where it leads.
        on_failed: given what each address answered, when none is left.
    """

    def __init__(
        self,
        reactor: Reactor,
        addresses: Sequence[Address],
        port: int,
        on_open: Callable[[socket.socket, Address], None],
        on_failed: Callable[[dict[Address, int]], None],
    ) -> None:
        self._reactor = reactor
        self._waiting = list(addresses)
        self._on_open = on_open
        self._on_failed = on_failed
        self._attempts = Attempts(reactor, port)
        self._failures: dict[Address, int] = {}
        self._timer: Timer | None = None

    def next(self) -> None:
        """Begin with the next address; the first call starts the race."""
        self._stop_timer()
        if not self._waiting:
            if not self._attempts:
                self._on_failed(self._failures)
            return
        address = self._waiting.pop(0)
        if self._waiting:
            self._timer = self._reactor.call_later(HEAD_START, self.next)
        self._try(address)

    def _try(self, address: Address) -> None:
        def opened(sock: socket.socket) -> None:
            self.cancel()
            self._on_open(sock, address)

        def failed(error: OSError) -> None:
            self._failures[address] = error.errno or errno.EAFNOSUPPORT
            self.next()

        self._attempts.begin(address, opened, failed)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def cancel(self) -> None:
        """Close what is still on its way."""
        self._stop_timer()
        self._waiting.clear()
        self._attempts.close()
