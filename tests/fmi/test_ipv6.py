"""IPv6 on loopback, and servers with several addresses. Between networks: tests/net."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fmi_client
from fmi_client.errors import PunchFailed, RendezvousError
from fmi_client.hosts import parse_endpoint, resolve
from fmi_client.protocol.addresses import Address, format_address, is_global, plain
from fmi_client.transport import attempts, knocking, punch
from fmi_client.transport.reactor import SyncReactor
from fmi_client.transport.sockets import bound_pair, bound_socket, own_addresses
from tests.support import KEY, serving

pytestmark = pytest.mark.alone


async def join(address: str, rank: int, size: int = 2, **more: Any) -> Any:
    arguments: dict[str, Any] = {"job": "job", "key": KEY, "timeout": 10} | more
    return await fmi_client.connect(address, rank=rank, size=size, **arguments)


@contextlib.contextmanager
def deaf() -> Iterator[Address]:
    """An address that does not answer: its queue holds one connection, and is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        with socket.create_connection(address):
            yield address


@contextlib.contextmanager
def closed() -> Iterator[Address]:
    """An address that refuses."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()


@pytest.mark.usefixtures("ipv6")
@pytest.mark.parametrize("hopeless", [False, True])
async def test_a_job_over_ipv6(monkeypatch: pytest.MonkeyPatch, hopeless: bool) -> None:
    if hopeless:
        monkeypatch.setattr(knocking.Knocking, "start", lambda _: None)
    async with serving(host="::1") as (server, address):
        with closed() as bad:  # the server's name has an address of IPv4, too
            servers = (bad, parse_endpoint(address))
            monkeypatch.setattr("fmi_client.channels.resolve", lambda *_: servers)
            ranks = await asyncio.gather(*(join("a-name", r) for r in range(2)))
        totals = await asyncio.gather(*(comm.allreduce(np.ones(1000)) for comm in ranks))
        assert all((total == 2).all() for total in totals)
        for comm in ranks:
            links = comm.stats()["links"]
            assert links[1 - comm.rank]["kind"] == ("relay" if hopeless else "direct")
            await comm.close()
        assert server.relayed.pairs == hopeless


@pytest.fixture
def loopback_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server for all addresses takes those of loopback."""
    monkeypatch.setattr("rendezvous_server.listen._addresses", lambda _: ["127.0.0.1", "::1"])


async def join_by_both(address: str) -> list[Any]:
    """One rank comes by IPv4, the other by IPv6; on loopback they offer nothing else."""
    port = parse_endpoint(address)[1]
    hosts = ("127.0.0.1", "::1")
    return await asyncio.gather(
        *(join(format_address((host, port)), rank) for rank, host in enumerate(hosts))
    )


@pytest.mark.usefixtures("ipv6", "loopback_of_both")
async def test_ranks_without_a_version_in_common_are_relayed_at_once() -> None:
    async with serving(host="::") as (_, address):
        ranks = await join_by_both(address)
        begun = time.monotonic()
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        assert time.monotonic() - begun < punch.RELAY_AFTER
        assert [comm.stats()["links"][1 - comm.rank]["kind"] for comm in ranks] == ["relay"] * 2
        for comm in ranks:
            await comm.close()


@pytest.mark.usefixtures("ipv6", "loopback_of_both")
async def test_without_a_relay_they_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmi_client.punches.PUNCH_SECONDS", 0.1)
    async with serving(host="::", relay=False) as (_, address):
        ranks = await join_by_both(address)
        results = await asyncio.gather(*(c.barrier() for c in ranks), return_exceptions=True)
        assert any(isinstance(error, PunchFailed) for error in results)
        assert "one has only IPv4, the other only IPv6" in str(results[0])
        for comm in ranks:
            await comm.close()


# ------------------------------------------------------------- servers of many addresses
@pytest.mark.usefixtures("ipv6")
async def test_a_name_with_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(host="::1") as (_, address):
        good = parse_endpoint(address)
        for trap in (closed, deaf):
            with trap() as bad:
                monkeypatch.setattr("fmi_client.channels.resolve", lambda *_: (bad, good))
                begun = time.monotonic()
                comm = await join("a-name:1", 0, 1)
                assert time.monotonic() - begun < 0.9  # TCP itself would try again after a second
                await comm.close()


