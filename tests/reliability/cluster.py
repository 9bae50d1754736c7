"""Several servers that share their jobs: a Redis, and a load balancer in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import os
import shutil
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from fmi_client.communicator import Communicator
from fmi_client.protocol.addresses import Address
from rendezvous_server.proxy import PROXY, SIGNATURE
from tests.reliability.restarts import Place, join
from tests.support import closed_port

SECRET = b"of the three servers"


class Redis:
    """A Redis server of one's own, which forgets all when it is killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = closed_port()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("no redis-server on this machine (apt-get install redis-server)")
        options = {"port": self.port, "bind": "127.0.0.1", "save": "", "dir": self._folder}
        self._process = await asyncio.create_subprocess_exec(
            binary,
            *itertools.chain(*((f"--{name}", str(value)) for name, value in options.items())),
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(10), self.client() as client:
            while True:
                with contextlib.suppress(redis.exceptions.ConnectionError):
                    await client.ping()
                    return
                await asyncio.sleep(0.01)

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def client(self) -> redis.asyncio.Redis:
        return redis.asyncio.Redis.from_url(self.url, decode_responses=True)

    async def kill(self) -> None:
        if self._process is not None and self.runs:
            self._process.kill()
            await self._process.wait()


class Balancer:
    """Sends each connection to the next server that takes it, and says from whom it is."""

    def __init__(self, servers: list[Place]) -> None:
        self.servers = servers
        self.port = 0
        self.unhealthy: Place | None = None
        """Gets no new connections."""
        self._next = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1000)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in self.servers:
            place = self.servers[self._next % len(self.servers)]
            self._next += 1
            if place is self.unhealthy:
                continue
            with contextlib.suppress(OSError):
                back, out = await asyncio.open_connection("127.0.0.1", place.port)
                out.write(header(writer.get_extra_info("peername"), ("127.0.0.1", self.port)))
                await asyncio.gather(_copy(reader, out), _copy(back, writer))
                return
        writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on bytes; the end of either side is that of both."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def header(source: Address, destination: Address) -> bytes:
    """What a balancer with version 2 of the PROXY protocol says first."""
    hosts = [ipaddress.ip_address(host).packed for host, _ in (source, destination)]
    ports = struct.pack("!HH", source[1], destination[1])
    return SIGNATURE + struct.pack("!BBH", PROXY, 0x11, 12) + b"".join(hosts) + ports


class Cluster:
    """All of it; each test has a job of its own."""

    def __init__(self, redis: Redis, servers: list[Place], balancer: Balancer) -> None:
        self.redis, self.servers, self.balancer = redis, servers, balancer
        self.job = ""

    async def mend(self, job: str) -> None:
        """Start again what a test has killed."""
        self.job = job
        if not self.redis.runs:
            await self.redis.start()
        ended = [place for place in self.servers if not place.runs]
        for place in ended:
            place.port = place.admin_port = 0  # a rank may have the old ones by now
        await asyncio.gather(*(place.start() for place in ended))
        for place in self.servers:
            place.seen.clear()

    async def join(self, rank: int, size: int = 8, **more: Any) -> Communicator:
        return await join(self.balancer.address, rank, size, **{"job": self.job} | more)

    async def all_join(self, size: int = 8, **more: Any) -> list[Communicator]:
        return await asyncio.gather(*(self.join(rank, size, **more) for rank in range(size)))

    def seen(self, event: str) -> int:
        """How often the servers have logged an event."""
        return sum(place.seen[event] for place in self.servers)

    async def owner(self, job: str = "") -> Place:
        """The server that has a job."""
        async with self.redis.client() as client:
            name = (await client.get(f"rendezvous:job:{job or self.job}")).split()[0]
        return next(place for place in self.servers if name.endswith(f":{place.port}"))

    async def lists(self, place: Place) -> str:
        """A server's name in Redis; empty: it was struck off."""
        async with self.redis.client() as client:
            names = await client.zrange("rendezvous:servers", 0, -1)
        return next((name for name in names if name.endswith(f":{place.port}")), "")

    async def edge(self) -> Place:
        """One that has not the test's job."""
        owner = await self.owner()
        return next(place for place in self.servers if place is not owner)


@asynccontextmanager
async def cluster(folder: Path, count: int = 3, *more: str) -> AsyncIterator[Cluster]:
    """Several servers with `more` options, which the first `mend` starts."""
    async with AsyncExitStack() as stack:
        redis = Redis(folder)
        stack.push_async_callback(redis.kill)
        options = ["--registry", redis.url, "--proxy-protocol", "--allow-anonymous"]
        options += ["--host", "127.0.0.1", *more]
        servers = [
            Place(options=options, env=os.environ | {"RENDEZVOUS_SECRET": SECRET.decode()})
            for _ in range(count)
        ]
        for place in servers:
            stack.push_async_callback(place.kill)
        balancer = Balancer(servers)
        stack.callback((await balancer.start()).close)
        yield Cluster(redis, servers, balancer)
