"""Row 15: the server is killed, and comes back without a memory of anybody."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Collection

import numpy as np
import pytest

from fmi_client import make_token, sync
from fmi_client.communicator import Communicator
from fmi_client.errors import Aborted, ProtocolError, RankFailed, RendezvousError
from fmi_client.transport.control import Control
from tests.reliability.conftest import Measured
from tests.reliability.restarts import join, leave, serve_here, server
from tests.support import KEY, serving, until

pytestmark = [pytest.mark.row(15), pytest.mark.alone]

RANKS = 64
SECONDS = 10.0
OUTAGE = 0.1
"""Beside the half second in which the next server starts."""


async def total(comm: Communicator) -> float:
    return float((await comm.allreduce(np.full(100, comm.rank + 1.0)))[0])


def expected(size: int = RANKS) -> float:
    return size * (size + 1) / 2


@pytest.mark.parametrize("there", [pytest.param(1, marks=pytest.mark.nightly), 63])
async def test_ranks_whose_server_is_killed_while_they_join(there: int, measured: Measured) -> None:
    async with server() as place:
        joining = [asyncio.ensure_future(join(place.address, r, RANKS)) for r in range(there)]
        await place.event("joined", count=there)
        await place.kill()
        joining += [
            asyncio.ensure_future(join(place.address, r, RANKS)) for r in range(there, RANKS)
        ]
        await asyncio.wait(joining, timeout=OUTAGE)
        await place.start()
        back = time.monotonic()
        ranks = await asyncio.gather(*joining)
        assert await asyncio.gather(*map(total, ranks)) == [expected()] * RANKS
        seconds = time.monotonic() - back
        measured(
            f"restart with {there} of 64 ranks there: all ready, allreduce", seconds, "s", "< 10"
        )
        assert seconds < SECONDS
        await leave(ranks)


async def test_ranks_that_have_no_links_yet_make_them_at_the_next_server(
    measured: Measured,
) -> None:
    async with server() as place:
        ranks = await asyncio.gather(*(join(place.address, r, RANKS) for r in range(RANKS)))
        await place.kill()
        totals = [asyncio.ensure_future(total(comm)) for comm in ranks]
        await asyncio.wait(totals, timeout=OUTAGE)
        await place.start()
        back = time.monotonic()
        assert await asyncio.gather(*totals) == [expected()] * RANKS
        seconds = time.monotonic() - back
        measured("restart after ready: links made, allreduce", seconds, "s", "< 10")
        assert seconds < SECONDS
        await leave(ranks)


async def test_direct_links_do_not_notice(measured: Measured) -> None:
    """Collectives go on while there is no server, and while there is one again."""
    slowest = 0.0
    async with server() as place:
        ranks = await asyncio.gather(*(join(place.address, r, 8) for r in range(8)))
        await asyncio.gather(*map(total, ranks))
        await place.kill()
        restart = asyncio.ensure_future(place.start())
        rounds = 0
        while not all(comm._endpoint._control.losses for comm in ranks) or rounds < 100:
            begun = time.monotonic()
            assert await asyncio.gather(*map(total, ranks)) == [expected(8)] * 8
            slowest, rounds = max(slowest, time.monotonic() - begun), rounds + 1
        await restart
        while not all(comm._endpoint._control.present for comm in ranks):
            assert await asyncio.gather(*map(total, ranks)) == [expected(8)] * 8
        measured(
            "slowest allreduce of 8 while there is no server", 1e3 * slowest, "ms", "none fails"
        )
        # Recursive doubling leaves 0 and 3 without a link: it is made at the next server.
        sent = ranks[0].send("hello", 3)
        assert (await asyncio.gather(sent, ranks[3].recv(0)))[1] == "hello"
        await leave(ranks)


async def test_blocking_ranks_rejoin_whenever_they_look(measured: Measured) -> None:
    """Two are inside an operation when their server dies, two compute until the next one is up."""
    async with server() as place:
        up = asyncio.Event()
        loop = asyncio.get_running_loop()

        def rank(number: int) -> float:
            with sync.connect(
                place.address, job="job", rank=number, size=4, key=KEY, timeout=20
            ) as comm:
                if number < 2:
                    asyncio.run_coroutine_threadsafe(up.wait(), loop).result()
                return float(comm.allreduce(np.full(3, number + 1.0))[0])

        results = [asyncio.ensure_future(asyncio.to_thread(rank, r)) for r in range(4)]
        await place.event("ready")
        await place.kill()
        await asyncio.wait(results, timeout=OUTAGE)
        await place.start()
        up.set()
        back = time.monotonic()
        assert await asyncio.gather(*results) == [expected(4)] * 4
        seconds = time.monotonic() - back
        measured("restart under blocking ranks: links made, allreduce", seconds, "s", "< 10")
        assert seconds < SECONDS


async def test_one_poll_is_enough_to_rejoin() -> None:
    """Who computes for seconds between two of them would never end a handshake step by step."""
    async with serving() as (first, address):
        comm = await asyncio.to_thread(sync.connect, address, job="job", rank=0, size=1)
        await first.stop()
        second = await serve_here(int(address.split(":")[1]))
        await asyncio.to_thread(comm.poll)
        assert second.registry.ranks == 1
        await asyncio.to_thread(comm.close)
        await second.stop()


@pytest.mark.parametrize("heard", [False, True], ids=["it computes", "it has given up once"])
async def test_patience_that_ends_while_a_blocking_rank_computes(
    heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a call fails for that, there is an attempt to rejoin."""
    monkeypatch.setattr("fmi_client.socket_endpoint.REJOIN_SECONDS", 0.05)
    async with serving() as (first, address):
        blocking = asyncio.to_thread(
            sync.connect, address, job="job", rank=0, size=3, key=KEY, timeout=20
        )
        comm, *others = await asyncio.gather(blocking, *(join(address, r, 3) for r in (1, 2)))
        await first.stop()
        await asyncio.to_thread(comm.poll)  # which finds nobody
        if heard:
            with pytest.raises(RendezvousError, match="no other came"):
                await asyncio.to_thread(comm.recv, 1)
        second = await serve_here(int(address.split(":")[1]))
        await until(lambda: second.registry.ranks == 2)
        sending = asyncio.ensure_future(others[1].send("hello", 0))
        comm._reactor.now = lambda: time.monotonic() + 20
        assert await asyncio.to_thread(comm.recv, 2) == "hello"
        await sending
        await asyncio.gather(asyncio.to_thread(comm.close), leave(others))
        await second.stop()


