"""What many tests share: jobs inside one event loop, and a server for them."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from socketserver import BaseServer
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import structlog

import fmi_client
from fmi_client.communicator import Communicator, memory_world
from fmi_client.protocol.addresses import format_address

if TYPE_CHECKING:  # loaded late: the lab's ranks, which import this, start hundreds of times
    from rendezvous_server.server import Server

KEY = bytes(range(32))

RankFunction = Callable[[Communicator], Awaitable[Any]]
S = TypeVar("S", bound=BaseServer)


@asynccontextmanager
async def serving(
    secret: bytes | None = None,
    *,
    allow_anonymous: bool = False,
    job_ttl: float = 600.0,
    host: str = "127.0.0.1",
    **more: Any,
) -> AsyncIterator[tuple[Server, str]]:
    """Run a rendezvous server in this loop; gives it and its address."""
    from rendezvous_server.config import Config
    from rendezvous_server.server import Server

    config = Config(host, 0, -1, secret, allow_anonymous, job_ttl, **more)
    server = Server(config)
    port = await server.start()
    try:
        yield server, format_address((host, port))
    finally:
        await server.stop()


@contextmanager
def logged(level: int = logging.INFO) -> Iterator[list[MutableMapping[str, Any]]]:
    """Collect what servers in this process log."""
    silent = structlog.get_config()["wrapper_class"]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    try:
        with structlog.testing.capture_logs() as entries:
            yield entries
    finally:
        structlog.configure(wrapper_class=silent)


@contextmanager
def in_thread(server: S) -> Iterator[S]:
    """Let a server of the standard library answer while the block runs."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def closed_port() -> int:
    """Return a port of this machine on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def close_by_reset(sock: socket.socket) -> None:
    """Let the close of a connection, which is left to the caller, be a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Wait, in this thread, until `condition()` is true of what it returns; returns that."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: waited {seconds:g} s in vain"
        time.sleep(0.005)  # a look costs whoever is awaited some of the machine
    return value


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Let the loop run until `condition()`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (it has no event to wait for)
            await asyncio.sleep(0)


async def run_ranks(
    size: int,
    function: RankFunction,
    link: Literal["memory", "tcp"] = "memory",
    timeout: float = 10.0,
    return_exceptions: bool = False,
) -> list[Any]:
    """Run `function(comm)` as each of `size` ranks of a job; returns their results."""
    async with AsyncExitStack() as stack:
        if link == "memory":
            worlds = memory_world(size, timeout)
        else:
            _, address = await stack.enter_async_context(serving())
            worlds = await asyncio.gather(
                *(
                    fmi_client.connect(
                        address, job="test", rank=r, size=size, key=KEY, timeout=timeout
                    )
                    for r in range(size)
                )
            )
        try:
            return await asyncio.gather(*map(function, worlds), return_exceptions=return_exceptions)
        finally:
            for comm in worlds:
                await comm.close()
