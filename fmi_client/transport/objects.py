"""Links through a store: each message is an object that its receiver polls for.

The calls to the store block, so they run in threads, for both drivers: a store that hangs
must not make a deadline late. Everything else happens in the reactor's thread.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fmi_client.errors import FmiError, ProtocolError, RendezvousError
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.objects import SEAL_BYTES, Scheme
from fmi_client.protocol.peer import Buffer, Key, Payload, head
from fmi_client.protocol.transfers import Receive, Send
from fmi_client.transport.link import Link
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.store import Store

THREADS = 8
"""Requests to the store at once; each rank of a job may have so many."""

OBJECT_BYTES = 16 * 1024 * 1024 + 4096
"""Larger messages (16 MiB and their head) are cut: the pieces travel side by side, and no reader
needs more memory."""

FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.2
"""Seconds between looks at an object that is not there yet; each pause is half as long again."""

T = TypeVar("T")
Then = Callable[[Any, FmiError | None], None]
"""Given what a call returned, or why it failed."""


class Pauses:
    """Times to wait between looks, jittered so that ranks do not look in step."""

    def __init__(self) -> None:
        self._next = FIRST_PAUSE

    def reset(self) -> None:
        self._next = FIRST_PAUSE

    def next(self) -> float:
        pause, self._next = self._next, min(1.5 * self._next, LONGEST_PAUSE)
        return pause * random.uniform(0.75, 1.25)


class Depot:
    """A job's place in a store: sealed objects, written and read in the background.

    Callbacks come in the reactor's thread. `on_idle` is called when nothing is under way.
    """

    def __init__(
        self, reactor: Reactor, store: Store, scheme: Scheme, on_idle: Callable[[], None]
    ) -> None:
        self.pending = 0
        self.scheme = scheme
        self._reactor = reactor
        self._store = store
        self._on_idle = on_idle
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="fmi-store")
        self._finished: deque[tuple[Future[Any], Then]] = deque()
        self._bell, self._button = socket.socketpair()
        self._bell.setblocking(False)
        self._button.setblocking(False)
        self._closed = False
        reactor.watch(self._bell, self._collect)

    # ------------------------------------------------------------------- the store
    def put(self, name: str, parts: Sequence[Buffer], then: Then) -> None:
        """Write an object, sealed."""
        path = self._path(name)

        def put() -> None:
            self._store.put(path, (self.scheme.seal(name, parts), *parts))

        self._run(put, then)

    def mark(self, name: str, then: Then) -> None:
        """Write an empty object, whose name says everything."""
        self._run(partial(self._store.put, self._path(name), ()), then)

    def get(self, name: str, then: Then) -> None:
        """Read and unseal an object; gives None if there is none."""
        path = self._path(name)

        def get() -> memoryview | None:
            data = self._store.get(path, OBJECT_BYTES + SEAL_BYTES)
            return None if data is None else self.scheme.unseal(name, data)

        self._run(get, then)

    def names(self, folder: str, then: Then) -> None:
        self._run(partial(self._store.names, self._path(folder)), then)

    def delete(self, *names: str) -> None:
        """Delete objects; that some stay behind harms nobody."""
        for name in names:
            self._run(partial(self._store.delete, self._path(name)), _whatever)

    def clear(self, folder: str) -> None:
        self._run(partial(self._store.clear, self._path(folder)), _whatever)

    def _path(self, name: str) -> str:
        return f"{self.scheme.root}/{name}" if name else self.scheme.root

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call back after so many seconds, unless the depot is closed by then."""
        self._reactor.call_later(seconds, lambda: None if self._closed else call())

    # ------------------------------------------------------------------ the threads
    def _run(self, call: Callable[[], T], then: Then) -> None:
        if self._closed:
            return
        self.pending += 1
        future = self._threads.submit(call)
        future.add_done_callback(lambda done: self._ring(done, then))

    def _ring(self, done: Future[Any], then: Then) -> None:
        """In a thread of the pool: hand over a result, and wake the reactor."""
        self._finished.append((done, then))
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody cares
            self._button.send(b"\0")

    def _collect(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(4096)
        while self._finished and not self._closed:
            done, then = self._finished.popleft()
            self.pending -= 1
            error = done.exception()
            if error is None:
                then(done.result(), None)
            else:
                then(None, error if isinstance(error, FmiError) else _unexpected(error))
        if not self.pending and not self._closed:
            self._on_idle()

    def close(self) -> None:
        """Stop; what is under way ends in its thread, and is not heard of."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._reactor.unwatch(self._bell)
        self._bell.close()
        self._button.close()
        self._store.close()


def _whatever(result: object, error: FmiError | None) -> None:
    pass


def _unexpected(error: BaseException) -> FmiError:
    return RendezvousError(f"cannot use the store: {type(error).__name__}: {error}")


class ObjectLink(Link):
    """A link whose messages are objects; polls only while something is awaited.

    Args:
        out: folder of what we send to the peer; `into`: of what it sends to us.
        on_wait: called when something is awaited from now on.
    """

    def __init__(
        self,
        peer: int,
        depot: Depot,
        out: str,
        into: str,
        inbox: Inbox,
        on_wait: Callable[[], None],
    ) -> None:
        super().__init__(peer, inbox, "object")
        self.gone: FmiError | None = None
        """Set when the peer has left: what is not in the store now will never be."""
        self._depot = depot
        self._out = out
        self._into = into
        self._on_wait = on_wait
        self._sent = 0
        self._read = 0
        self._leaving: set[Send] = set()
        self._polling = False
        self._closed = False
        self._pauses = Pauses()

    @property
    def busy(self) -> bool:
        return super().busy or bool(self._leaving)

    # -------------------------------------------------------------------- sending
    def send(self, key: Key, signature: bytes, payload: Payload) -> Send:
        nbytes = payload.nbytes
        self.bytes_sent += nbytes
        message = Send()
        if self.error is not None:
            message.finish(self.error)
            return message
        self._leaving.add(message)
        pieces = _cut([head(key, signature, payload, nbytes), *payload.parts], OBJECT_BYTES)
        left = len(pieces)

        def put(_: object, error: FmiError | None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                self.abort(error)
            elif not left and message in self._leaving:
                self._leaving.remove(message)
                message.finish()

        for piece in pieces:
            self._depot.put(f"{self._out}/{self._sent}", piece, put)
            self._sent += 1
        return message

    # ------------------------------------------------------------------ receiving
    def post(self, receive: Receive) -> None:
        super().post(receive)
        if receive.done:
            return
        self._on_wait()
        if not self._polling:
            self._polling = True
            self._pauses.reset()
            self._poll()

    def _poll(self) -> None:
        # A peer that has left before we look has put all it will ever put.
        self._depot.get(self._name, partial(self._got, self.gone))

    @property
    def _name(self) -> str:
        return f"{self._into}/{self._read}"

    def _got(self, gone: FmiError | None, data: memoryview | None, error: FmiError | None) -> None:
        self._polling = False
        if self._closed or self.error is not None:
            return
        if error is not None:
            self.abort(error.at(peer=self.peer))
        elif data is not None:
            self._take(data)
        elif gone is not None:
            self.abort(gone)
        if self.error is None and self.inbox.waiting and not self._polling:
            self._polling = True
            if data is None:
                self._depot.later(self._pauses.next(), self._poll)
            else:
                self._poll()

    def _take(self, data: memoryview) -> None:
        self._depot.delete(self._name)
        self._read += 1
        self._pauses.reset()
        try:
            self.inbox.feed(data)
        except ProtocolError as error:
            self.abort(error.at(peer=self.peer))

    # --------------------------------------------------------------------- ending
    def close(self) -> None:
        self._closed = True

    def fail(self, error: Exception) -> None:
        super().fail(error)
        leaving, self._leaving = self._leaving, set()
        for message in leaving:
            message.finish(error)


def _cut(parts: Sequence[Buffer], most: int) -> list[list[memoryview]]:
    """Distribute a message, without a copy, over pieces of at most so many bytes."""
    pieces: list[list[memoryview]] = [[]]
    room = most
    for part in parts:
        view = memoryview(part).cast("B") if len(part) else memoryview(b"")
        while view:
            if not room:
                pieces.append([])
                room = most
            pieces[-1].append(view[:room])
            view, room = view[room:], max(room - len(view), 0)
    return pieces
