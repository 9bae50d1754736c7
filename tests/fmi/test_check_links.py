"""What a check finds out about NATs, and about the links to other ranks."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from typing import Any

import pytest

import fmi_client
from fmi_client import check, errors, linktest
from fmi_client.check import Plan, run
from fmi_client.findings import LinkFound, Nat, Report
from fmi_client.hosts import parse_endpoint
from fmi_client.join_request import JoinRequest
from fmi_client.protocol.addresses import Address
from rendezvous_server import admin
from tests.fmi.checking import (
    SECRET,
    causes,
    checked,
    drips,
    listening,
    step,
)
from tests.support import closed_port, serving


# ---------------------------------------------------------------------------- NATs
@asynccontextmanager
async def translated(
    server: str, ip: str, keeps_port: bool, mapped: list[Address] | None = None
) -> AsyncIterator[str]:
    """Stand between a rank and the server as a NAT does: connect from `ip`; say so in `mapped`."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((ip, writer.get_extra_info("peername")[1] if keeps_port else 0))
        await asyncio.get_running_loop().sock_connect(sock, parse_endpoint(server))
        if mapped is not None:
            mapped.append(sock.getsockname())
        inside, outside = await asyncio.open_connection(sock=sock)
        with closing(outside):
            await asyncio.gather(_copy(reader, outside), _copy(inside, writer))

    async with listening(talk) as entrance:
        yield f"127.0.0.1:{entrance}"


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.write_eof()


@pytest.mark.parametrize(
    ("keeps_port", "second", "kind"),
    [
        (True, None, "preserving"),
        (True, 0, "preserving"),
        (True, 1, "symmetric"),
        (False, None, "changed"),
        (False, 0, "endpoint_independent"),
        (False, 1, "symmetric"),
    ],
)
async def test_nats(keeps_port: bool, second: int | None, kind: Nat) -> None:
    """The admin port sees the port that the server sees, plus `second`; None: it is closed."""
    callers: list[int] = []
    mapped: list[Address] = []

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readline()).startswith(b"GET /address ")
        callers.append(writer.get_extra_info("peername")[1])
        ip, port = mapped[-1]
        body = json.dumps({"address": ip, "port": port + (second or 0)})
        writer.write(f"HTTP/1.1 200 OK\r\n\r\n{body}".encode())

    async with (
        serving() as (_, address),
        translated(address, "127.0.0.2", keeps_port, mapped) as entrance,
        listening(tell) as second_port,
    ):
        admin_port = closed_port() if second is None else second_port
        report = await checked(entrance, admin_port=admin_port)
    assert report.ok
    assert report.nat == kind
    assert report.observed is not None
    assert report.observed[0] == "127.0.0.2"
    assert report.local is not None
    # The same socket address asked both ports, or nothing would follow from the answers.
    assert callers == ([] if second is None else [report.local[1]])
    found = step(report, "NAT")
    assert found.status == ("ok" if kind == "preserving" else "warning")
    assert ("only one server port" in found.text) is (second is None)


async def test_without_a_nat_one_port_is_enough() -> None:
    asked = []

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())

    async with serving() as (_, address), listening(tell) as second_port:
        assert (await checked(address, admin_port=second_port)).nat == "none"
    assert not asked


TOLD = b'{"address": "192.0.2.7", "port": 1}'


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (TOLD, True),
        (b"", False),
        (b"404: Not Found", False),
        (b"[]", False),
        (b'{"address": "name", "port": 1}', False),
        (b'{"address": "192.0.2.7", "port": 1e999}', False),
        (b'{"address": "192.0.2.7", "port": null}', False),
        (TOLD + b" " * 10_000, False),
    ],
)
async def test_what_the_admin_port_says(body: bytes, told: bool) -> None:
    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        await writer.drain()

    async with (
        serving() as (_, address),
        translated(address, "127.0.0.2", True) as entrance,
        listening(tell) as second_port,
    ):
        report = await checked(entrance, admin_port=second_port)
    assert report.ok
    assert report.nat == ("symmetric" if told else "preserving")


