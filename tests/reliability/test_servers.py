"""Several servers behind one load balancer share their jobs."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import pytest_asyncio

from fmi_client.communicator import Communicator
from fmi_client.errors import RankFailed, RendezvousError, ServerDraining
from tests.reliability.certificates import write_certificate
from tests.reliability.cluster import Cluster, cluster
from tests.reliability.restarts import Place, join, leave
from tests.support import until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.alone]

SECONDS = 10.0
"""For a job to go on after the death of its server."""

JOBS = itertools.count()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path_factory.mktemp("redis")) as servers:
        yield servers


@pytest_asyncio.fixture(loop_scope="module")
async def here(servers: Cluster) -> Cluster:
    await servers.mend(f"job{next(JOBS)}")
    return servers


async def total(comm: Communicator) -> float:
    return float((await comm.allreduce(np.full(100, comm.rank + 1.0)))[0])


def expected(size: int = 8) -> float:
    return size * (size + 1) / 2


async def work(ranks: list[Communicator], over: asyncio.Event) -> None:
    """Compute until it is over, by rank 0's word."""

    async def one(comm: Communicator) -> None:
        done = False
        while not done:
            assert await total(comm) == expected()
            done = await comm.bcast(over.is_set(), 0)

    await asyncio.gather(*map(one, ranks))


async def link_all(ranks: list[Communicator]) -> None:
    """Each with each: most of these links are made only now."""
    await asyncio.gather(*(comm.alltoall(list(range(len(ranks)))) for comm in ranks))


@pytest.mark.parametrize("channel", ["direct", "relay"])
async def test_ranks_that_reach_different_servers_are_one_job(channel: str, here: Cluster) -> None:
    ranks = await here.all_join(channel=channel)
    assert await asyncio.gather(*map(total, ranks)) == [expected()] * 8
    # The balancer goes round: of 8 ranks at least two thirds, rounded down, were carried.
    assert here.seen("carried") >= 5
    assert (await here.owner()).seen["joined"] == 8
    await leave(ranks)


@pytest.mark.parametrize("channel", ["auto", "relay"])
async def test_a_server_that_only_carries_dies_without_losing_anybody(
    channel: str, here: Cluster
) -> None:
    ranks = await here.all_join(channel=channel)
    over = asyncio.Event()
    working = asyncio.ensure_future(work(ranks, over))
    owner, edge = await here.owner(), await here.edge()
    await asyncio.wait([working], timeout=0.2)
    await edge.kill()
    await owner.event("rejoined", count=edge.seen["carried"])
    over.set()
    await working
    await link_all(ranks)
    assert not owner.seen["lost"]
    await leave(ranks)


@pytest.mark.parametrize("channel", [pytest.param("auto", marks=pytest.mark.nightly), "relay"])
async def test_the_jobs_server_dies_before_its_ranks_are_linked(
    channel: str, here: Cluster
) -> None:
    ranks = await here.all_join(channel=channel)
    await (await here.owner()).kill()
    begun = time.monotonic()
    assert await asyncio.gather(*map(total, ranks)) == [expected()] * 8
    assert time.monotonic() - begun < SECONDS
    await leave(ranks)


async def test_the_jobs_server_dies_while_ranks_join(here: Cluster) -> None:
    joining = [asyncio.ensure_future(here.join(rank)) for rank in range(6)]
    await until(lambda: here.seen("joined") == 6)
    await (await here.owner()).kill()
    begun = time.monotonic()
    joining += [asyncio.ensure_future(here.join(rank)) for rank in (6, 7)]
    ranks = await asyncio.gather(*joining)
    assert await asyncio.gather(*map(total, ranks)) == [expected()] * 8
    assert time.monotonic() - begun < SECONDS
    await leave(ranks)


async def test_a_rank_that_dies_behind_another_server_is_announced_at_once(here: Cluster) -> None:
    ranks = await here.all_join()
    edge = await here.edge()
    dead = (await edge.event("carried"))["rank"]
    waiting = [asyncio.ensure_future(comm.recv(dead)) for comm in ranks if comm.rank != dead]
    await asyncio.wait(waiting, timeout=0.1)
    begun = time.monotonic()
    ranks[dead]._endpoint._control.close()  # as the system does it for a process that is killed
    said = await asyncio.gather(*waiting, return_exceptions=True)
    assert time.monotonic() - begun < 1
    assert [(type(each), each.rank) for each in said] == [(RankFailed, dead)] * 7  # type: ignore[union-attr]
    assert all("was lost" in str(each) for each in said)
    await leave(ranks)


