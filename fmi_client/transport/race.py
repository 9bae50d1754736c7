"""Connecting to a server that has several addresses ("Happy Eyeballs", RFC 8305)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence

from fmi_client.protocol.addresses import Address
from fmi_client.transport.reactor import Callback, Reactor, Timer
from fmi_client.transport.sockets import IN_PROGRESS, bound_socket, family

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
        self._port = port
        self._on_open = on_open
        self._on_failed = on_failed
        self._running: set[socket.socket] = set()
        self._failures: dict[Address, int] = {}
        self._timer: Timer | None = None

    def next(self) -> None:
        """Begin with the next address; the first call starts the race."""
        self._stop_timer()
        if not self._waiting:
            if not self._running:
                self._on_failed(self._failures)
            return
        address = self._waiting.pop(0)
        if self._waiting:
            self._timer = self._reactor.call_later(HEAD_START, self.next)
        self._try(address)

    def _try(self, address: Address) -> None:
        try:
            sock = bound_socket(self._port, family(address))
        except OSError as error:  # a machine without that version of IP
            self._fail(address, error.errno or errno.EAFNOSUPPORT)
            return
        code = sock.connect_ex(address)
        if code and code not in IN_PROGRESS:
            sock.close()
            self._fail(address, code)
            return
        self._running.add(sock)
        self._reactor.watch(sock, None, self._when_done(sock, address))

    def _when_done(self, sock: socket.socket, address: Address) -> Callback:
        def done() -> None:
            self._reactor.unwatch(sock)
            self._running.remove(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                sock.close()
                self._fail(address, code)
            else:
                self.cancel()
                self._on_open(sock, address)

        return done

    def _fail(self, address: Address, code: int) -> None:
        self._failures[address] = code
        self.next()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def cancel(self) -> None:
        """Close what is still on its way."""
        self._stop_timer()
        self._waiting.clear()
        for sock in self._running:
            self._reactor.unwatch(sock)
            sock.close()
        self._running.clear()