async def test_an_address_that_takes_connections_and_answers_nobody_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By ranks that join, and by those that rejoin; the first time they are let in by the other."""
    monkeypatch.setattr("fmi_client.transport.control.AUTH_SECONDS", 0.1)
    async with serving() as (first, address):
        port = int(address.split(":")[1])
        where = (("127.0.0.2", port), ("127.0.0.1", port))
        monkeypatch.setattr("fmi_client.channels.resolve", lambda *_: where)
        with socket.create_server(where[0]):
            ranks = await asyncio.gather(*(join(address, r, 2) for r in range(2)))
            await first.stop()
            second = await serve_here(port)
            for comm in ranks:
                comm._endpoint._control._servers = where
            assert await asyncio.gather(*map(total, ranks)) == [expected(2)] * 2
        await leave(ranks)
        await second.stop()


async def test_who_gets_no_answer_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same port, which the system refuses for a minute to who closes in order."""
    monkeypatch.setattr("fmi_client.transport.control.AUTH_SECONDS", 0.1)
    ends, try_again = [], Control._try_again

    def noting(control: Control, codes: Collection[int], why: str) -> None:
        ends.append(why)
        try_again(control, codes, why)

    monkeypatch.setattr(Control, "_try_again", noting)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(RendezvousError, match=rf"{address}: no answer within 0\.[24] s"):
            await join(address, 0, 2, timeout=0.7)
    assert len(ends) > 1
    assert all("no answer" in why for why in ends)