async def test_who_leaves_behind_another_server_is_not_lost(here: Cluster) -> None:
    ranks = await here.all_join()
    owner = await here.owner()
    await leave(ranks)
    await owner.event("ended")
    assert not owner.seen["lost"]


async def test_a_server_that_is_to_end_hands_over_its_jobs_at_once(here: Cluster) -> None:
    ranks = await here.all_join()
    owner = await here.owner()
    begun = time.monotonic()
    owner.signal(signal.SIGTERM)
    assert await owner.ends() == 0
    assert time.monotonic() - begun < 3  # alone, it would wait for the job's end
    await link_all(ranks)
    assert (await here.owner()) is not owner
    await leave(ranks)


def ready(place: Place) -> str:
    """What a server says to the balancer when asked whether it takes connections."""
    try:
        with urlopen(f"http://127.0.0.1:{place.admin_port}/readyz") as answer:
            return str(answer.read().decode())
    except OSError as error:
        return str(error)


async def test_without_redis_jobs_live_on_and_ranks_that_join_are_told_to_come_back(
    here: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = await here.all_join()
    owner, edge = await here.owner(), await here.edge()
    carried = edge.seen["carried"]
    await here.redis.kill()
    await link_all(ranks)
    with monkeypatch.context() as patch:
        patch.setattr("fmi_client.transport.control.DRAIN_SECONDS", 0.1)
        with pytest.raises(ServerDraining, match="registry does not answer"):
            await here.join(0, job="another")
    for place in here.servers:
        await place.event("registry lost")
        assert "503" in await asyncio.to_thread(ready, place)
    later = asyncio.ensure_future(here.join(0, 1, job="another"))
    await asyncio.wait([later], timeout=0.1)
    await here.redis.start()  # it knows nothing
    await leave([await later])
    for place in here.servers:
        await place.event("registry answers")
        assert await asyncio.to_thread(ready, place) == "ok\n"
    # Its server has claimed the job again: no second one comes of ranks that have to rejoin.
    await until_claimed(here)
    await edge.kill()
    await owner.event("rejoined", count=carried)
    assert await here.owner() is owner
    assert not owner.seen["lost"]
    await leave(ranks)


async def until_claimed(here: Cluster) -> None:
    async with asyncio.timeout(5), here.redis.client() as client:
        while not await client.exists(f"rendezvous:job:{here.job}"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("there", [1, pytest.param(4, marks=pytest.mark.nightly)])
async def test_a_job_of_a_server_that_was_given_up_is_not_split(there: int, here: Cluster) -> None:
    """The others come while the server, which lives, is struck off. The first rank is with that
    server itself, so that no other one can tell."""
    joining = [asyncio.ensure_future(here.join(rank)) for rank in range(there)]
    await until(lambda: here.seen("joined") == there)
    owner = await here.owner()
    name = await here.lists(owner)
    async with here.redis.client() as client:
        assert await client.zrem("rendezvous:servers", name)
    joining += [asyncio.ensure_future(here.join(rank)) for rank in range(there, 8)]
    ranks = await asyncio.gather(*joining)
    await link_all(ranks)
    await leave(ranks)


@pytest.mark.nightly
@pytest.mark.parametrize("channel", ["auto", "relay"])
@pytest.mark.parametrize("there", [4, 8])
async def test_a_server_that_is_frozen_for_longer_than_its_lease(
    there: int, channel: str, here: Cluster
) -> None:
    joining = [asyncio.ensure_future(here.join(rank, channel=channel)) for rank in range(there)]
    await until(lambda: here.seen("joined") == there)
    owner = await here.owner()
    owner.signal(signal.SIGSTOP)
    here.balancer.unhealthy = owner
    joining += [asyncio.ensure_future(here.join(rank, channel=channel)) for rank in range(there, 8)]
    async with asyncio.timeout(20):
        while await here.lists(owner):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    # Those that are not with the frozen server itself have gone to another one by now, or go there.
    await asyncio.wait(joining, timeout=1)
    owner.signal(signal.SIGCONT)
    here.balancer.unhealthy = None
    ranks = await asyncio.gather(*joining)
    await link_all(ranks)
    await leave(ranks)


@pytest.mark.nightly
async def test_ranks_that_are_carried_to_a_frozen_server_go_on_without_it(here: Cluster) -> None:
    ranks = await here.all_join()
    owner = await here.owner()
    edges = [place for place in here.servers if place is not owner]
    one, other = [ranks[(await place.event("carried"))["rank"]] for place in edges]
    owner.signal(signal.SIGSTOP)
    here.balancer.unhealthy = owner
    assert (await asyncio.gather(one.send("new", other.rank), other.recv(one.rank)))[1] == "new"
    owner.signal(signal.SIGCONT)
    here.balancer.unhealthy = None
    await link_all(ranks)
    await leave(ranks)


@pytest.mark.parametrize("jobs", [50, pytest.param(1000, marks=pytest.mark.nightly)])
async def test_ranks_that_begin_a_job_at_once_begin_one(jobs: int, here: Cluster) -> None:
    async def pair(job: str) -> None:
        ranks = await asyncio.gather(*(here.join(rank, 2, job=job) for rank in range(2)))
        await leave(ranks)

    for first in range(0, jobs, 50):
        await asyncio.gather(*(pair(f"{here.job}-{first + n}") for n in range(50)))
    assert here.seen("joined") == 2 * jobs
    # Which of the three begins a job is a race: one may lose them all.
    assert len([place for place in here.servers if place.seen["ready"]]) >= 2


async def live(here: Cluster, rank: int, size: int, channel: str, seed: int) -> Communicator:
    """Be a rank whose servers may be killed at any moment: nothing it does may fail."""
    random = np.random.default_rng([seed, rank])
    await asyncio.sleep(0.5 * random.random())
    comm = await here.join(rank, size, channel=channel, timeout=60.0)
    for step in range(1, size):
        await asyncio.sleep(0.3 * random.random())
        got = await comm.sendrecv((rank, step), (rank + step) % size, (rank - step) % size)
        assert got == ((rank - step) % size, step)
        assert await total(comm) == expected(size)
    return comm  # what it sent may be under way in a server still: who has left cannot repeat it


@pytest.mark.nightly
@pytest.mark.parametrize("channel", ["auto", "relay"])
@pytest.mark.parametrize("seed", range(10))
async def test_servers_are_killed_again_and_again(seed: int, channel: str, here: Cluster) -> None:
    """One at a time, at random moments, while ranks join, make links and work."""
    random = np.random.default_rng(seed)
    working = asyncio.gather(*(live(here, rank, 16, channel, seed) for rank in range(16)))
    kills = 0
    while not working.done():
        await asyncio.wait([working], timeout=0.5 * random.random())
        await here.servers[random.integers(3)].kill()
        await here.mend(here.job)
        kills += 1
    ranks = await working
    assert await asyncio.gather(*map(total, ranks)) == [expected(16)] * 16
    assert kills
    await leave(ranks)


async def test_ranks_in_tls_are_one_job_whichever_server_they_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their server carries them to the job's in plain, and lets no rank in that comes in plain."""
    cert_file, key_file = write_certificate(tmp_path)
    monkeypatch.setenv("FMI_TLS_CA", str(cert_file))
    files = ("--tls-cert", str(cert_file), "--tls-key", str(key_file))
    async with cluster(tmp_path, 3, *files) as here:
        await here.mend("sealed")
        address = "tls://" + here.balancer.address
        for channel in ("direct", "relay"):
            job = f"sealed-{channel}"
            ranks = await asyncio.gather(
                *(join(address, rank, 4, job=job, channel=channel) for rank in range(4))
            )
            await link_all(ranks)
            assert all(link["tls"] for comm in ranks for link in comm.stats()["links"].values())
            await leave(ranks)
        assert here.seen("carried") > 0
        for rank in range(3):  # the balancer takes each server in turn
            with pytest.raises(RendezvousError, match="tls://"):
                await here.join(rank, 3, timeout=2.0)
