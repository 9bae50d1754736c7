"""Attempts to connect, all from one local port."""

from __future__ import annotations

import socket
from collections.abc import Callable

from fmi_client.protocol.addresses import Address
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.sockets import (
    IN_PROGRESS,
    bound_socket,
    connect_short,
    family,
    system_error,
)


class Attempts:
    """What has begun and not ended; none of it blocks."""

    def __init__(self, reactor: Reactor, port: int) -> None:
        self._reactor = reactor
        self._port = port
        self._open: set[socket.socket] = set()

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self,
        address: Address,
        on_open: Callable[[socket.socket], None],
        on_error: Callable[[OSError], None],
        hops: int | None = None,
    ) -> socket.socket | None:
        """Connect to `address`; returns the socket while the outcome is open.

        Args:
            hops: after so many the first SYN dies; see `connect_short`.
        """
        try:
            sock = bound_socket(self._port, family(address))
        except OSError as error:  # a machine without that version of IP, say
            on_error(error)
            return None

        def ended(code: int) -> None:
            if code == 0:
                on_open(sock)
            else:
                sock.close()
                on_error(system_error(code))

        def connected() -> None:
            self._forget(sock)
            ended(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

        code = connect_short(sock, address, hops) if hops else sock.connect_ex(address)
        if code not in IN_PROGRESS:
            ended(code)
            return None
        self._open.add(sock)
        self._reactor.watch(sock, None, connected)
        return sock

    def goes_on(self, sock: socket.socket) -> bool:
        return sock in self._open

    def give_up(self, sock: socket.socket) -> None:
        self._forget(sock)
        sock.close()

    def _forget(self, sock: socket.socket) -> None:
        self._open.remove(sock)
        self._reactor.unwatch(sock)

    def close(self) -> None:
        for sock in list(self._open):
            self.give_up(sock)