async def test_the_servers_own_admin_port() -> None:
    async with (
        serving() as (server, address),
        translated(address, "127.0.0.2", True) as entrance,
    ):
        runner, port = await admin.start(server, "127.0.0.1", 0)
        report = await checked(entrance, admin_port=port)
        server.registry.draining = True
        ending = await checked(f"127.0.0.1:{closed_port()}", admin_port=port)
        await runner.cleanup()
    assert report.nat == "symmetric"  # it is not behind what stands before the other port
    assert causes(ending) == ["draining"]


async def test_peers_do_not_wait_for_an_admin_port_that_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "ADMIN_SECONDS", 0.05)
    async with (
        serving() as (_, address),
        translated(address, "127.0.0.2", True) as entrance,
        listening(drips) as second_port,
    ):
        report = await checked(entrance, admin_port=second_port, timeout=5)
    assert step(report, "NAT").seconds < 2
    assert "only one server port" in step(report, "NAT").text


async def test_the_admin_port_tells_whom_the_server_does_not_admit() -> None:
    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'HTTP/1.1 200 OK\r\n\r\n{"address": "192.0.2.7", "port": 1}')

    async with serving(SECRET) as (_, address), listening(tell) as second_port:
        report = await checked(address, admin_port=second_port)
    assert causes(report) == ["token_missing"]
    assert report.nat == "changed"


# --------------------------------------------------------------------------- links
async def check_ranks(*servers: str, **arguments: Any) -> list[Report]:
    """Run a check as each rank of a job, each at its own entrance to the server."""
    size = len(servers)
    common = {"job": "links", "size": size, "wait": 10.0} | arguments
    return await asyncio.gather(
        *(checked(server, rank=rank, **common) for rank, server in enumerate(servers))
    )


async def test_links_are_measured() -> None:
    async with serving() as (_, address):
        reports = await check_ranks(address, address, address)
    for rank, report in enumerate(reports):
        assert report.ok
        assert report.advice == "All is well: every link of this rank is direct."
        assert [link.peer for link in report.links] == [r for r in range(3) if r != rank]
        for link in report.links:
            assert link.kind == "direct"
            assert 0 < link.round_trip_seconds < 1
            other = next(each for each in reports[link.peer].links if each.peer == rank)
            assert link.send_bytes_per_second == other.receive_bytes_per_second > 1e5
            assert link.round_trip_seconds == other.round_trip_seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_tells_its_own_sending_from_receiving(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    class Comm:
        def stats(self) -> Any:
            return {"links": {1 - rank: {"kind": "direct"}}}

    comm: Any = Comm()
    comm.rank = rank
    monkeypatch.setattr(linktest, "_round_trip", lambda *_: 0.5)
    monkeypatch.setattr(linktest, "_rate", lambda comm, peer, lead, _: 1.0 if lead else 2.0)
    assert linktest.measure(comm, 1 - rank) == LinkFound(1 - rank, "direct", 0.5, 1.0, 2.0)


class SlowLink:
    """A peer that answers over a link of known quality, in time that does not pass."""

    def __init__(self, rate: float, round_trip: float) -> None:
        self.rate, self.round_trip = rate, round_trip
        self.now = 0.0
        self.sent: list[int] = []
        self.told = 0.0

    def perf_counter(self) -> float:
        return self.now

    def send(self, data: bytes | float, peer: int) -> None:
        if isinstance(data, float):
            self.told = data
        elif data:
            self.now += len(data) / self.rate + self.round_trip / 2
            self.sent.append(len(data))

    def recv(self, peer: int) -> bytes:
        self.now += self.round_trip / 2
        return bytes(8)


@pytest.mark.parametrize(
    ("rate", "round_trip", "pings", "largest"),
    [
        (10e9, 0.0001, 50, 16 << 20),
        (10e6, 0.05, 20, 1 << 20),
        (10e3, 0.3, 4, 64 << 10),
    ],
)
def test_a_slow_link_is_asked_for_less(
    monkeypatch: pytest.MonkeyPatch, rate: float, round_trip: float, pings: int, largest: int
) -> None:
    link: Any = SlowLink(rate, round_trip)
    monkeypatch.setattr(linktest, "time", link)
    found = linktest._round_trip(link, 1, lead=True)
    assert found == link.told == pytest.approx(round_trip, rel=0.1)
    assert len(link.sent) == pings
    link.sent.clear()
    found = linktest._rate(link, 1, True, found)
    assert found == link.told == pytest.approx(rate, rel=0.2)
    assert link.sent[-1] == largest


async def test_a_relayed_link_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hello = JoinRequest.hello
    nowhere = ("127.0.0.9", 9)  # instead of our own addresses, which nothing keeps a peer from
    monkeypatch.setattr(JoinRequest, "hello", lambda self, own: hello(self, (nowhere,)))
    async with (
        serving() as (server, address),
        translated(address, "127.0.0.2", False) as one,
        translated(address, "127.0.0.3", False) as other,
    ):
        reports = await check_ranks(one, other)
        assert server.relayed.pairs == 1
    for report in reports:
        assert report.ok
        assert [link.kind for link in report.links] == ["relay"]
        assert step(report, f"link {report.links[0].peer}").status == "warning"
        assert "go through the server" in report.advice


async def test_who_does_not_come_is_named() -> None:
    async with serving() as (_, address):
        report = await checked(address, job="j", rank=1, size=3, wait=0.2)
    assert causes(report) == ["missing"]
    assert report.advice.startswith("Start rank 0, 2 of 3 too")


async def test_a_rank_that_is_there_already() -> None:
    async with serving() as (server, address):
        other = asyncio.ensure_future(
            fmi_client.connect(address, job="j", rank=0, size=2, timeout=10)
        )
        while not server.registry.jobs:  # noqa: ASYNC110
            await asyncio.sleep(0)
        report = await checked(address, job="j", rank=0, size=2)
        assert causes(report) == ["rank_taken"]
        assert causes(await checked(address, job="j", rank=1, size=3)) == ["job_full"]
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)


