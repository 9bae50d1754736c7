"""The async communicator: drives the algorithms on a running asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self

from fmi_client.collectives import Step
from fmi_client.endpoint import Endpoint, MemoryEndpoint
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
from fmi_client.transport.link import Send
from fmi_client.transport.reactor import AsyncReactor


class Communicator(Operations):
    """Operations to be awaited; several may be under way at once on one communicator.

    Ranks must begin their collectives in the same order; each has its number from the
    moment of the call.
    """

    async def _drive(self, call: Call) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + call.timeout
        try:
            self._begin(call)
            step = call.steps.send(None)
            while True:
                step = call.steps.send(await self._perform(step, call, deadline, loop))
        except StopIteration as stop:
            return stop.value
        except FmiError:
            raise
        except BaseException as error:
            self._interrupted(call, error)
            raise

    def _run(self, call: Call) -> Any:
        return self._drive(call)

    async def _perform(
        self, step: Step, call: Call, deadline: float, loop: asyncio.AbstractEventLoop
    ) -> Receive | None:
        sent, received = self._post(step, call)
        for half in (sent, received):
            if half is not None and not half.done:
                await self._wait(half, deadline, loop, step, received)
        if (sent is not None and not sent.done) or (received is not None and not received.done):
            self._late(step, sent, received, call)
        self._check(step, sent, received, call)
        return received

    async def _wait(
        self,
        half: Send | Receive,
        deadline: float,
        loop: asyncio.AbstractEventLoop,
        step: Step,
        received: Receive | None,
    ) -> None:
        """Wait until half a step is done, or the deadline has passed."""
        future = loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        half.on_done = wake
        timer = loop.call_at(deadline, wake)
        try:
            await future
        except asyncio.CancelledError:
            if received is not None and step.source is not None:
                self._endpoint.link(self._group[step.source]).cancel(received)
            raise
        finally:
            half.on_done = None
            timer.cancel()

    def _child(self, group: list[int], context: int) -> Self:
        return type(self)(self._endpoint, group, context, self.timeout)

    async def close(self) -> None:
        """Leave the job in order."""
        self._endpoint.leave()
        if not self._endpoint.left:
            await _until(self._endpoint, lambda: self._endpoint.left, LEAVE_SECONDS)
        self._endpoint.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error is not None:
            self._tell_error(error)
        await self.close()


class Connecting:
    """What `connect` returns: to be entered with ``async with``, or awaited."""

    def __init__(self, request: JoinRequest) -> None:
        self._request = request
        self._communicator: Communicator | None = None

    def __await__(self) -> Generator[Any, None, Communicator]:
        return _join(self._request).__await__()

    async def __aenter__(self) -> Communicator:
        self._communicator = await self
        return self._communicator

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._communicator is not None:
            await self._communicator.__aexit__(kind, error, tb)


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
) -> Connecting:
    """Join `job` as `rank` of `size` through the rendezvous server; returns when all are there.

    Args:
        server: "host:port" (port 10000 by default).
        job: the job's name; all ranks give the same.
        rank, size: this process's number from 0, and the number of all.
        key: 32 bytes (or 64 hexadecimal digits) that only the job's ranks know; default FMI_KEY.
        token: what admits the job to the server, from `make_token`; default FMI_TOKEN.
        epoch: number of the attempt; ranks of an older one are refused.
        timeout: seconds, for joining and as the default of every operation.

    Raises:
        ValueError: rank, size, key, token or server are malformed.
        RendezvousError: the server cannot be reached or refuses (its subclasses say why).
        JoinTimeout: not all ranks came; ``missing`` lists them.
    """
    return Connecting(JoinRequest.make(server, job, rank, size, key, token, epoch, timeout))


async def _join(request: JoinRequest) -> Communicator:
    loop = asyncio.get_running_loop()
    address = await loop.run_in_executor(None, resolve, *request.server)
    endpoint = SocketEndpoint(AsyncReactor(loop), address, request, allocate)
    communicator = Communicator(endpoint, range(endpoint.size), 0, request.timeout)
    try:
        endpoint.connect()
        await _wait_ready(endpoint, request.timeout)
    except BaseException:
        await communicator.close()
        raise
    return communicator


async def _wait_ready(endpoint: SocketEndpoint, timeout: float) -> None:
    if not await _until(endpoint, lambda: endpoint.ready or endpoint.failure is not None, timeout):
        endpoint.ask_missing()
        if endpoint.observed is not None:
            await _until(endpoint, lambda: endpoint.missing is not None, MISSING_SECONDS)
        raise endpoint.join_error()
    if endpoint.failure is not None:
        raise endpoint.failure.fresh()


async def _until(endpoint: Endpoint, condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until `condition()`, looked at on every change of the endpoint; False if too late."""
    changed = asyncio.Event()
    endpoint.on_change = changed.set

    async def wait() -> None:
        while not condition():
            changed.clear()
            await changed.wait()

    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(wait(), timeout)
    return condition()


def memory_world(size: int, timeout: float = 30.0) -> list[Communicator]:
    """Return the communicators of a job whose ranks all live in the running loop.

    For tests and experiments: the same algorithms and messages, no sockets, no server.
    """
    endpoints: list[MemoryEndpoint] = []
    endpoints += [MemoryEndpoint(rank, endpoints, size, allocate) for rank in range(size)]
    return [Communicator(endpoint, range(size), 0, timeout) for endpoint in endpoints]
