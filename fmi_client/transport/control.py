"""The connection to the rendezvous server: kept while the job lives, made anew when it ends.

Before all ranks are there, a rank that comes again is like one that comes for the first time.
Afterwards it rejoins: the next server takes it for what it was, one that lives refuses it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import ssl
import struct
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from fmi_client.errors import (
    AuthenticationFailed,
    FmiError,
    ProtocolError,
    RendezvousError,
    ServerDraining,
)
from fmi_client.protocol import auth
from fmi_client.protocol.addresses import Address, format_address
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.rendezvous import (
    AUTH_SECONDS,
    USER_TIMEOUT_MS,
    ClientSide,
    Event,
    Ready,
    Welcome,
)
from fmi_client.protocol.tls import TlsStream
from fmi_client.transport.race import Race
from fmi_client.transport.reactor import Reactor, Timer
from fmi_client.transport.sockets import RETRY, keep_alive, own_addresses

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Bounds of the wait before the next attempt; drawn anew each time ("full jitter"), so that
the ranks of a job do not knock in step at a server that comes back."""

DRAIN_SECONDS = 5.0
"""A server that ends sends us away; for so long another one may take its place."""

ATTEMPT_SECONDS = 1.0
"""So long after it began an attempt may well succeed: a few round trips. See `Control.trying`."""