async def test_the_preferred_address_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that refuses at once does not end the attempt at another that is slow."""
    with closed() as bad, deaf() as slow:
        monkeypatch.setattr("fmi_client.channels.resolve", lambda *_: (slow, bad))
        monkeypatch.setattr("fmi_client.transport.race.HEAD_START", 0.01)
        with pytest.raises(RendezvousError, match="no answer yet"):
            await join("a-name:1", 0, 1, timeout=0.2)


async def test_each_address_is_named_when_none_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed() as one, closed() as two:
        monkeypatch.setattr("fmi_client.channels.resolve", lambda *_: (one, two))
        with pytest.raises(RendezvousError) as caught:
            await join("[2001:db8::1]:7", 0, 1, timeout=0.2)
    said = str(caught.value)
    assert "the rendezvous server [2001:db8::1]:7 within" in said
    for address in (one, two):
        assert f"{format_address(address)}: Connection refused" in said


def test_a_name_is_resolved_to_ipv4_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 7, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.1", 7)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 7, 0, 0)),
    ]

    def look_up(*_: object, flags: int, **__: object) -> Any:
        assert flags & socket.AI_ADDRCONFIG, "a version that we don't have costs no time"
        return found

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert resolve("a-name", 7) == (("203.0.113.1", 7), ("2001:db8::1", 7))
    found += [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"203.0.113.{i}", 7)) for i in range(99)]
    assert len(resolve("a-name", 7)) == 8


@pytest.mark.usefixtures("ipv6")
def test_ipv6_is_resolved_where_only_loopback_has_it() -> None:
    assert resolve("::1", 7) == (("::1", 7),)


# ------------------------------------------------------------------------------ sockets
@pytest.mark.usefixtures("ipv6")
def test_both_versions_listen_at_one_port() -> None:
    pair = bound_pair()
    assert [sock.family for sock in pair] == [socket.AF_INET, socket.AF_INET6]
    assert len({sock.getsockname()[1] for sock in pair}) == 1
    assert pair[1].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    for sock in pair:
        sock.close()


def test_without_ipv6_there_is_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_ipv4(port: int, family: int = socket.AF_INET) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return bound_socket(port)

    monkeypatch.setattr("fmi_client.transport.sockets.bound_socket", only_ipv4)
    (sock,) = bound_pair()
    sock.close()


def test_a_port_that_is_taken_in_one_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def one_is_taken(port: int, family: int = socket.AF_INET) -> socket.socket:
        if family == socket.AF_INET6:
            tried.append(port)
            if len(tried) == 1:
                raise OSError(errno.EADDRINUSE, "Address already in use")
        return bound_socket(0)

    monkeypatch.setattr("fmi_client.transport.sockets.bound_socket", one_is_taken)
    for sock in bound_pair():
        sock.close()
    assert len(tried) == 2


def test_on_this_machine_one_version_is_enough() -> None:
    assert own_addresses(("127.0.0.1", 7)) == (("127.0.0.1", 7),)
    assert own_addresses(("::1", 7)) == (("::1", 7),)


@pytest.fixture
def knocker() -> Iterator[knocking.Knocking]:
    """The side that gives way, at one address of each version, not begun."""
    reactor = SyncReactor()
    addresses = (("203.0.113.1", 7), ("2001:db8::1", 7))
    made = knocking.Knocking(reactor, addresses, 0, gives_way=True, on_open=lambda *_: None)
    yield made
    made.stop()
    reactor.close()


def run(knocker: knocking.Knocking, done: Callable[[], bool]) -> float:
    """Let it go on until `done()`; returns how many seconds that took."""
    reactor = knocker._reactor
    assert isinstance(reactor, SyncReactor)
    begun = reactor.now()
    assert reactor.run_until(done, begun + 5)
    return reactor.now() - begun


def test_each_version_has_its_router_that_refuses(
    monkeypatch: pytest.MonkeyPatch, knocker: knocking.Knocking
) -> None:
    def refused(*_: object) -> socket.socket:
        raise OSError(errno.ECONNREFUSED, "Connection refused")

    climbed: list[Address] = []
    monkeypatch.setattr(attempts, "bound_socket", refused)
    monkeypatch.setattr(knocker, "_climb", lambda address, *_: climbed.append(address))
    knocker.start()
    run(knocker, lambda: len(climbed) == 2)
    assert set(climbed) == {("203.0.113.1", 7), ("2001:db8::1", 7)}


def test_hops_that_were_too_few_are_no_reason_to_hurry(
    monkeypatch: pytest.MonkeyPatch, knocker: knocking.Knocking
) -> None:
    """The report of a near router comes at once, the peer's knock after a round trip."""
    monkeypatch.setattr(attempts, "connect_short", lambda *_: errno.EHOSTUNREACH)
    climbed: list[Address] = []
    monkeypatch.setattr(knocker, "_attempt", lambda address, _: climbed.append(address))
    knocker._climb(("2001:db8::1", 7), [2, 3, 4], 0.01)
    assert run(knocker, lambda: bool(climbed)) >= 0.03


def test_a_firewall_that_forbids_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, knocker: knocking.Knocking
) -> None:
    """It says "administratively prohibited" until the peer has knocked from inside."""
    tried: list[int] = []

    def forbidden(*_: object) -> socket.socket:
        tried.append(1)
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(attempts, "bound_socket", forbidden)
    knocker.start()
    run(knocker, lambda: len(tried) > 4)


# -------------------------------------------------------------------------------- text
@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("[2001:db8::1]:7", ("2001:db8::1", 7)),
        ("[2001:db8::1]", ("2001:db8::1", 10000)),
        ("2001:db8::1", ("2001:db8::1", 10000)),
        ("host:7", ("host", 7)),
        ("host", ("host", 10000)),
    ],
)
def test_addresses_of_servers(text: str, address: Address) -> None:
    assert parse_endpoint(text) == address


@pytest.mark.parametrize("text", ["[::1]:x", "[::1]:0", "[]:7", "[]", "host:", ":7"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        parse_endpoint(text)


def test_an_address_has_one_form() -> None:
    assert plain("::ffff:203.0.113.1") == "203.0.113.1"
    assert plain("2001:DB8:0::1") == "2001:db8::1"
    assert plain("fe80::1%eth0") == "fe80::1"
    with pytest.raises(ValueError, match="host"):
        plain("host")
    assert format_address(("2001:db8::1", 7)) == "[2001:db8::1]:7"
    assert format_address(("203.0.113.1", 7)) == "203.0.113.1:7"


def test_addresses_that_are_the_same_everywhere() -> None:
    assert is_global(("2001:db8::1", 7))
    for host in ("fd00::1", "fe80::1", "::1", "2::1", "203.0.113.1"):
        assert not is_global((host, 7))
