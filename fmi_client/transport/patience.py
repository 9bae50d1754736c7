"""How long a rank waits for the next server, by the time in which it could notice one."""

from __future__ import annotations

from collections.abc import Callable

from fmi_client.transport.reactor import Reactor, Timer

MOMENT_SECONDS = 2.0
"""A rank that computed had no ear for the next server. When its patience is over, and before
a call fails for that reason, it gets so long: in it falls at least one attempt."""

LATE_SECONDS = 0.5
"""A timer that comes later than that tells of a rank that computed."""


class Patience:
    """Calls `over` when the time is over; not at once where nobody looked at sockets in it."""

    def __init__(self, reactor: Reactor, over: Callable[[], object]) -> None:
        self._reactor = reactor
        self._over = over
        self._timer: Timer | None = None

    def begin(self, seconds: float = MOMENT_SECONDS) -> None:
        """Wait for so long from now on."""
        self.end()
        due = self._reactor.now() + seconds
        self._timer = self._reactor.call_later(seconds, lambda: self._ring(due))

    def _ring(self, due: float) -> None:
        if self._reactor.now() - due > LATE_SECONDS:
            self.begin()
        else:
            self._over()

    def end(self) -> None:
        """Wait no more."""
        if self._timer is not None:
            self._timer.cancel()
