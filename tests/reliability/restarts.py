"""A rendezvous server that is killed, and another one in its place."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import fmi_client
from fmi_client.communicator import Communicator
from rendezvous_server.config import Config
from rendezvous_server.server import Server
from tests.support import KEY


class Place:
    """A port at which one server process after the other listens; 0: the first one's choice."""

    def __init__(
        self, port: int = 0, options: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self.port, self.admin_port = port, 0
        self._options, self._env = options, env
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.seen: Counter[str] = Counter()
        """How often each event was logged, by all its servers."""
        self._log: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start a server, and wait until it listens."""
        options = ["--port", str(self.port), "--admin-port", str(self.admin_port), *self._options]
        self._log = asyncio.Queue()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rendezvous_server", *options),
            stderr=asyncio.subprocess.PIPE,
            env=self._env,
        )
        self._reader = asyncio.create_task(self._read(self._process.stderr))
        listening = await self.event("listening")
        self.port, self.admin_port = listening["port"], listening["admin_port"]

    async def _read(self, lines: Any) -> None:
        async for line in lines:
            entry = json.loads(line)
            self.seen[entry["event"]] += 1
            self._log.put_nowait(entry)

    async def event(self, *names: str, count: int = 1) -> dict[str, Any]:
        """Wait until the server has logged `count` more lines with one of these events."""
        async with asyncio.timeout(20):
            while count:
                entry = await self._log.get()
                count -= entry["event"] in names
        return entry

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def ends(self) -> int:
        """Wait for the server's end; returns its exit code."""
        assert self._process is not None
        assert self._reader is not None
        code = await self._process.wait()
        await self._reader
        return code

    async def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            await self.ends()


@asynccontextmanager
async def server(port: int = 0, options: tuple[str, ...] = ()) -> AsyncIterator[Place]:
    """A place with a server."""
    place = Place(port, options)
    await place.start()
    try:
        yield place
    finally:
        await place.kill()


async def join(address: str, rank: int, size: int, **more: Any) -> Communicator:
    arguments: dict[str, Any] = {"job": "job", "key": KEY, "timeout": 30.0} | more
    return await fmi_client.connect(address, rank=rank, size=size, **arguments)


async def leave(ranks: list[Communicator]) -> None:
    await asyncio.gather(*(comm.close() for comm in ranks))


async def serve_here(port: int, secret: bytes | None = None) -> Server:
    """Start a server in this loop, at a port where another one was."""
    here = Server(Config("127.0.0.1", port, -1, secret, False, 600.0))
    await here.start()
    return here
