"""A rank that computes polls, and learns that the job is over while nobody waits for it."""

from __future__ import annotations

import asyncio
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvloop

import fmi_client
from fmi_client.communicator import Communicator, memory_world
from fmi_client.errors import Aborted, FmiError, RankFailed

BATCH = 0.05
"""Seconds that a rank computes between two polls."""


def compute(comm: Any, batches: int = 400) -> tuple[FmiError, float]:
    """Batch after batch, until a poll raises: what, and at what time."""
    for _ in range(batches):
        time.sleep(BATCH)
        try:
            comm.poll()
        except FmiError as error:
            return error, time.monotonic()
    raise AssertionError("nothing was heard")


def blocking(
    rank: int, where: dict[str, Any], then: Callable[[fmi_client.sync.Communicator], Any]
) -> Any:
    server = where.get("server")
    more = {name: value for name, value in where.items() if name != "server"}
    with fmi_client.sync.connect(server, job="poll", rank=rank, size=2, **more) as comm:
        comm.barrier()
        return then(comm)


@pytest.fixture(params=["server", "store"])
def where(request: pytest.FixtureRequest, address: str, tmp_path: Path) -> dict[str, Any]:
    if request.param == "server":
        return {"server": address}
    return {"server": None, "channel": "object", "store": str(tmp_path)}


def test_an_abort_reaches_a_rank_that_computes(where: dict[str, Any]) -> None:
    said: list[float] = []

    def give_up(comm: fmi_client.sync.Communicator) -> None:
        for _ in range(3):
            comm.poll()  # does no harm, and says nothing
        said.append(time.monotonic())
        comm.abort("no more rows")

    with ThreadPoolExecutor(2) as pool:
        computing = pool.submit(blocking, 0, where, compute)
        pool.submit(blocking, 1, where, give_up).result()
        error, heard = computing.result()
    assert isinstance(error, Aborted)
    assert (error.by, error.reason, error.op, error.rank) == (1, "no more rows", "poll", 0)
    assert heard - said[0] < 5


DYING = """
import os, sys, fmi_client
comm = fmi_client.sync.connect(sys.argv[1], job="poll", rank=1, size=2)
comm.barrier()
os._exit(9)
"""


def test_a_death_reaches_a_rank_that_computes(address: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(blocking, 0, {"server": address}, compute)
        subprocess.run([sys.executable, "-c", DYING, address], timeout=50)
        died = time.monotonic()
        error, heard = computing.result()
    assert isinstance(error, RankFailed)
    assert (error.rank, error.op) == (1, "poll")
    assert heard - died < 5


def test_the_next_operation_raises_the_same(address: str) -> None:
    def twice(comm: fmi_client.sync.Communicator) -> None:
        first, _ = compute(comm)
        for again in (comm.poll, comm.barrier):
            with pytest.raises(Aborted, match=r"no more"):
                again()
        assert first.args

    with ThreadPoolExecutor(2) as pool:
        computing = pool.submit(blocking, 0, {"server": address}, twice)
        pool.submit(blocking, 1, {"server": address}, lambda comm: comm.abort("no more"))
        computing.result()


def test_who_leaves_in_order_disturbs_nobody(where: dict[str, Any]) -> None:
    gone = threading.Event()

    def go_on(comm: fmi_client.sync.Communicator) -> int:
        assert gone.wait(50)
        for _ in range(20):
            comm.poll()
            time.sleep(BATCH)
        return comm.rank

    with ThreadPoolExecutor(2) as pool:
        staying = pool.submit(blocking, 0, where, go_on)
        pool.submit(blocking, 1, where, lambda comm: None).result()
        gone.set()
        assert staying.result() == 0


def test_polling_carries_on_what_was_begun(address: str) -> None:
    def receive(comm: fmi_client.sync.Communicator) -> Any:
        request = comm.irecv(1)
        while not request._ended:
            comm.poll()
        return request.wait()

    with ThreadPoolExecutor(2) as pool:
        receiving = pool.submit(blocking, 0, {"server": address}, receive)
        pool.submit(blocking, 1, {"server": address}, lambda comm: comm.send([1, 2], 0))
        assert receiving.result() == [1, 2]


def test_a_closed_communicator(address: str) -> None:
    comm = fmi_client.sync.connect(address, job="alone", rank=0, size=1)
    comm.poll()
    comm.close()
    with pytest.raises(FmiError, match="closed"):
        comm.poll()


async def job(address: str, rank: int, **more: Any) -> Communicator:
    server = None if more else address
    return await fmi_client.connect(server, job="poll", rank=rank, size=2, **more)


async def _computing_in_a_loop(address: str, other: Callable[[], object]) -> FmiError:
    comm = await job(address, 0)
    async with comm:
        await comm.barrier()
        await comm.poll()
        other()
        # The loop stands still, as while computing, until what the server says is there.
        select.select([comm._endpoint._control._sock], [], [], 50)  # type: ignore[attr-defined]
        try:
            await comm.poll()
        except FmiError as error:
            return error
        raise AssertionError("one poll was not enough")


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_awaited_in_any_loop(address: str, factory: Any) -> None:
    go = threading.Event()

    def give_up(comm: fmi_client.sync.Communicator) -> None:
        assert go.wait(50)
        comm.abort("why")

    with ThreadPoolExecutor(1) as pool, asyncio.Runner(loop_factory=factory) as runner:
        other = pool.submit(blocking, 1, {"server": address}, give_up)
        error = runner.run(_computing_in_a_loop(address, go.set))
        other.result()
    assert isinstance(error, Aborted)
    assert (error.by, error.op) == (1, "poll")


async def test_awaited_through_a_store(tmp_path: Path) -> None:
    more: dict[str, Any] = {"channel": "object", "store": str(tmp_path)}
    comms = await asyncio.gather(*(job("", rank, **more) for rank in (0, 1)))
    await asyncio.gather(*(comm.barrier() for comm in comms))
    await comms[0].poll()
    comms[1].abort("why")

    async def polling() -> None:
        for _ in range(400):
            await comms[0].poll()
            await asyncio.sleep(BATCH)

    with pytest.raises(Aborted, match="why"):
        await polling()
    for comm in comms:
        await comm.close()


async def test_ranks_in_one_loop() -> None:
    comms = memory_world(2)
    await comms[0].poll()
    comms[1].abort("why")
    with pytest.raises(Aborted, match="why"):
        await comms[0].poll()
