"""Several servers behind one load balancer share their jobs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from fmi_client.communicator import Communicator
from tests.reliability.cluster import Cluster, cluster
from tests.reliability.restarts import join, leave
from tests.support import until

SECONDS = 10.0


async def total(comm: Communicator) -> float:
    return float((await comm.allreduce(np.full(100, comm.rank + 1.0)))[0])


def expected(size: int = 8) -> float:
    return size * (size + 1) / 2


async def all_join(here: Cluster, size: int = 8, **more: object) -> list[Communicator]:
    return await asyncio.gather(*(join(here.address, r, size, **more) for r in range(size)))


@pytest.mark.parametrize("channel", ["direct", "relay"])
async def test_ranks_that_reach_different_servers_are_one_job(channel: str, tmp_path: Path) -> None:
    async with cluster(tmp_path) as here:
        ranks = await all_join(here, channel=channel)
        assert await asyncio.gather(*map(total, ranks)) == [expected()] * 8
        await leave(ranks)


@pytest.mark.parametrize("channel", ["auto", "relay"])
async def test_a_server_that_only_carries_dies_without_losing_anybody(
    channel: str, tmp_path: Path
) -> None:
    async with cluster(tmp_path) as here:
        ranks = await all_join(here, channel=channel)
        over = asyncio.Event()
        working = asyncio.ensure_future(work(ranks, over))
        owner, edge = await here.owner(), await here.edge()
        await asyncio.wait([working], timeout=0.2)
        await edge.kill()
        await owner.event("rejoined", count=edge.seen["carried"])
        await asyncio.wait([working], timeout=0.2)
        over.set()
        await working
        # Each with each: most of these links are made only now.
        await asyncio.gather(*(comm.alltoall(list(range(8))) for comm in ranks))
        assert not owner.seen["lost"]
        await leave(ranks)


async def work(ranks: list[Communicator], over: asyncio.Event) -> None:
    """Compute until it is over, by rank 0's word."""

    async def one(comm: Communicator) -> None:
        done = False
        while not done:
            assert await total(comm) == expected()
            done = await comm.bcast(over.is_set(), 0)

    await asyncio.gather(*map(one, ranks))


@pytest.mark.parametrize("channel", ["auto", "relay"])
async def test_the_jobs_server_dies_before_its_ranks_are_linked(
    channel: str, tmp_path: Path
) -> None:
    async with cluster(tmp_path) as here:
        ranks = await all_join(here, channel=channel)
        await (await here.owner()).kill()
        begun = time.monotonic()
        assert await asyncio.gather(*map(total, ranks)) == [expected()] * 8
        assert time.monotonic() - begun < SECONDS
        await leave(ranks)


async def test_the_jobs_server_dies_while_ranks_join(tmp_path: Path) -> None:
    async with cluster(tmp_path) as here:
        joining = [asyncio.ensure_future(join(here.address, r, 8)) for r in range(6)]
        await until_count(here, 6)
        await (await here.owner()).kill()
        begun = time.monotonic()
        joining += [asyncio.ensure_future(join(here.address, r, 8)) for r in (6, 7)]
        ranks = await asyncio.gather(*joining)
        assert await asyncio.gather(*map(total, ranks)) == [expected()] * 8
        assert time.monotonic() - begun < SECONDS
        await leave(ranks)


async def until_count(here: Cluster, ranks: int) -> None:
    """Wait until so many ranks have joined."""
    await until(lambda: sum(place.seen["joined"] for place in here.servers) == ranks, 10)
