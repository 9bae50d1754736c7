"""Ranks that cannot be linked directly meet on the server, and do not notice."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import uvloop

import fmi_client
from fmi_client.errors import FmiError, PunchFailed, RankFailed, RendezvousError
from fmi_client.protocol.relay import relay_request
from fmi_client.transport.knocking import Knocking
from rendezvous_server.reach import Reach
from rendezvous_server.relay import BUFFER_BYTES
from tests.support import KEY, logged, serving, until

pytestmark = pytest.mark.alone


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind NATs that no punch gets through: no attempt at an address comes to anything."""
    monkeypatch.setattr(Knocking, "start", lambda _: None)


async def join(address: str, rank: int, size: int = 2, **more: Any) -> Any:
    arguments: dict[str, Any] = {"job": "job", "key": KEY, "timeout": 10} | more
    return await fmi_client.connect(address, rank=rank, size=size, **arguments)


async def close(ranks: list[Any]) -> None:
    await asyncio.gather(*(comm.close() for comm in ranks))


@pytest.mark.usefixtures("unreachable")
async def test_collectives_do_not_know() -> None:
    async with serving() as (server, address):
        ranks = await asyncio.gather(*(join(address, r, 5) for r in range(5)))
        begun = time.monotonic()
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        assert time.monotonic() - begun < 1
        totals = await asyncio.gather(*(comm.allreduce(np.ones(300_000)) for comm in ranks))
        assert all((total == 5).all() for total in totals)
        gathered = await asyncio.gather(*(comm.gather(bytes(200_000)) for comm in ranks))
        assert [len(item) for item in gathered[0]] == [200_000] * 5
        kinds = {link["kind"] for comm in ranks for link in comm.stats()["links"].values()}
        assert kinds == {"relay"}
        assert server.relayed.pairs == 10
        assert server.relayed.bytes > 4 * 300_000 * 8
        await close(ranks)
        await until(lambda: not server.relayed.legs)


@pytest.mark.usefixtures("unreachable")
async def test_without_a_relay_the_link_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmi_client.punches.PUNCH_SECONDS", 0.3)
    async with serving(relay=False) as (_, address):
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        results = await asyncio.gather(*(c.barrier() for c in ranks), return_exceptions=True)
        assert all(isinstance(error, PunchFailed) for error in results)
        assert "does not relay" in str(results[0])
        await close(ranks)


async def test_a_direct_connection_is_preferred() -> None:
    async with serving() as (server, address):
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        for member in next(iter(server.registry.jobs)).members.values():
            # As behind a symmetric NAT.
            member.reach[4] = Reach(member.reach[4].seen, (("127.0.0.1", 9),))
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        assert [comm.stats()["links"][1 - comm.rank]["kind"] for comm in ranks] == ["direct"] * 2
        await close(ranks)


@pytest.mark.usefixtures("unreachable")
async def test_a_rank_that_dies_behind_the_relay_is_named() -> None:
    async with serving() as (_, address):
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        waiting = asyncio.ensure_future(ranks[0].recv(1))
        await asyncio.sleep(0)
        ranks[1]._endpoint._control.close()  # as when its process is killed
        with pytest.raises(RankFailed) as caught:
            await waiting
        assert caught.value.rank == 1
        await close(ranks)