class Control:
    """Connects, authenticates, and turns the server's messages into events.

    Args:
        servers: its addresses, in the order of preference.
        port: local port to bind, shared with the listener.
        make_hello: builds the hello for the addresses under which we are known.
        on_event: given each event of the conversation.
        on_away: given the reason when the server or the network ends the connection of a rank
            that is `joined`; it is being made anew, and "ready" is the sign that it was.
        on_lost: given the reason when the connection has ended for good, which is what `leave`
            waits for; a refusal is an error of its own.
        tls: what the server's certificate is checked with, and the name that it must have; None:
            nothing is encrypted.
    """

    def __init__(
        self,
        reactor: Reactor,
        servers: tuple[Address, ...],
        port: int,
        token: auth.Token | None,
        make_hello: Callable[[tuple[Address, ...]], Hello],
        on_event: Callable[[Event], None],
        on_away: Callable[[FmiError], None],
        on_lost: Callable[[FmiError], None],
        tls: tuple[ssl.SSLContext, str] | None = None,
    ) -> None:
        self._reactor = reactor
        self._tls = tls
        self._stream: TlsStream | None = None
        self._sealed = bytearray()
        self._servers = servers
        self.server = servers[0]
        """Where we are connected to, or were last."""
        self._race: Race | None = None
        self._port = port
        self._token = token
        self._make_hello = make_hello
        self._on_event = on_event
        self._on_away = on_away
        self._on_lost = on_lost
        self._identity = auth.nonce()
        self._run = b""
        self._sock: socket.socket | None = None
        self._closed = False
        self._leaving = False
        self._pause = FIRST_PAUSE
        self.side: ClientSide | None = None
        self.last_error = "no answer yet"
        self.sent_away: ServerDraining | None = None
        """What the last server said when it ended, and none has let us in since."""
        self._patience: Timer | None = None
        self.joined = False
        """Whether all ranks were there once."""
        self.welcomed = False
        """Whether the server has let us in."""
        self.present = False
        """Whether we are in the running job, and may ask for links."""
        self.losses = 0
        """How often that has ended."""
        self._begun = -ATTEMPT_SECONDS
        """When the last attempt to connect began, or the next one is due."""
        self._answer_seconds = AUTH_SECONDS
        """How long the server may take to let us in. Doubled each time: it may have much to do."""
        self._answer: Timer | None = None

    @property
    def closed(self) -> bool:
        """Whether it is over, by whichever side."""
        return self._closed

    @property
    def trying(self) -> bool:
        """Whether an attempt to connect has just begun, or is about to: soon we know more."""
        since = self._reactor.now() - self._begun
        return not (self.present or self._closed) and -FIRST_PAUSE <= since < ATTEMPT_SECONDS

    @property
    def _before_tls(self) -> bool:
        """Whether TLS is wanted, and its handshake not over."""
        return self._stream is not None and not self._stream.established

    def connect(self) -> None:
        """Begin to connect; repeats until it succeeds or `close` is called."""
        if self._closed:
            return
        self._begun = self._reactor.now()
        self._race = Race(
            self._reactor, self._servers, self._port, self._connected, self._unreachable
        )
        self._race.next()

    def _connected(self, sock: socket.socket, server: Address) -> None:
        self._sock, self.server = sock, server
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        keep_alive(sock)
        hello = self._make_hello(own_addresses(sock.getsockname()[:2]))
        hello = replace(hello, identity=self._identity, run=self._run, began=self.joined)
        self.side = ClientSide(hello, self._token)
        if self._tls is not None:
            context, host = self._tls
            self._stream, self._sealed = TlsStream(context, host=host), bytearray()
        self._answer = self._reactor.call_later(self._answer_seconds, self._unanswered)
        self.flush()

    def _unanswered(self) -> None:
        """The connection was taken, and nobody serves it: other addresses come first now."""
        if self._leaving:
            return
        why = f"{format_address(self.server)}: no answer within {self._answer_seconds:.3g} s"
        self._servers = (*(each for each in self._servers if each != self.server), self.server)
        self._answer_seconds *= 2
        self._try_again((errno.ETIMEDOUT,), why)

    def _expect_no_answer(self) -> None:
        if self._answer is not None:
            self._answer.cancel()

    def _unreachable(self, codes: dict[Address, int]) -> None:
        reasons = {address: os.strerror(code) for address, code in codes.items()}
        if len(reasons) > 1:
            why = ", ".join(f"{format_address(each)}: {reason}" for each, reason in reasons.items())
        else:
            (why,) = reasons.values()
        self._try_again(codes.values(), why)

    def _try_again(self, codes: Collection[int], why: str) -> None:
        self._reset()
        self.last_error = why
        if codes and RETRY.isdisjoint(codes):
            self._lose(RendezvousError(f"cannot connect to the rendezvous server: {why}"))
            return
        self._connect_after(random.uniform(0, self._pause))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _connect_after(self, seconds: float) -> None:
        self._begun = self._reactor.now() + seconds
        self._reactor.call_later(seconds, self.connect)

    def _interrupted(self, code: int) -> None:
        """The connection ended and the server did not say why (code 0: in order)."""
        why = os.strerror(code) if code else "closed by the server"
        if self._before_tls:
            why, code = "the server broke off the TLS handshake; has it a --tls-cert?", 0
        error = RendezvousError(f"connection to the server lost: {why}")
        if self._leaving or (self.joined and not self._run):
            self._lose(error)
            return
        present = self.present
        self._try_again([code] if code else [], why)
        if present and not self._closed:
            self.losses += 1
            self._on_away(error)

    def _send_away(self, error: ServerDraining) -> None:
        """The server ends: come back when it says so, not all at once."""
        self._reset()
        self.last_error, self.sent_away = error.message, error
        if self._patience is None and not self.joined:
            self._patience = self._reactor.call_later(DRAIN_SECONDS, lambda: self._lose(error))
        self._connect_after(error.retry_after * random.uniform(0.5, 1.5))

    def _let_in(self, run: bytes) -> None:
        self.welcomed, self._run, self.sent_away = True, run, None
        self._answer_seconds = AUTH_SECONDS
        self._expect_no_answer()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _reset(self) -> None:
        """End the connection so that another one from our port may follow.

        Whoever closes first in order may not connect from the same port for a minute.
        """
        if self._sock is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._drop()

    def _drop(self) -> None:
        sock, self._sock = self._sock, None
        self.side = self._stream = None
        self.welcomed = self.present = False
        self._expect_no_answer()
        if self._race is not None:
            self._race.cancel()
        if sock is not None:
            self._reactor.unwatch(sock)
            sock.close()

    def flush(self) -> None:
        """Write what the conversation has queued, as far as the kernel takes it."""
        if self.side is None or self._sock is None:
            return
        out = self._to_write(self.side)
        try:
            if out:
                del out[: self._sock.send(out)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._interrupted(error.errno or 0)
            return
        self._reactor.watch(self._sock, self._read, self.flush if out else None)

    def _to_write(self, side: ClientSide) -> bytearray:
        if self._stream is None:
            return side.outgoing
        self._stream.send(side.outgoing)
        side.outgoing.clear()
        self._sealed += self._stream.take()
        return self._sealed

    def _read(self) -> None:
        try:
            data = self._open_socket().recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._interrupted(error.errno or 0)
            return
        if not data:
            self._interrupted(0)
        elif not self._leaving:
            self._handle(data)

    def _handle(self, data: bytes) -> None:
        side = self.side
        assert side is not None
        try:
            events = side.receive(self._decrypted(data))
        except FmiError as error:
            self._fail(error)
            return
        self.flush()
        for event in events:
            if isinstance(event, Welcome):
                self._let_in(event.run)
            elif isinstance(event, Ready):
                self.joined = self.present = True
                self._pause = FIRST_PAUSE
            self._on_event(event)
        if side.failure is not None:
            self._fail(side.failure)

    def _fail(self, error: FmiError) -> None:
        if isinstance(error, ServerDraining):
            self._send_away(error)
            return
        expired = self._token is not None and self._token.expires <= time.time()
        strange = not self.welcomed and isinstance(error, AuthenticationFailed | ProtocolError)
        # An untrusted certificate says so itself.
        if strange and not (self._before_tls and isinstance(error, AuthenticationFailed)):
            error = _explained(error, format_address(self.server), self._token)
        if strange and self._run and not expired:  # the right server may come yet, as one did once
            self._try_again((), error.message)
        else:
            self._lose(error)

    def _decrypted(self, data: bytes) -> bytes:
        if self._stream is None:
            return data
        try:
            return self._stream.receive(data)
        except AuthenticationFailed as error:
            raise AuthenticationFailed(
                f"the server's certificate is not trusted ({error.message}); "
                "FMI_TLS_CA may name a file of those to trust"
            ) from None

    def _open_socket(self) -> socket.socket:
        assert self._sock is not None, "no callback outlives its socket"
        return self._sock

    def _lose(self, error: FmiError) -> None:
        if not self._closed:
            self.close()
            self._on_lost(error)

    def leave(self) -> None:
        """Say goodbye, and wait for the server to close.

        Closing first would answer whatever the server sends meanwhile with a reset, and a
        reset may overtake what we said last: an abort, or the goodbye itself.
        """
        if self.side is None or self._sock is None or not self.side.answered:
            self.close()
            return
        self._leaving = True
        self.side.leave()
        self.flush()
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close at once."""
        self._closed = True
        self._drop()


def _explained(error: FmiError, server: str, token: auth.Token | None) -> FmiError:
    """Say what may be wrong, where whoever answered did not let us in and said no more."""
    if isinstance(error, ProtocolError):
        return ProtocolError(
            f"what answers at {server} is no rendezvous server ({error.message}): "
            "is it the right port?"
        )
    if token is None:
        why = "the server wants a token, which make_token() makes"
    elif token.expires <= time.time():
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(token.expires))
        why = f"the token expired at {when}"
    else:
        why = "the server has another secret, or the token is for another job or size"
    return AuthenticationFailed(f"{error.message}: {why}")
