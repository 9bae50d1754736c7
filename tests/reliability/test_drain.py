"""Row 14: a server that is asked to end, and the next one in its place."""

from __future__ import annotations

import asyncio
import signal
import time
from http.client import HTTPConnection

import pytest

from fmi_client.errors import ServerDraining
from tests.reliability.conftest import Measured
from tests.reliability.restarts import join, leave, server
from tests.support import serving, until

pytestmark = [pytest.mark.row(14), pytest.mark.alone]


def until_not_ready(port: int) -> float:
    """Ask /readyz again and again; returns the seconds until it says no."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    begun = time.monotonic()
    while True:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        answer.read()
        if answer.status == 503:
            connection.close()
            return time.monotonic() - begun


async def test_a_server_that_ends_hands_over_to_the_next_one(measured: Measured) -> None:
    async with server() as old:
        waiting = asyncio.ensure_future(join(old.address, 0, 2, job="waits"))
        linked = await asyncio.gather(*(join(old.address, r, 4) for r in range(4)))
        await asyncio.gather(linked[0].sendrecv(0, 1), linked[1].sendrecv(1, 0))
        await old.event("ready")
        old.signal(signal.SIGTERM)
        begun = time.monotonic()
        not_ready = await asyncio.to_thread(until_not_ready, old.admin_port)
        measured("SIGTERM to 503 from /readyz", 1e3 * not_ready, "ms", "< 100")
        await old.event("draining")
        ending = asyncio.ensure_future(old.ends())
        async with server(old.port) as new:
            # Who waited has been sent away, and comes to the new one by itself.
            await leave(await asyncio.gather(waiting, join(new.address, 1, 2, job="waits")))
            while not ending.done():
                await asyncio.gather(linked[0].sendrecv(0, 1), linked[1].sendrecv(1, 0))
            seconds = time.monotonic() - begun
            measured("SIGTERM to the end of the process, a job running", seconds, "s", "< 10")
            assert ending.result() == 0
            assert not_ready < 0.1
            assert seconds < 10
            # And who was linked rejoins it, where another link is needed.
            assert await asyncio.gather(*(comm.allreduce(1) for comm in linked)) == [4] * 4
            await leave(linked)


async def test_a_server_without_running_jobs_ends_at_once() -> None:
    """Also where many wait, who are sent away."""
    jobs = 300
    async with server() as place:
        waiting = [
            asyncio.ensure_future(join(place.address, 0, 2, job=f"job{n}")) for n in range(jobs)
        ]
        await place.event("joined", count=jobs)
        place.signal(signal.SIGTERM)
        begun = time.monotonic()
        assert await place.ends() == 0
        assert time.monotonic() - begun < 5
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)


@pytest.mark.parametrize(("patience", "timeout"), [(0.4, 30.0), (30.0, 0.4)])
async def test_who_is_sent_away_says_so_when_no_other_server_comes(
    patience: float, timeout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmi_client.transport.control.DRAIN_SECONDS", patience)
    async with serving() as (here, address):
        begun = time.monotonic()
        waiting = asyncio.ensure_future(join(address, 0, 2, timeout=timeout))
        await until(lambda: here.registry.ranks > 0)
        await here.drain()
        with pytest.raises(ServerDraining, match="shutting down") as caught:
            await waiting
        assert 0.4 <= time.monotonic() - begun < 3
        assert (caught.value.rank, caught.value.op) == (0, "connect")
