"""A long day of a server and of a worker that stays warm: nothing may pile up."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

import fmi_client
from benchmarks.joins import jobs, join_all
from benchmarks.soak import Record, resident, slope, soak
from benchmarks.start import watch
from fmi_client.hosts import parse_endpoint
from tests.reliability.conftest import Measured
from tests.support import KEY, serving, until

pytestmark = pytest.mark.alone

MIB = 2**20
DAY_OF_JOINS = 8000
"""As many as 2,000 jobs of 4 ranks make: 20 minutes of 100 jobs a minute."""


@pytest.mark.row(18)
@pytest.mark.parametrize(
    ("rounds", "seconds", "count"),
    [
        pytest.param(1, 1.5, 15),
        pytest.param(
            30, 57.0, 100, marks=[pytest.mark.nightly, pytest.mark.timeout(2700)], id="30min"
        ),
    ],
)
def test_nothing_piles_up(rounds: int, seconds: float, count: int, measured: Measured) -> None:
    record = soak(rounds, seconds, count)
    _tell(record, measured)
    assert set(record.ends) <= {"well", "failed", "killed"}
    assert record.killed > 0
    first, last = record.samples[0], record.samples[-1]
    assert last.server[:2] == first.server[:2]
    assert last.client[:2] == first.client[:2]
    if rounds >= 20:
        # The allocator's heap finds its size in the first minutes.
        assert slope(record.samples[len(record.samples) // 3 :]) < MIB


def _tell(record: Record, measured: Measured) -> None:
    first, last = record.samples[0], record.samples[-1]
    minutes = f"{record.jobs} jobs"
    measured(f"{minutes}: ranks killed", 100 * record.killed / record.ranks, "%", "5")
    for who, one, other in (
        ("server", first.server, last.server),
        ("client", first.client, last.client),
    ):
        measured(f"{minutes}: tasks more, {who}", other.tasks - one.tasks, "", "0")
        measured(
            f"{minutes}: descriptors more, {who}", other.descriptors - one.descriptors, "", "0"
        )
    grown = (
        slope(record.samples[len(record.samples) // 3 :]) / MIB if len(record.samples) > 3 else 0
    )
    if grown:
        measured(f"{minutes}: the server grows in 20 minutes", grown, "MiB", "< 1")


@pytest.mark.row(18)
def test_twenty_minutes_of_joins_leave_no_memory_behind(measured: Measured) -> None:
    with watch() as server:
        at = parse_endpoint(server.address)
        join_all(at, jobs("warm", DAY_OF_JOINS // 4, 4), 32, die_every=20)
        before = resident(server.pid)
        join_all(at, jobs("day", DAY_OF_JOINS, 4), 32, die_every=20)
        grown = resident(server.pid) - before
    measured("8,000 joins, 5 % killed: the server grows by", grown / MIB, "MiB", "< 1")
    assert grown < MIB


@pytest.mark.row(18)
async def test_what_a_relay_held_is_free_at_once() -> None:
    """Its buffers are large, and the garbage collector, which counts objects, would be late."""
    gc.disable()
    try:
        async with serving() as (server, address):
            ranks = await asyncio.gather(
                *(
                    fmi_client.connect(
                        address, job="job", rank=r, size=2, key=KEY, channel="relay", timeout=10
                    )
                    for r in range(2)
                )
            )
            await asyncio.gather(*(comm.barrier() for comm in ranks))
            held = [weakref.ref(leg._buffer) for leg in server.relayed.legs]
            await asyncio.gather(*(comm.close() for comm in ranks))
            await until(lambda: not server.relayed.legs)
            assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
