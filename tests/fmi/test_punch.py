"""Direct connections: who gets one, who doesn't, and what the server's end means for them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import numpy as np
import pytest

import fmi_client
from fmi_client.errors import AuthenticationFailed, FmiError, RankFailed, RendezvousError
from fmi_client.protocol.peer import Handshake
from fmi_client.transport import sockets
from rendezvous_server.config import Config
from rendezvous_server.server import Server
from tests.support import KEY, run_ranks, serving, until


async def join(address: str, rank: int, size: int = 2, **more: Any) -> Any:
    arguments: dict[str, Any] = {"job": "job", "key": KEY, "timeout": 10} | more
    return await fmi_client.connect(address, rank=rank, size=size, **arguments)


@pytest.mark.parametrize(
    "keys", [(KEY, bytes(32)), (KEY, None)], ids=["another key", "keyed against unkeyed"]
)
async def test_ranks_that_cannot_prove_themselves_get_no_link(
    monkeypatch: pytest.MonkeyPatch, keys: tuple[Any, Any]
) -> None:
    monkeypatch.setattr("fmi_client.punches.PUNCH_SECONDS", 0.3)
    async with serving() as (_, address):
        ranks = await asyncio.gather(*(join(address, r, key=keys[r]) for r in range(2)))
        results = await asyncio.gather(*(c.barrier() for c in ranks), return_exceptions=True)
        for comm, error in zip(ranks, results, strict=True):
            assert isinstance(error, AuthenticationFailed)
            assert "same key" in str(error)
            assert error.peer == 1 - comm.rank
            assert error.op == "barrier"
            await comm.close()


async def test_strangers_at_the_door_change_nothing() -> None:
    """Garbage, silence, and somebody who claims to be the peer but cannot prove it."""
    async with serving() as (_, address):
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        claims = Handshake(1, 0, 0, None, b"c" * 16).hello
        itself = Handshake(0, 1, 0, None, b"c" * 16).hello
        callers = []
        for knock in (b"", b"GET / HTTP/1.0\r\n\r\n" * 9, claims, claims + bytes(32), itself):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", ranks[0]._endpoint._punches.port
            )
            writer.write(knock)
            callers.append((reader, writer))
        total = await asyncio.gather(*(comm.allreduce(np.ones(50_000)) for comm in ranks))
        assert all((each == 2).all() for each in total)
        for comm in ranks:
            await comm.close()
        for reader, writer in callers:
            with contextlib.suppress(ConnectionResetError):  # it may get a hello, then the end
                await asyncio.wait_for(reader.read(), 5)
            writer.close()


async def test_links_are_made_only_when_they_are_needed() -> None:
    async def rank(comm: Any) -> set[int]:
        await comm.barrier()
        return set(comm.stats()["links"])

    results = await run_ranks(8, rank, "tcp")
    for r, links in enumerate(results):
        assert links == {(r + d) % 8 for d in (1, 2, 4, -1, -2, -4)}


@pytest.mark.parametrize("soon", [True, False], ids=["all time", "the deadline"])
async def test_links_outlive_the_server_but_new_ones_need_it(
    soon: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmi_client.socket_endpoint.REJOIN_SECONDS", 0.1 if soon else 60)
    async with serving() as (server, address):
        ranks = await asyncio.gather(*(join(address, r, 4) for r in range(4)))
        await asyncio.gather(*(ranks[r].sendrecv(r, r ^ 1) for r in range(4)))
        await server.stop()
        assert await asyncio.gather(*(ranks[r].sendrecv(r, r ^ 1) for r in range(4))) == [
            1,
            0,
            3,
            2,
        ]
        with pytest.raises(RendezvousError, match="connection to the server lost") as caught:
            await ranks[0].send(1, 2, timeout=0.5)
        assert ("no other came within 0.1 s" in str(caught.value)) is soon
        for comm in ranks:
            await comm.close()


async def test_many_ranks_at_once_in_one_loop() -> None:
    async def rank(comm: Any) -> list[Any]:
        await comm.barrier()
        total = await comm.allreduce(np.arange(1000))
        return [int(total[1]), await comm.gather(comm.rank)]

    results = await run_ranks(24, rank, "tcp")
    assert results[0] == [24, list(range(24))]
    assert results[1:] == [[24, None]] * 23


async def test_large_messages_both_ways_at_once() -> None:
    big = np.random.default_rng(0).bytes(20_000_000)

    async def rank(comm: Any) -> bool:
        first = await comm.sendrecv(big, 1 - comm.rank)
        second, _ = await asyncio.gather(
            comm.recv(1 - comm.rank, 5), comm.send(big, 1 - comm.rank, 5)
        )
        return bool(first == big and second == big)

    assert await run_ranks(2, rank, "tcp") == [True, True]


async def test_a_rank_lost_before_the_link_is_made_is_named() -> None:
    async with serving() as (_, address):
        ranks = await asyncio.gather(*(join(address, r, 3) for r in range(3)))
        pending = asyncio.ensure_future(ranks[0].recv(1))
        await asyncio.sleep(0)
        ranks[1]._endpoint._control.close()  # as when its process is killed
        with pytest.raises(FmiError, match="rank 1 was lost"):
            await pending
        for comm in ranks:
            await comm.close()


@pytest.mark.parametrize("loops", [0, 3, 8, 15])
async def test_a_peer_that_leaves_while_the_link_is_made_is_noticed(loops: int) -> None:
    """Whatever moment it chooses: an answer or RankFailed at once, never a wait in vain."""
    async with serving() as (_, address):
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        pending = asyncio.ensure_future(ranks[0].recv(1, timeout=5))
        for _ in range(loops):
            await asyncio.sleep(0)
        await ranks[1].close()
        with pytest.raises(RankFailed, match="left"):
            await pending
        await ranks[0].close()


async def test_a_link_works_at_once() -> None:
    """Its four handshake messages must not wait for delayed acknowledgements (40 ms each)."""
    async with serving() as (_, address):
        loop = asyncio.get_running_loop()
        best = 1.0
        for _ in range(5):
            pair = await asyncio.gather(*(join(address, r) for r in range(2)))
            begun = loop.time()
            await asyncio.gather(*(comm.barrier() for comm in pair))
            best = min(best, loop.time() - begun)
            for comm in pair:
                await comm.close()
        assert best < 0.03


async def test_ranks_that_wait_rejoin_a_server_that_comes_back() -> None:
    async with serving() as (server, address):
        port = int(address.split(":")[1])
        waiting = asyncio.ensure_future(join(address, 0))
        await until(lambda: server.registry.ranks > 0)
        await server.stop()
    config = Config("127.0.0.1", port, -1, None, False, 600.0)
    again = Server(config)
    await again.start()
    second = await join(address, 1)
    first = await waiting
    assert await asyncio.gather(first.allreduce(1), second.allreduce(2)) == [3, 3]
    await asyncio.gather(first.close(), second.close())
    await again.stop()


def test_a_rank_leaves_the_servers_port_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would connect to itself until a server on its machine, which cannot start, answers."""
    with contextlib.closing(sockets.bound_socket(0)) as server:
        port = server.getsockname()[1]
        ports = iter([port, 0])
        bound = sockets.bound_socket
        monkeypatch.setattr(
            sockets, "bound_socket", lambda at, *more: bound(at or next(ports, 0), *more)
        )
        pair = sockets.bound_pair(but=port)
        assert port not in {each.getsockname()[1] for each in pair}
        for each in pair:
            each.close()
