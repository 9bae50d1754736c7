"""A rank's listeners: who comes in says whom it claims to be, and is led to the punch."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from functools import partial

from fmi_client.errors import ProtocolError
from fmi_client.protocol.peer import HELLO_BYTES, read_hello
from fmi_client.transport.punch import Punch
from fmi_client.transport.reactor import Reactor

LOBBY_SECONDS = 5.0
"""How long a caller may take to say who it is, or wait for the server to announce it."""

LOBBY_SEATS = 128
"""Callers at once; one more takes the place of the oldest. The peer says at once who it is: it
needs a seat for a moment only, and nobody can keep it out by sitting there."""

SHORTAGE_SECONDS = 0.1
"""How long nobody is let in after there was no descriptor for a caller."""


class Lobby:
    """The listeners: callers wait here until they said which rank they claim to be.

    Args:
        find: returns the punch that expects a caller of this rank, or None.
    """

    def __init__(
        self,
        reactor: Reactor,
        listeners: list[socket.socket],
        rank: int,
        find: Callable[[int], Punch | None],
    ) -> None:
        self._reactor = reactor
        self._listeners = listeners
        self._rank = rank
        self._find = find
        self._callers: dict[socket.socket, bytes] = {}
        """Who is here, the oldest first, and what it has said."""
        for listener in listeners:
            listener.listen(LOBBY_SEATS)
            self._open(listener)

    def _open(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._reactor.watch(listener, partial(self._accept, listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:  # mostly because the caller has gone
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # It stays in the queue, and would call us again at once, for ever.
                self._reactor.unwatch(listener)
                self._reactor.call_later(SHORTAGE_SECONDS, lambda: self._open(listener))
            return
        if len(self._callers) >= LOBBY_SEATS:
            self._dismiss(next(iter(self._callers)))
        sock.setblocking(False)
        self._callers[sock] = b""
        self._reactor.watch(sock, lambda: self._read(sock))
        self._reactor.call_later(LOBBY_SECONDS, lambda: self._dismiss(sock))

    def _read(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(HELLO_BYTES - len(self._callers[sock]))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        hello = self._callers[sock] + data
        if not data:
            self._dismiss(sock)
        elif len(hello) < HELLO_BYTES:
            self._callers[sock] = hello
        else:
            self._introduce(sock, hello)

    def _introduce(self, sock: socket.socket, hello: bytes) -> None:
        try:
            caller = read_hello(hello)
        except ProtocolError:
            self._dismiss(sock)
            return
        if caller.receiver != self._rank or caller.sender == self._rank:
            self._dismiss(sock)
            return
        punch = self._find(caller.sender)
        self._reactor.unwatch(sock)
        if punch is None:
            # The server told the peer first; our own instruction is under way.
            self._callers[sock] = hello
            return
        del self._callers[sock]
        punch.adopt(sock, hello)

    def call(self, punch: Punch) -> None:
        """A punch began: hand over the callers that came early."""
        for sock, hello in list(self._callers.items()):
            if len(hello) == HELLO_BYTES and read_hello(hello).sender == punch.peer:
                del self._callers[sock]
                punch.adopt(sock, hello)

    def _dismiss(self, sock: socket.socket) -> None:
        if self._callers.pop(sock, None) is not None:
            self._reactor.unwatch(sock)
            sock.close()

    def close(self) -> None:
        """Close the listeners, and the door on who still waits; harmless the second time."""
        for sock in list(self._callers):
            self._dismiss(sock)
        for listener in self._listeners:
            self._reactor.unwatch(listener)
            listener.close()