@pytest.mark.parametrize("wrong", ["no server of ours", "another secret"])
async def test_a_wrong_server_is_not_the_last_word(wrong: str) -> None:
    """A balancer may answer while the next server starts, or one be started wrongly, once."""
    secret, odd = b"s" * 32, asyncio.Event()
    token = make_token(secret, job="job", size=2, expires=time.time() + 60)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        writer.close()
        odd.set()

    async with serving(secret) as (first, address):
        ranks = await asyncio.gather(*(join(address, r, 2, token=token) for r in range(2)))
        port = int(address.split(":")[1])
        await first.stop()
        if wrong == "another secret":
            other = await serve_here(port, b"t" * 32)
            await until(lambda: other.counters.refusals > 0)
            await other.stop()
        else:
            async with await asyncio.start_server(answer, "127.0.0.1", port):
                await odd.wait()
        second = await serve_here(port, secret)
        assert await asyncio.gather(*map(total, ranks)) == [expected(2)] * 2
        await leave(ranks)
        await second.stop()


async def test_what_is_no_rendezvous_server_is_called_that() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as web:
        port = web.sockets[0].getsockname()[1]
        with pytest.raises(ProtocolError, match=f"127.0.0.1:{port} is no rendezvous server"):
            await join(f"127.0.0.1:{port}", 0, 2)


async def test_a_server_that_dies_while_it_says_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (first, address):
        deliver = first.deliver
        monkeypatch.setattr(
            first, "deliver", lambda out: deliver([(m, said) for m, said in out if m.rank % 2])
        )
        joining = [asyncio.ensure_future(join(address, r, 8)) for r in range(8)]
        odd = await asyncio.gather(*joining[1::2])
        await first.stop()
        second = await serve_here(int(address.split(":")[1]))
        ranks = [*odd, *await asyncio.gather(*joining[::2])]
        assert await asyncio.gather(*map(total, ranks)) == [expected(8)] * 8
        assert second.registry.ranks == 8
        await leave(ranks)
        await second.stop()


async def test_who_leaves_while_there_is_no_server_does_not_wait_and_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    monkeypatch.setattr("rendezvous_server.registry.REJOIN_SECONDS", 0.5)
    monkeypatch.setattr("rendezvous_server.server.EXPIRY_PERIOD", 0.1)
    async with serving() as (first, address):
        ranks = await asyncio.gather(*(join(address, r, 3) for r in range(3)))
        await first.stop()
        waiting = asyncio.ensure_future(ranks[0].recv(1))
        await asyncio.wait([waiting], timeout=0.1)
        begun = time.monotonic()
        await ranks[1].close()
        seconds = time.monotonic() - begun
        measured("leaving while there is no server", 1e3 * seconds, "ms", "< 200")
        assert seconds < 0.2
        second = await serve_here(int(address.split(":")[1]))
        with pytest.raises(RankFailed, match="rank 1 did not come back") as caught:
            await waiting
        assert caught.value.rank == 1
        await leave(ranks)
        await second.stop()


async def test_an_abort_is_told_when_there_is_a_server_again() -> None:
    async with serving() as (first, address):
        ranks = await asyncio.gather(*(join(address, r, 2) for r in range(2)))
        await first.stop()
        waiting = asyncio.ensure_future(ranks[0].recv(1))
        await asyncio.wait([waiting], timeout=0.1)
        ranks[1].abort("out of luck")
        second = await serve_here(int(address.split(":")[1]))
        with pytest.raises(Aborted, match="out of luck"):
            await waiting
        await leave(ranks)
        await second.stop()


async def test_new_relayed_links_wait_for_the_next_server() -> None:
    async with serving() as (first, address):
        ranks = await asyncio.gather(*(join(address, r, 4, channel="relay") for r in range(4)))
        await first.stop()
        totals = [asyncio.ensure_future(total(comm)) for comm in ranks]
        await asyncio.wait(totals, timeout=OUTAGE)
        second = await serve_here(int(address.split(":")[1]))
        assert await asyncio.gather(*totals) == [expected(4)] * 4
        assert {link["kind"] for link in ranks[0].stats()["links"].values()} == {"relay"}
        await leave(ranks)
        await second.stop()


async def test_a_server_that_lived_refuses_the_rank_whose_line_broke() -> None:
    """The others have been told that it was lost: it must not go on as if it were not."""
    async with serving() as (here, address):
        ranks = await asyncio.gather(*(join(address, r, 2) for r in range(2)))
        job = next(iter(here.registry.jobs))
        job.members[1].connection._transport.abort()  # type: ignore[attr-defined]
        with pytest.raises(RankFailed, match="rank 1 was lost"):
            await ranks[0].recv(1)
        with pytest.raises(RendezvousError, match="goes on without rank 1"):
            await ranks[1].recv(0)
        await leave(ranks)


