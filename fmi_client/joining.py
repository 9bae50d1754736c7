"""What a driver sees of an endpoint that has to join its job first: by a server, or by a store."""

from __future__ import annotations

from collections.abc import Callable

from fmi_client.endpoint import Allocate, Endpoint
from fmi_client.errors import FmiError
from fmi_client.join_request import JoinRequest
from fmi_client.transport.reactor import Reactor

LEAVE_SECONDS = 0.5
"""How long server or store may take to hear our goodbye."""

MISSING_SECONDS = 0.5
"""How long they may take to say who is missing. They are asked before the deadline: ranks
that give up at the same moment would otherwise name each other."""


class Joining(Endpoint):
    """An endpoint of a rank that joins what `request` names.

    Drivers `connect` and wait until it is `settled`. `ask_before` the time is over they
    `ask_missing`, and at the end they raise `failure`, or `join_error`.
    """

    def __init__(self, reactor: Reactor, request: JoinRequest, allocate: Allocate) -> None:
        super().__init__(request.rank, request.size, allocate)
        self._reactor = reactor
        self._request = request
        self._started = reactor.now()
        self._leaving = False

    @property
    def ready(self) -> bool:
        """Whether all ranks of the job are there, or were once."""
        raise NotImplementedError

    @property
    def settled(self) -> bool:
        """Whether joining has ended, well or not."""
        return self.ready or self.failure is not None

    def connect(self) -> None:
        """Begin to join; `on_change` is called when it is `settled`."""
        raise NotImplementedError

    def ask_missing(self) -> None:
        """Ask who has not come; what `join_error` returns names them, if the answer comes."""
        raise NotImplementedError

    def join_error(self) -> FmiError:
        """Return what to raise when the time for joining was not enough."""
        raise NotImplementedError

    def _joined(self) -> None:
        self.join_seconds = self._reactor.now() - self._started
        self.on_change()

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._reactor.call_later(seconds, call)


def ask_before(timeout: float) -> float:
    """Return how many seconds before the end of `timeout` to ask who is missing."""
    return min(MISSING_SECONDS, timeout / 4)
