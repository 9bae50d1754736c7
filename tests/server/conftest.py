"""A Redis, and two servers that share their jobs in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rendezvous_server.config import Config
from rendezvous_server.several import SharingServer
from tests.reliability.cluster import SECRET, Redis


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Redis]:
    redis = Redis(tmp_path)
    await redis.start()
    yield redis
    await redis.kill()


@pytest.fixture
async def two(redis: Redis) -> AsyncIterator[list[tuple[SharingServer, str]]]:
    """Two servers in this process, each with its address."""
    config = Config("127.0.0.1", 0, -1, SECRET, True, 60.0, redis_url=redis.url)
    servers = [SharingServer(config) for _ in range(2)]
    yield [(server, f"127.0.0.1:{await server.start()}") for server in servers]
    for server in servers:
        await server.drain(0.0)
        await server.stop()