async def test_relayed_links_go_on_at_the_next_server() -> None:
    """Small messages that were under way are sent again, none twice, none in another order."""
    over = asyncio.Event()

    async def talk(comm: Communicator) -> int:
        number, peer, last = 0, 1 - comm.rank, False
        while not last:
            pieces = [bytes([number % 256]) * size for size in (1, 500, 9000)]
            last = over.is_set()
            for piece in (last, *pieces):
                await comm.send(piece, peer)
            said, *received = [await comm.recv(peer) for _ in range(4)]
            assert received == pieces, number
            last = said if comm.rank else last  # rank 0 says when
            number += 1
        return number

    async with server() as place:
        ranks = await asyncio.gather(
            *(join(place.address, r, 2, channel="relay") for r in range(2))
        )
        talks = asyncio.gather(*map(talk, ranks))
        await asyncio.wait([talks], timeout=0.2)
        await place.kill()
        await place.start()
        await place.event("rejoined", count=2)
        over.set()
        one, other = await talks
        assert one == other > 10
        assert {link["kind"] for link in ranks[0].stats()["links"].values()} == {"relay"}
        await leave(ranks)


async def test_who_lost_data_with_its_relay_says_so_and_blames_nobody() -> None:
    async with server() as place:
        ranks = await asyncio.gather(
            *(join(place.address, r, 2, channel="relay") for r in range(2))
        )
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        place.signal(signal.SIGSTOP)
        await ranks[0].send(b"small", 1)  # the system takes it, and nobody else
        await ranks[0].send(bytes(60_000), 1)
        receiving = asyncio.gather(
            *(comm.recv(1 - comm.rank) for comm in ranks), return_exceptions=True
        )
        await place.kill()
        await place.start()
        for error in await receiving:
            assert isinstance(error, RendezvousError | Aborted), error
            assert "the connection to the server was lost that relayed the link" in str(error)
        await leave(ranks)


async def test_what_the_caller_still_holds_is_sent_again() -> None:
    """Of any size, since the sender has not gone on; and small messages behind it."""
    data = np.random.default_rng(0).bytes(10_000_000)
    async with server() as place:
        ranks = await asyncio.gather(
            *(join(place.address, r, 2, channel="relay") for r in range(2))
        )
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        place.signal(signal.SIGSTOP)
        sending = asyncio.gather(*(ranks[0].send(each, 1) for each in (b"first", data, b"last")))
        receiving = asyncio.ensure_future(ranks[1].recv(0))
        await asyncio.wait([sending], timeout=0.1)
        assert ranks[0]._endpoint.links[1].busy
        await place.kill()
        await place.start()
        assert await receiving == b"first"
        assert await ranks[1].recv(0) == data
        assert await ranks[1].recv(0) == b"last"
        await sending
        await leave(ranks)


async def live(address: str, rank: int, size: int, channel: str, seed: int) -> float:
    """Be a rank whose server may be killed at any moment: nothing it does may fail."""
    random = np.random.default_rng([seed, rank])
    await asyncio.sleep(0.5 * random.random())
    async with await join(address, rank, size, channel=channel, timeout=60.0) as comm:
        for step in range(1, size):
            await asyncio.sleep(0.3 * random.random())
            got = await comm.sendrecv((rank, step), (rank + step) % size, (rank - step) % size)
            assert got == ((rank - step) % size, step)
            assert await total(comm) == expected(size)
        return await total(comm)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.nightly
@pytest.mark.parametrize("channel", ["auto", "relay"])
async def test_a_server_that_is_killed_again_and_again(channel: str, seed: int) -> None:
    """At random moments, while ranks join, make links, work and leave."""
    random = np.random.default_rng(seed)
    async with server() as place:
        ranks = asyncio.gather(*(live(place.address, r, 8, channel, seed) for r in range(8)))
        while not ranks.done():
            await asyncio.wait([ranks], timeout=0.7 * random.random())
            await place.kill()
            await asyncio.wait([ranks], timeout=0.7 * random.random())
            await place.start()
            await asyncio.wait([ranks], timeout=1.0)
        assert await ranks == [expected(8)] * 8
