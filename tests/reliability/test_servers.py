"""Several servers behind one load balancer share their jobs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from fmi_client.communicator import Communicator
from tests.reliability.cluster import Cluster, cluster
from tests.reliability.restarts import join, leave


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
