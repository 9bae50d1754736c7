"""A link: ordered messages between this rank and one peer.

A link exists from the first moment somebody wants to use it; what is sent before its
connection is made waits in its queue, by reference. It never copies a large payload: the
kernel reads from the caller's memory and writes to the receiver's.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable

from fmi_client.errors import ProtocolError
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.outbox import Outbox
from fmi_client.protocol.peer import Buffer, Key, Payload, head
from fmi_client.protocol.transfers import SENT, Receive, Send
from fmi_client.transport.pulse import Pulse
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.sockets import system_error
from fmi_client.transport.tls import TlsSocket

JOIN_BYTES = 16 * 1024
"""Payloads up to this size are copied behind their header: one write instead of a gather."""

UNEXPECTED_BYTES = 1024 * 1024
"""Above this, a link with data for nobody is not read until somebody asks for it."""

WORTH_BYTES = 256 * 1024
"""Of a large payload, so much must have come to be worth waking up for."""


class Link:
    """What communicators see of a link; the kinds differ in how bytes travel."""

    def __init__(self, peer: int, inbox: Inbox, kind: str) -> None:
        self.peer = peer
        self.kind = kind
        self.inbox = inbox
        self.tls = False
        """Whether it is encrypted."""
        self.error: Exception | None = None
        """Why it has ended."""
        self.bytes_sent = 0
        """Bytes of payloads."""

    @property
    def busy(self) -> bool:
        """Whether something is awaited from the peer, or has not been taken by it."""
        return self.inbox.waiting > 0

    def send(self, key: Key, signature: bytes, payload: Payload) -> Send:
        raise NotImplementedError

    def post(self, receive: Receive) -> None:
        """Expect a message."""
        self.inbox.post(receive)
        self._refuse(receive)

    def _refuse(self, receive: Receive) -> None:
        """End what was posted too late."""
        if self.error is not None and not receive.done:
            self.inbox.cancel(receive)
            receive.finish(self.error)

    def cancel(self, receive: Receive) -> None:
        self.inbox.cancel(receive)

    def read(self) -> None:
        """Take in what has come, if anything has, and it does not come by itself."""

    def withdraw(self, sent: Send) -> bool:
        """Take back a message; False if the peer may have some of it already."""
        return sent.done

    def make_room(self, room: bool) -> None:
        """Whether to read what nobody awaits; see `Inbox.make_room`."""

    def close(self) -> None:
        """End in order: what was sent arrives."""
        raise NotImplementedError

    def abort(self, error: Exception) -> None:
        """End at once; all that waits fails with `error`, now and later."""
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """As `abort`, where nothing is left to be ended."""
        self.error = self.error or error
        self.inbox.fail(error)


class SocketLink(Link):
    """A link over a TCP connection, made (`attach`) after the link came into being."""

    def __init__(
        self, peer: int, reactor: Reactor, inbox: Inbox, on_lost: Callable[[SocketLink], None]
    ) -> None:
        super().__init__(peer, inbox, "pending")
        self.lost = False
        self.lost_because: Exception | None = None
        self._reactor = reactor
        self._on_lost = on_lost
        self._sock: socket.socket | None = None
        self._tls: TlsSocket | None = None
        """The socket, where it encrypts."""
        self._last_promised = 0
        """What `_promised` was when the connection ended."""
        self._out = Outbox()
        self._room = False
        self._interest = (False, False)
        self._worth = 1
        self._pulse = Pulse()
        self.received = 0
        """Bytes, messages' heads among them, that came over its connections."""

    def attach(self, sock: socket.socket, kind: str, first: bytes) -> None:
        """Start to carry data over `sock`; `first` was read from it already.

        Until something of the peer's has come, another connection may take its place: see
        `revive`.
        """
        self._sock = sock
        self._pulse = Pulse()
        self._tls = sock if isinstance(sock, TlsSocket) else None
        self.tls = self._tls is not None  # and so it was, when the peer has gone
        self._last_promised = 0
        self._worth = 1
        self.kind = kind
        self._out.begin(relayed=kind == "relay", heard=bool(first))
        self.received += len(first)
        try:
            self.inbox.feed(first)
        except ProtocolError as error:
            self._malformed(error)
        if not self.lost:
            self._flush()

    # -------------------------------------------------------------------- sending
    def send(self, key: Key, signature: bytes, payload: Payload) -> Send:
        nbytes = payload.nbytes
        start = head(key, signature, payload, nbytes)
        self.bytes_sent += nbytes
        if self.error is not None:
            return _unsent(self.error)
        if nbytes <= JOIN_BYTES:
            return self._send_small(b"".join((start, *payload.parts)))
        views = (_flat(part) for part in payload.parts if len(part))
        return self._enqueue(memoryview(start), *views)

    def _enqueue(self, *views: memoryview) -> Send:
        message = self._out.add(*views)
        self._flush()
        return message

    def _send_small(self, whole: bytes) -> Send:
        if self._out.keeps:
            return self._enqueue(memoryview(whole))
        sent = 0
        if self._sock is not None and not self._out.queue:
            try:
                sent = self._sock.send(whole)
            except BlockingIOError:
                pass
            except OSError as error:
                self._lose(error)
                if self.error is not None:  # it was known that the peer is gone
                    return _unsent(self.error)
        if sent == len(whole):
            return SENT
        message = self._out.add(memoryview(whole)[sent:])
        message.started = sent > 0
        self._update_interest()
        return message

    def _flush(self) -> None:
        out = self._out
        while out.queue and self._sock is not None:
            try:
                sent = self._sock.sendmsg(out.next_views())
            except BlockingIOError:
                break
            except OSError as error:
                self._lose(error)
                return
            out.took(sent)
        self._update_interest()

    def revive(self) -> bool:
        """Whether a lost direct connection can be replaced; if so, wait for `attach` once more."""
        if self.error is not None or not self._out.revive():
            return False
        self.kind, self.lost = "pending", False
        return True

    @property
    def suspended(self) -> bool:
        """Whether its relay was lost, and `resume` and `attach` can bring it back."""
        return self._out.resumable

    def suspend(self) -> None:
        """The relay was lost, but not the peer: wait for another connection."""
        self.kind, self.lost = "pending", False

    def resume(self, got: int) -> bool:
        """Go back to where the peer is, which has `got` bytes; False if too much was lost."""
        return self._out.resume(got, self._last_promised)

    def withdraw(self, sent: Send) -> bool:
        if not self._out.withdraw(sent, self._promised):
            return sent.done
        self._update_interest()
        return True

    @property
    def _promised(self) -> int:
        """Bytes in the queue that are encrypted already: see `TlsSocket.promised`."""
        return self._tls.promised if self._tls is not None else self._last_promised

    # ------------------------------------------------------------------ receiving
    def post(self, receive: Receive) -> None:
        try:
            self.inbox.post(receive)
        except ProtocolError as error:
            self._malformed(error)
        if receive.done:
            return
        if self.error is not None:
            self._refuse(receive)
        elif not self._interest[0]:
            self._update_interest()

    def make_room(self, room: bool) -> None:
        self._room = room
        try:
            self.inbox.make_room(room)
        except ProtocolError as error:
            self._malformed(error)
        self._update_interest()

    def read(self) -> None:
        """Read once, if there is something to read; and what has been read, but not taken in."""
        self._read()
        while self._tls is not None and self._tls.more and self._interest[0]:
            self._read()

    def _read(self) -> None:
        if self._sock is None or self.inbox.held:
            self._update_interest()
            return
        try:
            count = self._sock.recv_into(self.inbox.get_buffer())
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if count == 0:
            self._lose(ConnectionResetError("the peer closed the connection"))
            return
        self._out.heard()
        self.received += count
        try:
            self.inbox.buffer_updated(count)
        except ProtocolError as error:
            self._malformed(error)
        if self.inbox.held or self.inbox.unexpected_bytes > UNEXPECTED_BYTES:
            self._update_interest()
        worth = min(self.inbox.left, WORTH_BYTES) or 1
        if worth != self._worth and self._sock is not None and self._tls is None:
            self._worth = worth
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, worth)

    def check(self) -> None:
        """Find out whether what we wait for can still come; keepalive cannot always tell."""
        sock = self._sock
        if sock is not None and self.busy and self._pulse.lost(sock, self._reactor.now()):
            self._lose(system_error(errno.ETIMEDOUT))

    def _malformed(self, error: ProtocolError) -> None:
        self._lose(error.at(peer=self.peer))

    # --------------------------------------------------------------------- ending
    @property
    def busy(self) -> bool:
        return super().busy or bool(self._out.queue)

    @property
    def pending(self) -> bool:
        """Whether its connection has still to be made."""
        return self._sock is None and not self.lost and self.error is None

    def close(self) -> None:
        sock = self._sock
        if sock is None:
            return
        self._detach()
        with contextlib.suppress(OSError):
            # Unread bytes would turn our close into a reset, which may overtake our data.
            while sock.recv(65536):
                pass
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        sock.close()

    def abort(self, error: Exception) -> None:
        sock = self._sock
        if sock is not None:
            self._detach()
            sock.close()
        self.fail(error)

    def fail(self, error: Exception) -> None:
        super().fail(error)
        self._out.fail(error)

    def _lose(self, error: Exception) -> None:
        """The connection broke; whoever owns the link finds out why, then calls `fail`."""
        sock = self._sock
        if sock is None:
            return
        self._detach()
        sock.close()
        self.lost = True
        self.lost_because = error
        self._on_lost(self)

    def _detach(self) -> None:
        if self._sock is not None:
            self._reactor.unwatch(self._sock)
            self._last_promised = self._promised
            self._sock = self._tls = None
            self._interest = (False, False)

    def _update_interest(self) -> None:
        if self._sock is None:
            return
        inbox = self.inbox
        much = inbox.unexpected_bytes > UNEXPECTED_BYTES and not self._room
        read = inbox.waiting > 0 or inbox.receiving or not (inbox.held or much)
        wants = (read, bool(self._out.queue))
        if wants != self._interest:
            if self._tls is not None and self._tls.more and wants[0] and not self._interest[0]:
                self._reactor.call_later(0.0, self.read)  # the system knows nothing of it
            self._interest = wants
            self._reactor.watch(
                self._sock, self.read if wants[0] else None, self._flush if wants[1] else None
            )


def _flat(part: Buffer) -> memoryview:
    return memoryview(part).cast("B") if not isinstance(part, memoryview) else part


def _unsent(error: Exception) -> Send:
    failed = Send()
    failed.finish(error)
    return failed
