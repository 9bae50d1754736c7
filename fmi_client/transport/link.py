"""A link: ordered messages between this rank and one peer.

A link exists from the first moment somebody wants to use it; what is sent before its
connection is made waits in its queue, by reference. It never copies a large payload: the
kernel reads from the caller's memory and writes to the receiver's.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from fmi_client.errors import ProtocolError
from fmi_client.protocol.inbox import Inbox, Pending, Receive
from fmi_client.protocol.peer import Buffer, Key, Payload, head
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

TAIL_BYTES = 256 * 1024
"""Of small messages through a relay, so much is kept for the case that it dies with some."""

MOST_REPEATED = 64
"""So many small messages are kept until the peer is known to have the link; see `attach`."""

_GATHER = 64  # buffers in one sendmsg; the kernel allows 1,024


class Send(Pending):
    """A message on its way; it is done when the system has taken all of it."""

    __slots__ = ("started", "views", "whole")

    def __init__(self, *views: memoryview, done: bool = False) -> None:
        super().__init__(done)
        self.whole = views
        self.views = deque(views)
        self.started = False


class _Tail:
    """The end of what was sent through a relay, as far back as it is still known."""

    def __init__(self) -> None:
        self._pieces: deque[Buffer] = deque()
        self._size = 0

    def add(self, message: Send) -> None:
        if len(message.whole) > 1:  # the caller's memory, which it may change from now on
            self._pieces.clear()
            self._size = 0
            return
        self._pieces.append(message.whole[0])
        self._size += len(message.whole[0])
        while self._size > TAIL_BYTES:
            self._size -= len(self._pieces.popleft())

    def take(self, count: int) -> bytes | None:
        """Remove and return the last `count` bytes; None if they are not known any more."""
        if count > self._size:
            return None
        known = b"".join(self._pieces)
        kept, taken = known[: self._size - count], known[self._size - count :]
        self._pieces, self._size = deque([kept]), len(kept)
        return taken


SENT = Send(done=True)
"""What most sends of small messages are, at once."""


class Link(Protocol):
    """What communicators see of a link."""

    peer: int
    kind: str
    error: Exception | None
    inbox: Inbox
    bytes_sent: int

    @property
    def tls(self) -> bool:
        """Whether it is encrypted."""

    @property
    def busy(self) -> bool:
        """Whether something is awaited from the peer, or has not been taken by it."""

    def send(self, key: Key, signature: bytes, payload: Payload) -> Send: ...

    def post(self, receive: Receive) -> None: ...

    def cancel(self, receive: Receive) -> None: ...

    def read(self) -> None:
        """Take in what has come, if anything has."""

    def withdraw(self, sent: Send) -> bool:
        """Take back a message; False if the peer may have some of it already."""

    def make_room(self, room: bool) -> None:
        """Whether to read what nobody awaits; see `Inbox.make_room`."""

    def close(self) -> None:
        """End in order: what was sent arrives."""

    def abort(self, error: Exception) -> None:
        """End at once, failing all that waits with `error`."""


class SocketLink:
    """A link over a TCP connection, made (`attach`) after the link came into being."""

    def __init__(
        self, peer: int, reactor: Reactor, inbox: Inbox, on_lost: Callable[[SocketLink], None]
    ) -> None:
        self.peer = peer
        self.kind = "pending"
        self.error: Exception | None = None
        self.inbox = inbox
        self.bytes_sent = 0
        self.lost = False
        self.lost_because: Exception | None = None
        self._reactor = reactor
        self._on_lost = on_lost
        self._sock: socket.socket | None = None
        self.tls = False
        self._tls: TlsSocket | None = None
        """The socket, where it encrypts."""
        self._ahead = 0
        """Bytes beyond `_written` of which the peer may have some: see `TlsSocket.promised`."""
        self._queue: deque[Send] = deque()
        self._room = False
        self._interest = (False, False)
        self._worth = 1
        self._pulse = Pulse()
        self._sent: list[Send] | None = None
        """What the peer may have to be sent again; None: it was there, or that is too much."""
        self._tail: _Tail | None = None
        """The same for a link through a relay, whose bytes are counted."""
        self._written = 0
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
        self._ahead = 0
        self._worth = 1
        self.kind = kind
        self._sent = None if first or self.suspended or kind == "relay" else []
        self._tail = (self._tail or _Tail()) if kind == "relay" else None
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
            failed = Send()
            failed.finish(self.error)
            return failed
        if nbytes <= JOIN_BYTES:
            return self._send_small(b"".join((start, *payload.parts)))
        views = (_flat(part) for part in payload.parts if len(part))
        return self._enqueue(memoryview(start), *views)

    def _enqueue(self, *views: memoryview) -> Send:
        message = Send(*views)
        self._queue.append(message)
        self._flush()
        return message

    def _send_small(self, whole: bytes) -> Send:
        if self._sent is not None or self._tail is not None:
            return self._enqueue(memoryview(whole))
        sent = 0
        if self._sock is not None and not self._queue:
            try:
                sent = self._sock.send(whole)
            except BlockingIOError:
                pass
            except OSError as error:
                self._lose(error)
        if sent == len(whole):
            return SENT
        message = Send(memoryview(whole)[sent:])
        message.started = sent > 0
        self._queue.append(message)
        self._update_interest()
        return message

    def _flush(self) -> None:
        while self._queue and self._sock is not None:
            try:
                sent = self._sock.sendmsg(self._next_views())
            except BlockingIOError:
                break
            except OSError as error:
                self._lose(error)
                return
            self._written += sent
            self._advance(sent)
        self._update_interest()

    def _next_views(self) -> list[memoryview]:
        return list(itertools.islice((v for m in self._queue for v in m.views), _GATHER))

    def _advance(self, sent: int) -> None:
        while self._queue and (sent or not self._queue[0].views):
            message = self._queue[0]
            views = message.views
            message.started = True
            while views and sent >= len(views[0]):
                sent -= len(views.popleft())
            if views:
                views[0] = views[0][sent:]
                return
            self._queue.popleft()
            if self._sent is not None:
                self._keep(message, self._sent)
            if self._tail is not None:
                self._tail.add(message)
            message.finish()

    def _keep(self, message: Send, sent: list[Send]) -> None:
        sent.append(message)
        large = len(message.whole) > 1  # the caller's memory, which it may change from now on
        if large or len(sent) > MOST_REPEATED:
            self._sent = None

    def revive(self) -> bool:
        """Whether a lost connection can be replaced; if so, wait for `attach` once more.

        The last word of the handshake may be lost with its connection: the peer has no link
        then and wants another connection. If nothing of the peer's has come, it can be given
        one, and all that was sent is sent again; if the peer has taken any of it, the peer
        will not revive its own end, and no second connection comes about.
        """
        if self._sent is None or self.error is not None:
            return False
        for message in self._queue:
            message.views, message.started = deque(message.whole), False
        self._queue.extendleft(Send(*message.whole) for message in reversed(self._sent))
        self.kind, self.lost, self._sent = "pending", False, None
        self._written = 0
        return True

    @property
    def suspended(self) -> bool:
        """Whether its relay was lost, and `resume` and `attach` can bring it back."""
        return self._tail is not None

    def suspend(self) -> None:
        """The relay was lost, but not the peer: wait for another connection."""
        self.kind, self.lost = "pending", False

    def resume(self, got: int) -> bool:
        """Go back to where the peer is.

        Args:
            got: bytes of this link that the peer has, over all its connections.

        Returns:
            Whether all that it has not is still known.
        """
        assert self._tail is not None
        lost = self._written - got
        if -self._ahead <= lost < 0:
            self._advance(-lost)
            self._written, self._ahead = got, 0
            return True
        head = self._queue[0] if self._queue else Send()
        begun = sum(map(len, head.whole)) - sum(map(len, head.views))
        again = self._tail.take(max(0, lost - begun))
        if lost < 0 or again is None:
            return False
        head.views = deque(_behind(head.whole, max(0, begun - lost)))
        if again:
            self._queue.appendleft(Send(memoryview(again)))
        self._written = got
        return True

    def withdraw(self, sent: Send) -> bool:
        if sent in self._queue and not sent.started and not self._is_promised(sent):
            self._queue.remove(sent)
            self._update_interest()
            return True
        return sent.done

    def _is_promised(self, message: Send) -> bool:
        """Whether some of a message in the queue is encrypted: what follows needs it."""
        ahead = itertools.takewhile(lambda each: each is not message, self._queue)
        before = sum(len(view) for each in ahead for view in each.views)
        return before < (self._tls.promised if self._tls is not None else self._ahead)

    # ------------------------------------------------------------------ receiving
    def post(self, receive: Receive) -> None:
        try:
            self.inbox.post(receive)
        except ProtocolError as error:
            self._malformed(error)
        if receive.done:
            return
        if self.error is not None:
            self.inbox.cancel(receive)
            receive.finish(self.error)
        elif not self._interest[0]:
            self._update_interest()

    def cancel(self, receive: Receive) -> None:
        self.inbox.cancel(receive)

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
        self._sent = None
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
        return self.inbox.waiting > 0 or bool(self._queue)

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
        """Fail all that waits, now and later, with `error`."""
        self.error = self.error or error
        queue, self._queue = self._queue, deque()
        for message in queue:
            message.finish(error)
        self.inbox.fail(error)

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
            self._ahead = self._tls.promised if self._tls is not None else 0
            self._sock = self._tls = None
            self._interest = (False, False)

    def _update_interest(self) -> None:
        if self._sock is None:
            return
        inbox = self.inbox
        much = inbox.unexpected_bytes > UNEXPECTED_BYTES and not self._room
        read = inbox.waiting > 0 or inbox.receiving or not (inbox.held or much)
        wants = (read, bool(self._queue))
        if wants != self._interest:
            if self._tls is not None and self._tls.more and wants[0] and not self._interest[0]:
                self._reactor.call_later(0.0, self.read)  # the system knows nothing of it
            self._interest = wants
            self._reactor.watch(
                self._sock, self.read if wants[0] else None, self._flush if wants[1] else None
            )


def _behind(views: Iterable[memoryview], skip: int) -> Iterator[memoryview]:
    """Yield what follows the first `skip` bytes."""
    for view in views:
        if skip < len(view):
            yield view[skip:]
        skip = max(0, skip - len(view))


def _flat(part: Buffer) -> memoryview:
    return memoryview(part).cast("B") if not isinstance(part, memoryview) else part
