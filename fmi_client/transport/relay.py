"""A rank's leg to the relay: a connection to the server that ends at the peer."""

from __future__ import annotations

import socket
from collections.abc import Callable

from fmi_client.protocol.addresses import Address
from fmi_client.protocol.relay import RELAY_FULL, RELAY_GO, relay_request
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.sockets import IN_PROGRESS, family, keep_alive, system_error


class Dial:
    """Opens a leg and waits for the peer's.

    Args:
        on_met: given the socket when the peer is at its other end.
        on_failed: given what the server does instead, as in "the server refuses to relay", and
            whether that is final for both ranks of the pair.
    """

    def __init__(
        self,
        reactor: Reactor,
        server: Address,
        ticket: bytes,
        on_met: Callable[[socket.socket], None],
        on_failed: Callable[[str, bool], None],
    ) -> None:
        self._reactor = reactor
        self._ticket = ticket
        self._on_met = on_met
        self._on_failed = on_failed
        # From any port: the one that we punch from has a connection to the server already.
        self._sock: socket.socket | None = socket.socket(
            family(server), socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        )
        code = self._sock.connect_ex(server)
        if code and code not in IN_PROGRESS:
            self._unreachable(system_error(code))
        else:
            reactor.watch(self._sock, None, self._connected)

    def _connected(self) -> None:
        sock = self._sock
        assert sock is not None
        keep_alive(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.send(relay_request(self._ticket))
        except OSError as error:
            self._unreachable(error)
            return
        self._reactor.watch(sock, self._read)

    def _read(self) -> None:
        sock = self._sock
        assert sock is not None
        try:
            answer = sock.recv(1)
        except BlockingIOError:
            return
        except OSError as error:
            self._unreachable(error)
            return
        if answer != RELAY_GO:
            if answer == RELAY_FULL:
                self._fail("relays no more pairs of this job (--relay-pairs)", final=True)
            else:
                self._fail("refuses to relay")
            return
        self._reactor.unwatch(sock)
        self._sock = None
        self._on_met(sock)

    def _unreachable(self, error: OSError) -> None:
        self._fail(f"cannot be asked to relay ({error.strerror})")

    def _fail(self, what: str, final: bool = False) -> None:
        self.cancel()
        self._on_failed(what, final)

    @property
    def waiting(self) -> bool:
        return self._sock is not None

    def cancel(self) -> None:
        """Give up the leg, if the peer has not come."""
        sock, self._sock = self._sock, None
        if sock is not None:
            self._reactor.unwatch(sock)
            sock.close()
