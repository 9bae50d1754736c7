"""The async communicator: drives the algorithms on a running asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator, Sequence
from types import TracebackType
from typing import Any, Self

from fmi_client import channels
from fmi_client.calls import LAST_SECONDS, STUCK_SECONDS, Call, UnderWay
from fmi_client.collectives import Step
from fmi_client.endpoint import Endpoint, MemoryEndpoint
from fmi_client.hints import Choice
from fmi_client.join_request import JoinRequest
from fmi_client.joining import LEAVE_SECONDS, Joining, ask_before
from fmi_client.operations import Operations
from fmi_client.payloads import allocate
from fmi_client.protocol.transfers import Receive
from fmi_client.transport.reactor import AsyncReactor

LOOP_TURNS = 3
"""A task that gives way goes on before the loop has called back what it found to be ready."""


class Communicator(Operations):
    """Operations to be awaited; several may be under way at once on one communicator.

    Ranks must begin their collectives in the same order; each has its number from the
    moment of the call. `connect` makes it; as ``async with`` it leaves the job at the end, and an
    exception inside aborts it on all ranks.
    """

    async def _drive(self, call: Call) -> Any:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        deadline = begun + call.timeout
        try:
            self._begin(call)
            step = call.steps.send(None)
            while True:
                step = call.steps.send(await self._perform(step, call, deadline, loop))
        except StopIteration as stop:
            return stop.value
        except BaseException as error:
            self._interrupted(call, error)
            raise
        finally:
            self._spent(call, loop.time() - begun)

    def _run(self, call: Call) -> Any:
        return self._drive(call)

    async def _perform(
        self, step: Step, call: Call, deadline: float, loop: asyncio.AbstractEventLoop
    ) -> Receive | None:
        under_way = self._post(step, call)
        if not under_way.done:
            await self._wait(under_way, min(deadline, loop.time() + STUCK_SECONDS), loop)
        if not under_way.done:
            await self._wait_longer(call, under_way, deadline, loop)
        if not under_way.done:
            self._late(call, under_way)
            await self._wait(under_way, loop.time() + LAST_SECONDS, loop)
        self._check(call, under_way)
        return under_way.received

    async def _wait_longer(
        self, call: Call, under_way: UnderWay, deadline: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._ask(call)
        if not call.stuck:
            await self._wait(under_way, deadline, loop)
            return
        self._endpoint.make_room(True)
        try:
            await self._wait(under_way, deadline, loop)
        finally:
            self._endpoint.make_room(False)

    async def _wait(
        self, under_way: UnderWay, deadline: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Wait until a step is done, or the deadline has passed."""
        if under_way.done:
            return
        future = loop.create_future()

        def wake(late: bool = False) -> None:
            if (late or under_way.done) and not future.done():
                future.set_result(None)

        open_halves = [half for half, _ in under_way.halves() if not half.done]
        for half in open_halves:
            half.on_done = wake
        timer = loop.call_at(deadline, wake, True)
        try:
            await future
        finally:
            timer.cancel()
            for half in open_halves:
                half.on_done = None

    async def poll(self) -> None:
        """Take in what has come, without waiting; `Operations.poll` says what for.

        Raises:
            FmiError: what the next operation would raise now.
        """
        self._endpoint.look()
        for _ in range(LOOP_TURNS):
            await asyncio.sleep(0)
        self.raise_ended("poll")

    def part(self, group: Sequence[int], context: int) -> Self:
        """Return a communicator of some ranks of the job; see `Caller.part`."""
        return type(self)(self._endpoint, group, context, self.timeout, whole_job=False)

    def abort(self, reason: str = "") -> Awaitable[None]:
        """End the job on all ranks at once: whatever they wait for raises `Aborted`.

        Args:
            reason: what the others' errors say, as ``reason``.

        Returns:
            what may be awaited, but need not be.
        """
        super().abort(reason)
        return _Done()

    async def close(self) -> None:
        """Leave the job in order; a communicator made by `split` leaves nothing.

        Waits some seconds at most for the server to hear of it, and raises no error of the job.
        The others go on; one that needs us raises `RankFailed`.
        """
        if not self._whole_job:
            return
        try:
            self._endpoint.leave()
            if not self._endpoint.left:
                await _until(self._endpoint, lambda: self._endpoint.left, LEAVE_SECONDS)
        finally:
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


class _Done:
    """Nothing to wait for."""

    def __await__(self) -> Generator[Any, None, None]:
        yield from ()


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
    server: str | None,
    *,
    job: str,
    rank: int,
    size: int,
    key: bytes | str | None = None,
    token: str | None = None,
    epoch: int = 0,
    timeout: float = 30.0,
    channel: str | Choice = "auto",
    store: str | None = None,
) -> Connecting:
    """Join `job` as `rank` of `size`; returns when all are there.

    Args:
        server: the rendezvous server's "host:port" or "[v6]:port" (port 10000 by default); with
            "tls://" before it, everything is encrypted, to the server and between ranks. None
            where there is a store.
        job: the job's name; all ranks give the same.
        rank: this process's number, from 0.
        size: the number of all ranks.
        key: 32 bytes (or 64 hexadecimal digits) that only the job's ranks know; default FMI_KEY.
        token: what admits the job to the server, from `make_token`; default FMI_TOKEN.
        epoch: number of the attempt; ranks of an older one are refused.
        timeout: seconds, for joining and as the default of every operation.
        channel: how ranks reach each other: "auto" (directly, or else relayed by the server),
            "direct" (never relayed), "relay" (always), "object" (through `store`, without the
            server). With FMI's hints "fast" and "cheap", or a `choose`, "auto" or "object" is
            taken, whichever is predicted to be that of what `server` and `store` allow. All ranks
            give the same, and with a hint the same places. docs/channels.md says when to use which.
        store: "s3://bucket/prefix", or a folder that all ranks mount; for "object" and hints.

    Returns:
        what ``async with`` enters, or ``await`` turns into a `Communicator`. Only then is
        anything sent.

    Raises:
        ValueError: rank, size, key, token, server, channel or store are malformed.
        RendezvousError: the server (or store) cannot be reached or refuses (its subclasses say
            why). After it, as after all of these, nothing is left open, and one may try again.
        JoinTimeout: not all ranks came; ``missing`` lists them.
    """
    return Connecting(
        JoinRequest.make(server, job, rank, size, key, token, epoch, timeout, channel, store)
    )


async def _join(request: JoinRequest) -> Communicator:
    loop = asyncio.get_running_loop()
    place = await loop.run_in_executor(None, channels.find, request)
    endpoint = channels.endpoint(AsyncReactor(loop), place, request, allocate)
    communicator = Communicator(endpoint, range(endpoint.size), 0, request.timeout)
    try:
        endpoint.connect()
        await _wait_ready(endpoint, request.timeout)
    except BaseException:
        await communicator.close()
        raise
    return communicator


async def _wait_ready(endpoint: Joining, timeout: float) -> None:
    ask = ask_before(timeout)
    if not await _until(endpoint, lambda: endpoint.settled, timeout - ask):
        endpoint.ask_missing()
        if not await _until(endpoint, lambda: endpoint.settled, ask):
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

    Args:
        size: number of ranks; the list holds one communicator for each, in rank order.
        timeout: seconds, the default of every operation.
    """
    endpoints: list[MemoryEndpoint] = []
    endpoints += [MemoryEndpoint(rank, endpoints, size, allocate) for rank in range(size)]
    return [Communicator(endpoint, range(size), 0, timeout) for endpoint in endpoints]
