"""The blocking communicator: what a Lambda handler uses.

The same methods as the async one, each returning its result. All progress (also answering
a peer that wants a link) happens inside the calls, in the calling thread: no thread, no
event loop. Not to be shared between threads.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from fmi_client.collectives import Step
from fmi_client.errors import FmiError
from fmi_client.joining import (
    LEAVE_SECONDS,
    MISSING_SECONDS,
    JoinRequest,
    SocketEndpoint,
    resolve,
)
from fmi_client.operations import Call, Operations
from fmi_client.payloads import allocate
from fmi_client.protocol.peer import Receive
from fmi_client.transport.reactor import SyncReactor

__all__ = ["Communicator", "connect"]


class Communicator(Operations):
    """Operations that return when they are done."""

    def __init__(
        self,
        endpoint: SocketEndpoint,
        reactor: SyncReactor,
        group: Any,
        context: int,
        timeout: float,
    ) -> None:
        super().__init__(endpoint, group, context, timeout)
        self._reactor = reactor

    def _run(self, call: Call) -> Any:
        deadline = self._reactor.now() + call.timeout
        try:
            self._begin(call)
            step = call.steps.send(None)
            while True:
                step = call.steps.send(self._perform(step, call, deadline))
        except StopIteration as stop:
            return stop.value
        except FmiError:
            raise
        except BaseException as error:
            self._interrupted(call, error)
            raise

    def _perform(self, step: Step, call: Call, deadline: float) -> Receive | None:
        sent, received = self._post(step, call)

        def done() -> bool:
            return (sent is None or sent.done) and (received is None or received.done)

        if not done() and not self._reactor.run_until(done, deadline):
            self._late(step, sent, received, call)
        self._check(step, sent, received, call)
        return received

    def _child(self, group: list[int], context: int) -> Self:
        assert isinstance(self._endpoint, SocketEndpoint)
        return type(self)(self._endpoint, self._reactor, group, context, self.timeout)

    def close(self) -> None:
        """Leave the job in order."""
        self._endpoint.leave()
        self._reactor.run_until(lambda: self._endpoint.left, self._reactor.now() + LEAVE_SECONDS)
        self._endpoint.close()
        self._reactor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error is not None:
            self._tell_error(error)
        self.close()


def connect(
    server: str,
    *,
    job: str,
    rank: int,
    size: int,
    key: bytes | str | None = None,
    token: str | None = None,
    epoch: int = 0,
    timeout: float = 30.0,
) -> Communicator:
    """Join `job` as `rank` of `size`; the arguments and errors of `fmi_client.connect`."""
    request = JoinRequest.make(server, job, rank, size, key, token, epoch, timeout)
    reactor = SyncReactor()
    endpoint = SocketEndpoint(reactor, resolve(*request.server), request, allocate)
    communicator = Communicator(endpoint, reactor, range(size), 0, request.timeout)
    try:
        endpoint.connect()
        _wait_ready(endpoint, reactor, request.timeout)
    except BaseException:
        communicator.close()
        raise
    return communicator


def _wait_ready(endpoint: SocketEndpoint, reactor: SyncReactor, timeout: float) -> None:
    def settled() -> bool:
        return endpoint.ready or endpoint.failure is not None

    if not reactor.run_until(settled, reactor.now() + timeout):
        endpoint.ask_missing()
        if endpoint.observed is not None:
            answered = reactor.now() + MISSING_SECONDS
            reactor.run_until(lambda: endpoint.missing is not None, answered)
        raise endpoint.join_error()
    if endpoint.failure is not None:
        raise endpoint.failure.fresh()
