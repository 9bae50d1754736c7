"""What transports need of an event loop, so that one code serves both drivers.

All sockets are non-blocking and call back when they can be read or written. Under the
async driver the calls come from asyncio (or uvloop); under the sync driver from `poll`,
which runs only while the caller is inside an operation.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import select
import socket
import time
from collections.abc import Callable
from typing import Protocol

Callback = Callable[[], object]


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...


class Reactor(Protocol):
    """Readiness callbacks and timers; time is monotonic, in seconds."""

    def now(self) -> float: ...

    def watch(
        self, sock: socket.socket, read: Callback | None, write: Callback | None = None
    ) -> None:
        """Call back whenever `sock` is readable or writable; replaces an earlier watch."""

    def unwatch(self, sock: socket.socket) -> None:
        """Stop calling back; must precede `sock.close()`."""

    def call_later(self, delay: float, callback: Callback) -> Timer:
        """Call back once after `delay` seconds."""


class AsyncReactor:
    """A running asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.now = loop.time

    def watch(
        self, sock: socket.socket, read: Callback | None, write: Callback | None = None
    ) -> None:
        fd = sock.fileno()
        if read is None:
            self._loop.remove_reader(fd)
        else:
            self._loop.add_reader(fd, read)
        if write is None:
            self._loop.remove_writer(fd)
        else:
            self._loop.add_writer(fd, write)

    def unwatch(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0 and not self._loop.is_closed():
            self.watch(sock, None)

    def call_later(self, delay: float, callback: Callback) -> Timer:
        return self._loop.call_later(delay, callback)


class _SyncTimer:
    __slots__ = ("callback", "cancelled")

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class SyncReactor:
    """Runs callbacks in the calling thread, for as long as `run_until` is told to."""

    def __init__(self) -> None:
        self.now = time.monotonic
        self._epoll = select.epoll()
        self._callbacks: dict[int, tuple[Callback | None, Callback | None]] = {}
        self._timers: list[tuple[float, int, _SyncTimer]] = []
        self._order = itertools.count()
        self._next: list[Callback] = []
        self.polled = self.now()
        """When sockets were last looked at."""

    def watch(
        self, sock: socket.socket, read: Callback | None, write: Callback | None = None
    ) -> None:
        if read is None and write is None:
            # Left registered, a hang-up would be reported for ever to nobody.
            return self.unwatch(sock)
        fd = sock.fileno()
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        before = self._callbacks.get(fd)
        self._callbacks[fd] = (read, write)
        if before is None:
            self._epoll.register(fd, events)
        elif (before[0] is None, before[1] is None) != (read is None, write is None):
            self._epoll.modify(fd, events)

    def unwatch(self, sock: socket.socket) -> None:
        if self._callbacks.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())

    def call_later(self, delay: float, callback: Callback) -> Timer:
        timer = _SyncTimer(callback)
        heapq.heappush(self._timers, (self.now() + delay, next(self._order), timer))
        return timer

    def soon(self, callback: Callback) -> None:
        """Call back once, after what is being done now."""
        self._next.append(callback)

    def run_until(self, done: Callable[[], bool], deadline: float) -> bool:
        """Serve sockets and timers until `done()`; False if `deadline` came first."""
        while not done():
            left = deadline - self.now()
            if left <= 0:
                self.poll(0.0)
                return done()
            self.poll(left)
        return True

    def poll(self, timeout: float) -> None:
        """Serve what is ready, waiting at most `timeout` seconds for something to be.

        Sockets come before timers: after a long computation, an answer that is there counts
        more than a deadline that has passed meanwhile.
        """
        if self._next:
            timeout = 0.0
        elif self._timers:
            timeout = max(0.0, min(timeout, self._timers[0][0] - self.now()))
        events_now = self._epoll.poll(timeout)
        self.polled = self.now()
        for fd, events in events_now:
            # A callback may have removed a later descriptor's watch.
            read, write = self._callbacks.get(fd, (None, None))
            if write and events & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
                write()
                read, _ = self._callbacks.get(fd, (None, None))
            if read and events & (select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP):
                read()
        self._run_timers()
        while self._next:
            self._next.pop(0)()

    def _run_timers(self) -> None:
        while self._timers and (self._timers[0][2].cancelled or self._timers[0][0] <= self.now()):
            _, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                timer.callback()

    @property
    def closed(self) -> bool:
        return self._epoll.closed

    def close(self) -> None:
        self._epoll.close()
