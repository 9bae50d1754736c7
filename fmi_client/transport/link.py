"""A link: ordered messages between this rank and one peer.

A link exists from the first moment somebody wants to use it; what is sent before its
connection is made waits in its queue, by reference. It never copies a large payload: the
kernel reads from the caller's memory and writes to the receiver's.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from fmi_client.errors import ProtocolError
from fmi_client.protocol.peer import Buffer, Inbox, Key, Payload, Receive, head
from fmi_client.transport.reactor import Reactor

JOIN_BYTES = 16 * 1024
"""Payloads up to this size are copied behind their header: one write instead of a gather."""

UNEXPECTED_BYTES = 1024 * 1024
"""Above this, a link with data for nobody is not read until somebody asks for it."""

_GATHER = 64  # buffers in one sendmsg; the kernel allows 1,024


class Send:
    """A message on its way. `done` turns true when the kernel has all of it, or on `error`."""

    __slots__ = ("done", "error", "on_done")

    def __init__(self, done: bool = False) -> None:
        self.done = done
        self.error: Exception | None = None
        self.on_done: Callable[[], None] | None = None

    def finish(self, error: Exception | None = None) -> None:
        self.error = error
        self.done = True
        if self.on_done:
            self.on_done()


class Link(Protocol):
    """What communicators see of a link."""

    peer: int
    kind: str
    error: Exception | None
    inbox: Inbox
    bytes_sent: int

    def send(self, key: Key, signature: bytes, payload: Payload) -> Send: ...

    def post(self, receive: Receive) -> None: ...

    def cancel(self, receive: Receive) -> bool: ...

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
        self._queue: deque[memoryview | Send] = deque()
        self._interest = (False, False)

    def attach(self, sock: socket.socket, kind: str, first: bytes) -> None:
        """Start to carry data over `sock`; `first` was read from it already."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self.kind = kind
        self._guarded(lambda: self.inbox.feed(first))
        if not self.lost:
            self._flush()

    # -------------------------------------------------------------------- sending
    def send(self, key: Key, signature: bytes, payload: Payload) -> Send:
        nbytes = payload.nbytes
        start = head(key, signature, payload, nbytes)
        self.bytes_sent += nbytes
        if self.error is not None:
            done = Send()
            done.finish(self.error)
            return done
        if nbytes <= JOIN_BYTES:
            return self._send_small(b"".join((start, *payload.parts)))
        done = Send()
        self._queue.append(memoryview(start))
        self._queue.extend(_flat(part) for part in payload.parts if len(part))
        self._queue.append(done)
        self._flush()
        return done

    def _send_small(self, message: bytes) -> Send:
        sent = 0
        if self._sock is not None and not self._queue:
            try:
                sent = self._sock.send(message)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._lose(error)
            if sent == len(message):
                return Send(done=True)
        done = Send()
        self._queue.append(memoryview(message)[sent:])
        self._queue.append(done)
        self._update_interest()
        return done

    def _flush(self) -> None:
        while self._queue and self._sock is not None and not self.lost:
            views = self._next_views()
            try:
                sent = self._sock.sendmsg(views)
            except BlockingIOError:
                break
            except OSError as error:
                self._lose(error)
                return
            self._advance(sent)
        self._update_interest()

    def _next_views(self) -> list[memoryview]:
        views: list[memoryview] = []
        for item in self._queue:
            if isinstance(item, memoryview):
                views.append(item)
                if len(views) == _GATHER:
                    break
        return views

    def _advance(self, sent: int) -> None:
        queue = self._queue
        while queue:
            item = queue[0]
            if isinstance(item, Send):
                queue.popleft()
                item.finish()
            elif len(item) <= sent:
                sent -= len(item)
                queue.popleft()
            else:
                queue[0] = item[sent:]
                return

    # ------------------------------------------------------------------ receiving
    def post(self, receive: Receive) -> None:
        self._guarded(lambda: self.inbox.post(receive))
        if receive.done:
            return
        if self.error is not None:
            self.inbox.cancel(receive)
            receive.finish(self.error)
        elif not self._interest[0]:
            self._update_interest()

    def cancel(self, receive: Receive) -> bool:
        return self.inbox.cancel(receive)

    def read(self) -> None:
        """Read once, if there is something to read."""
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
        self._guarded(lambda: self.inbox.buffer_updated(count))
        if self.inbox.held or self.inbox.unexpected_bytes > UNEXPECTED_BYTES:
            self._update_interest()

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except ProtocolError as error:
            self._lose(error.at(peer=self.peer))

    # --------------------------------------------------------------------- ending
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
        for item in queue:
            if isinstance(item, Send):
                item.finish(error)
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
            self._sock = None
            self._interest = (False, False)

    def _update_interest(self) -> None:
        if self._sock is None:
            return
        inbox = self.inbox
        full = inbox.held or inbox.unexpected_bytes > UNEXPECTED_BYTES
        wants = (inbox.waiting > 0 or not full, bool(self._queue))
        if wants != self._interest:
            self._interest = wants
            self._reactor.watch(
                self._sock, self.read if wants[0] else None, self._flush if wants[1] else None
            )


def _flat(part: Buffer) -> memoryview:
    return memoryview(part).cast("B") if not isinstance(part, memoryview) else part