@pytest.mark.usefixtures("unreachable")
async def test_a_job_that_relays_too_much_is_ended_and_told_why() -> None:
    async with serving(relay_bytes=1_000_000) as (server, address):
        ranks = await asyncio.gather(*(join(address, r, 3) for r in range(3)))
        others = await asyncio.gather(*(join(address, r, job="another") for r in range(2)))
        await asyncio.gather(*(comm.allreduce(np.ones(40_000)) for comm in others))
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        with logged() as logs:
            results = await asyncio.gather(
                ranks[0].send(bytes(20_000_000), 1),
                ranks[1].recv(0),
                ranks[2].recv(0),
                return_exceptions=True,
            )
        for rank, error in enumerate(results):
            assert type(error) is RendezvousError
            assert "job 'job' has relayed its limit of 1000000 bytes" in str(error)
            assert error.rank == rank
        assert ("relay limit", "job") in [(e["event"], e["job"]) for e in logs]
        assert server.counters.relay_limits == 1
        assert {leg.pair.job.name for leg in server.relayed.legs} == {"another"}
        totals = await asyncio.gather(*(comm.allreduce(np.ones(9)) for comm in others))
        assert all((total == 2).all() for total in totals)
        await close([*ranks, *others])


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize(("channel", "nat"), [("relay", False), ("auto", True), ("auto", False)])
async def test_pairs_over_the_limit_are_told_so(
    channel: str, nat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmi_client.transport.punch.RELAY_AFTER", 0.05)
    monkeypatch.setattr("fmi_client.transport.punch.LAST_SECONDS", 0.2)
    async with serving(relay_pairs=1) as (server, address):
        ranks = await asyncio.gather(*(join(address, r, 3, channel=channel) for r in range(3)))
        for member in next(iter(server.registry.jobs)).members.values():
            if nat:
                member.reach[4] = Reach(member.reach[4].seen, (("127.0.0.1", 9),))
        job = next(iter(server.registry.jobs))
        assert (await asyncio.gather(ranks[0].send(b"1", 1), ranks[1].recv(0)))[1] == b"1"
        begun = time.monotonic()
        results = await asyncio.gather(
            ranks[0].send(b"2", 2), ranks[2].recv(0), return_exceptions=True
        )
        assert time.monotonic() - begun < 2  # of the 10 that a punch may take
        assert any(isinstance(error, PunchFailed) for error in results)
        for error in results:
            assert isinstance(error, FmiError)
            assert "the server relays no more pairs of this job (--relay-pairs)" in str(error)
        assert server.counters.relay_limits >= 1
        await close(ranks)
        await until(lambda: job.relay_pairs == 0)


@pytest.mark.usefixtures("unreachable")
def test_a_receiver_that_stalls_costs_the_server_little() -> None:
    uvloop.run(_stall())  # loops differ in what they buffer; this is the server's


async def _stall() -> None:
    message = np.arange(12_500_000)
    async with serving() as (server, address):
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        before = server.relayed.bytes
        sending = asyncio.ensure_future(ranks[0].send(message, 1))
        held, passed = [0], -1
        while passed != server.relayed.bytes:  # until nothing moves any more
            passed = server.relayed.bytes
            await asyncio.wait([sending], timeout=0.1)
            held += [sum(leg._transport.get_write_buffer_size() for leg in server.relayed.legs)]
        assert not sending.done()
        assert server.relayed.bytes - before < 50_000_000
        assert 0 < max(held) <= BUFFER_BYTES  # which waits in the buffer that it was read into
        assert 2 * BUFFER_BYTES <= 256 * 1024
        assert np.array_equal(await ranks[1].recv(0), message)
        both = await asyncio.gather(*(comm.allreduce(message[:2_000_000]) for comm in ranks))
        assert all(np.array_equal(total, 2 * message[:2_000_000]) for total in both)
        await sending
        await close(ranks)


async def test_a_ticket_is_needed_and_good_for_once() -> None:
    async with serving() as (server, address):
        host, port = address.split(":")
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        job = next(iter(server.registry.jobs))
        for rank in (0, 1):
            outbox = server.registry.request(
                job.members[rank], {"t": "link", "peer": 1 - rank}, time.time()
            )
        ticket = outbox[0][1]["ticket"]
        first = await asyncio.open_connection(host, int(port))
        first[1].write(relay_request(ticket))
        await until(lambda: bool(server.relayed.legs))
        for bad in (ticket, b"x" * 16):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(relay_request(bad))
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        first[1].close()
        await close(ranks)


async def test_a_leg_that_waits_alone_ends_with_its_job() -> None:
    async with serving() as (server, address):
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        member = next(iter(server.registry.jobs)).members[0]
        server.registry._introduce(member, member.job.members[1], time.time())
        ticket = next(iter(server.registry.tickets._pairs))
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(relay_request(ticket))
        await until(lambda: len(server.relayed.legs) == 1)
        await close(ranks)  # its peer never came: nobody will
        await until(lambda: not server.relayed.legs)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
