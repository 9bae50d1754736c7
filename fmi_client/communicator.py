"""The async communicator: drives the algorithms on a running asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from types import TracebackType
from typing import Any, Self

from fmi_client.collectives import Step
from fmi_client.endpoint import MemoryEndpoint, SocketEndpoint, from_environment, resolve
from fmi_client.errors import FmiError
from fmi_client.operations import Call, Operations
from fmi_client.payloads import allocate
from fmi_client.protocol.auth import Token
from fmi_client.protocol.peer import Receive
from fmi_client.transport.link import Send
from fmi_client.transport.reactor import AsyncReactor
from fmi_client.transport.sockets import parse_endpoint

MISSING_SECONDS = 0.5
"""After the deadline of a join, how long the server may take to say who is missing."""


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

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._communicator: Communicator | None = None

    def __await__(self) -> Generator[Any, None, Communicator]:
        return _join(**self._arguments).__await__()

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
    check_arguments(job, rank, size, epoch, timeout)
    raw_key, text = from_environment(key, token)
    return Connecting(
        server=parse_endpoint(server),
        job=job,
        rank=rank,
        size=size,
        key=raw_key,
        token=Token.parse(text) if text else None,
        epoch=epoch,
        timeout=timeout,
    )


def check_arguments(job: str, rank: int, size: int, epoch: int, timeout: float) -> None:
    """Refuse what no server should be bothered with.

    Raises:
        ValueError: the argument is named in the text.
    """
    if not job or len(job) > 256:
        raise ValueError("job must be a name of 1 to 256 characters")
    if size < 1:
        raise ValueError(f"size={size}: a job has at least one rank")
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank} is not a rank of a job of {size}: 0 … {size - 1}")
    if epoch < 0:
        raise ValueError(f"epoch={epoch} is negative")
    if timeout <= 0:
        raise ValueError(f"timeout={timeout} s leaves no time to join")


async def _join(server: tuple[str, int], timeout: float, **arguments: Any) -> Communicator:
    loop = asyncio.get_running_loop()
    address = await loop.run_in_executor(None, resolve, *server)
    endpoint = SocketEndpoint(AsyncReactor(loop), address, allocate=allocate, **arguments)
    changed = asyncio.Event()
    endpoint.on_change = changed.set
    try:
        endpoint.connect()
        await _wait_ready(endpoint, changed, timeout)
    except BaseException:
        endpoint.close()
        raise
    return Communicator(endpoint, range(endpoint.size), 0, timeout)


async def _wait_ready(endpoint: SocketEndpoint, changed: asyncio.Event, timeout: float) -> None:
    async def settled() -> None:
        while not endpoint.ready and endpoint.failure is None:
            changed.clear()
            await changed.wait()

    try:
        await asyncio.wait_for(settled(), timeout)
    except TimeoutError:
        changed.clear()
        endpoint.ask_missing()
        if endpoint.observed is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), MISSING_SECONDS)
        raise endpoint.join_error(timeout) from None
    if endpoint.failure is not None:
        raise endpoint.failure.fresh()


def memory_world(size: int, timeout: float = 30.0) -> list[Communicator]:
    """Return the communicators of a job whose ranks all live in the running loop.

    For tests and experiments: the same algorithms and messages, no sockets, no server.
    """
    endpoints: list[MemoryEndpoint] = []
    endpoints += [MemoryEndpoint(rank, endpoints, size, allocate) for rank in range(size)]
    return [Communicator(endpoint, range(size), 0, timeout) for endpoint in endpoints]