async def test_a_peer_that_leaves() -> None:
    async def leave(address: str) -> None:
        async with fmi_client.connect(address, job="j", rank=1, size=2, timeout=10):
            pass

    async with serving() as (_, address):
        report, _ = await asyncio.gather(checked(address, job="j", rank=0, size=2), leave(address))
    assert causes(report) == ["peer_lost"]
    assert "rank 1" in report.advice


async def other_work(comm: fmi_client.Communicator) -> None:
    await comm.allreduce(1)


async def other_messages(comm: fmi_client.Communicator) -> None:
    await comm.barrier()
    await comm.send(b"", 1)
    await comm.send({"not": "a number"}, 1)


@pytest.mark.parametrize("work", [other_work, other_messages])
async def test_a_peer_that_does_something_else(
    work: Callable[[fmi_client.Communicator], Awaitable[None]],
) -> None:
    async def join(address: str) -> None:
        with suppress(errors.FmiError):
            async with fmi_client.connect(address, job="j", rank=0, size=2, timeout=5) as comm:
                await work(comm)

    async with serving() as (_, address):
        report, _ = await asyncio.gather(checked(address, job="j", rank=1, size=2), join(address))
    assert causes(report) == ["mismatch"]
    assert "rank 0 does something else" in report.advice


async def test_a_peer_that_stops_answering() -> None:
    async with serving() as (_, address):
        joining = asyncio.ensure_future(
            fmi_client.connect(address, job="j", rank=1, size=2, timeout=10)
        )
        report = await checked(address, job="j", rank=0, size=2, timeout=1.0)
        await (await joining).close()
    assert causes(report) == ["stalled"]
    assert "rank 1" in report.advice


async def test_ranks_with_different_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (_, address):
        plans = []
        for rank in (0, 1):
            monkeypatch.setenv("FMI_KEY", f"{rank + 1:064x}")
            plans.append(
                Plan.make(address, job="j", rank=rank, size=2, admin_port=0, timeout=1.0, wait=10)
            )
        reports = await asyncio.gather(*(asyncio.to_thread(run, plan) for plan in plans))
    assert "key" in {cause for report in reports for cause in causes(report)}
    assert not any(report.ok for report in reports)
