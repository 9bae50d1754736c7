"""TCPunch's own clients, versions 1 and 2, through real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fmi_client.protocol.relay import relay_request
from rendezvous_server import legacy
from rendezvous_server.config import Config, read_networks
from rendezvous_server.connection import Connection
from rendezvous_server.server import Server
from tests.server.test_legacy import request_2
from tests.server.test_server import http, join, server_process
from tests.support import close_by_reset, until


class Caller:
    """A client's socket: says something, and hears what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.own = legacy.encode_address(writer.get_extra_info("sockname"))

    def say(self, data: bytes) -> None:
        self._writer.write(data)

    async def told(self, count: int) -> bytes:
        return await asyncio.wait_for(self._reader.readexactly(count), 5)

    async def end(self) -> bytes:
        """Return what comes before the end; a reset is one, too."""
        with contextlib.suppress(ConnectionResetError):
            return await asyncio.wait_for(self._reader.read(), 5)
        return b""

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        close_by_reset(self._writer.get_extra_info("socket"))
        self._writer.transport.abort()


class Lobby:
    """Opens clients' connections to a server, which may be in this process, and closes them."""

    def __init__(self, port: int, server: Any = None) -> None:
        self.port, self.server = port, server
        self._callers: list[Caller] = []

    async def knock(self, data: bytes = b"") -> Caller:
        caller = Caller(*await asyncio.open_connection("127.0.0.1", self.port))
        self._callers.append(caller)
        caller.say(data)
        return caller

    async def wait(self, data: bytes) -> Caller:
        """Return a client that waits for its peer."""
        before = len(self.server.legacy.pool)
        caller = await self.knock(data)
        await until(lambda: len(self.server.legacy.pool) == before + 1)
        return caller

    def waiting(self) -> set[bytes]:
        """Return the addresses of those who wait."""
        clients = self.server.legacy.pool._waiting.values()
        return {legacy.encode_address(each.address) for each in clients}

    def close(self) -> None:
        for caller in self._callers:
            caller.close()


@asynccontextmanager
async def serving(
    networks: tuple[str, ...] = ("127.0.0.0/8",), job_ttl: float = 600.0
) -> AsyncIterator[Lobby]:
    config = Config("127.0.0.1", 0, -1, None, True, job_ttl, legacy=read_networks(networks))
    server = Server(config)
    lobby = Lobby(await server.start(), server)
    try:
        yield lobby
    finally:
        await server.stop()
        lobby.close()
        await asyncio.sleep(0)


async def assert_paired(first: Caller, second: Caller) -> None:
    """These two of version 1 are told of each other, and of nobody else."""
    assert await first.end() == first.own + second.own
    assert await second.end() == second.own + first.own


async def test_a_pair_of_version_1() -> None:
    async with serving() as lobby:
        first = await lobby.knock(b"job0_1")
        assert await first.told(8) == first.own
        second = await lobby.knock(b"job0_1")
        assert await second.end() == second.own + first.own
        assert await first.end() == second.own
        await until(lambda: not lobby.server.legacy.open)
        assert not lobby.server.open


async def test_a_pair_of_version_2() -> None:
    async with serving() as lobby:
        first = await lobby.knock(request_2(b"job0_1"))
        waits = await first.told(50)
        assert waits[:13] == b"\0" + first.own[:6] + bytes(6)
        second = await lobby.knock(request_2(b"job0_1"))
        assert (await second.end())[:13] == b"\1" + second.own[:6] + first.own[:6]
        assert await first.end() == b"\1" + first.own[:6] + second.own[:6] + waits[13:]


async def test_a_lost_client_of_version_2_comes_back_with_its_token() -> None:
    async with serving() as lobby:
        lost = await lobby.knock(request_2(b"n"))
        token = (await lost.told(50))[13:49].decode()
        again = await lobby.knock(request_2(b"n", token))
        assert (await again.told(50))[13:49].decode() == token
        assert (await lost.end())[0] == 2
        peer = await lobby.knock(request_2(b"n"))
        assert (await peer.end())[7:13] == again.own[:6]


async def test_a_bad_request_of_version_2_is_told_so() -> None:
    async with serving() as lobby:
        bad = await lobby.knock(request_2(b"n", "no token"))
        assert await bad.end() == legacy.refusal(2)
        assert lobby.server.counters.refusals == 1


async def test_the_server_does_not_speak_first_and_keeps_watch() -> None:
    async with serving() as lobby:
        silent, first = await lobby.knock(), await lobby.wait(b"n")
        [connection] = lobby.server.legacy.open
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        await assert_paired(first, await lobby.knock(b"n"))
        silent.say(b"m")
        assert await silent.told(8) == silent.own


async def test_a_name_in_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rendezvous_server.legacy_connection.QUIET_SECONDS", 0.5)
    async with serving() as lobby:
        second = await lobby.knock(b"frag")
        await until(lambda: any(each._reader._data for each in lobby.server.legacy.open))
        [connection] = lobby.server.legacy.open
        first_pause = connection._quiet
        second.say(b"ments")
        await until(lambda: connection._reader._data == b"fragments")
        assert first_pause.cancelled()
        assert len(lobby.server.legacy.pool) == 0
        await assert_paired(await lobby.knock(b"fragments"), second)


async def test_a_name_that_goes_on_after_a_pause_is_no_name() -> None:
    async with serving() as lobby:
        halting = await lobby.wait(b"frag")
        [connection] = lobby.server.legacy.open
        connection.data_received(b"ments")
        assert len(lobby.server.legacy.pool) == 0  # from this moment on, not only once it is closed
        assert await halting.end() == halting.own
        assert lobby.server.counters.refusals == 1


async def test_names_that_share_their_first_100_bytes() -> None:
    async with serving() as lobby:
        for name in (b"x" * 100 + b"1", b"x" * 100 + b"2"):
            assert await (await lobby.knock(name)).end() == b""
        one = await lobby.wait(b"x" * 99 + b"1")
        other = await lobby.wait(b"x" * 99 + b"2")
        await assert_paired(one, await lobby.knock(b"x" * 99 + b"1"))
        await assert_paired(other, await lobby.knock(b"x" * 99 + b"2"))


@pytest.mark.parametrize("name", [b"n", request_2(b"n")])
@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_a_client_that_left_while_waiting_is_never_paired(name: bytes, leave: str) -> None:
    async with serving() as lobby:
        gone = await lobby.wait(name)
        gone.reset() if leave == "reset" else gone.close()
        second = await lobby.knock(name)
        await until(lambda: lobby.waiting() == {second.own})
        third = await lobby.knock(name)
        assert second.own[:6] in await third.end()


async def test_three_with_one_name() -> None:
    async with serving() as lobby:
        first = await lobby.wait(b"n")
        await assert_paired(first, await lobby.knock(b"n"))
        third = await lobby.wait(b"n")
        assert await third.told(8) == third.own
        fourth = await lobby.knock(b"n")
        assert await fourth.end() == fourth.own + third.own


async def test_probes_and_resets_harm_nobody() -> None:
    async with serving() as lobby:
        first = await lobby.wait(b"n")
        for data in (b"", b"probe", b"x" * 5000, request_2(b"probe"), request_2(b"probe")[:50]):
            for _ in range(20):
                (await lobby.knock(data)).close()
                (await lobby.knock(data)).reset()
        await assert_paired(first, await lobby.knock(b"n"))
        await until(lambda: not lobby.server.legacy.open and not lobby.server.open)
        assert len(lobby.server.legacy.pool) == 0


async def test_who_gives_no_name_is_cut_off_and_who_waits_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fmi_client.protocol.rendezvous.AUTH_SECONDS", 0.3)
    monkeypatch.setattr("rendezvous_server.legacy_connection.QUIET_SECONDS", 5)
    async with serving() as lobby:
        first = await lobby.wait(request_2(b"n"))
        silent, half = await lobby.knock(), await lobby.knock(request_2(b"m")[:140])
        slow = await lobby.knock()
        cut = asyncio.ensure_future(slow.end())
        while not cut.done():  # a byte now and then does not help
            slow.say(b"x")
            await asyncio.wait([cut], timeout=0.01)
        assert [cut.result(), await silent.end(), await half.end()] == [b""] * 3
        assert lobby.server.counters.refusals == 0
        second = await lobby.knock(request_2(b"n"))
        assert (await second.end())[7:13] == first.own[:6]
        await until(lambda: not lobby.server.legacy.open and not lobby.server.open)


@pytest.mark.parametrize("networks", [(), ("10.0.0.0/8",)])
async def test_others_get_nothing(networks: tuple[str, ...]) -> None:
    async with serving(networks) as lobby:
        for data in (b"n", request_2(b"n")):
            assert await (await lobby.knock(data)).end() == b""
        assert lobby.server.counters.refusals == 2
        assert not lobby.server.legacy.open


async def test_version_3_is_served_at_the_same_port() -> None:
    async with serving() as lobby:
        first = await lobby.wait(b"n")
        comm = await join(f"127.0.0.1:{lobby.port}")
        await assert_paired(first, await lobby.knock(b"n"))
        await comm.close()


async def test_only_the_first_byte_decides() -> None:
    request = relay_request(b"x" * 16)  # which this server never promised
    async with serving() as lobby:
        caller = await lobby.knock(request[:6])
        await until(lambda: any(each._heard for each in lobby.server.open))
        caller.say(request[6:])
        assert await caller.end() == b""
        assert lobby.server.counters.refusals == 1


async def test_a_dual_stack_socket_shows_ipv4_in_disguise() -> None:
    async with serving() as lobby:
        with socket.socket(socket.AF_INET6) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::ffff:127.0.0.1", 0))
            loop = asyncio.get_running_loop()
            listener = await loop.create_server(lambda: Connection(lobby.server), sock=sock)
            lobby.port = sock.getsockname()[1]
            await assert_paired(await lobby.wait(b"n"), await lobby.knock(b"n"))
            listener.close()


async def test_waiting_ends_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rendezvous_server.server.EXPIRY_PERIOD", 0.02)
    async with serving(job_ttl=0.05) as lobby:
        old, new = await lobby.knock(b"n"), await lobby.knock(request_2(b"n"))
        assert await old.end() == old.own
        assert [(await new.told(50))[0], (await new.end())[0]] == [0, 2]


async def test_draining_sends_away_who_waits_and_stopping_who_has_no_name() -> None:
    async with serving() as lobby:
        new = await lobby.wait(request_2(b"n"))
        half = await lobby.knock(request_2(b"n")[:60])
        await until(lambda: len(lobby.server.legacy.open) == 2)
        await lobby.server.drain()
        assert [(await new.told(50))[0], (await new.end())[0]] == [0, 2]
        assert len(lobby.server.legacy.open) == 1
        await lobby.server.stop()
        assert await half.end() == b""


@pytest.mark.parametrize("how", ["option", "environment"])
async def test_the_process(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = ("10.0.0.0/8", "127.0.0.0/8")
    options = [word for network in networks for word in ("--legacy", network)]
    if how == "environment":
        monkeypatch.setenv("RENDEZVOUS_LEGACY", " ".join(networks))
        options = []
    async with server_process(*options) as process:
        callers = Lobby(process.port)
        first = await callers.knock("näme".encode())
        waiting = await process.event("legacy waiting")
        assert (waiting["version"], waiting["name"]) == (1, "näme")
        left = await callers.knock(b"left")
        await process.event("legacy waiting")
        left.reset()
        assert (await process.event("legacy left"))["name"] == "left"
        refused = await callers.knock(b"x" * 101)
        assert await refused.end() == b""
        text = (await asyncio.to_thread(http, process.admin_port, "/metrics"))[1]
        assert "rendezvous_legacy_waiting 1.0" in text
        assert "rendezvous_refusals_total 1.0" in text
        await assert_paired(first, await callers.knock("näme".encode()))
        paired = await process.event("legacy paired")
        assert paired["peer"] == waiting["address"]
        text = (await asyncio.to_thread(http, process.admin_port, "/metrics"))[1]
        assert "rendezvous_legacy_pairs_total 1.0" in text
        callers.close()


# -------------------------------------------------------------------------- the crowd


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for thousands of sockets, here and in the processes that we start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 20_000:
        pytest.skip(f"9,000 clients may have half of all places; the hard limit is {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 11_000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("count", [200, pytest.param(9_000, marks=pytest.mark.full)])
async def test_a_crowd_waits(count: int) -> None:
    async with server_process("--legacy", "127.0.0.0/8") as server:
        assert server.process.stderr is not None
        logs = asyncio.ensure_future(server.process.stderr.read())  # a full pipe would stop it
        await asyncio.to_thread(crowd, server.port, server.admin_port, count)
        server.process.terminate()
        assert (await logs).count(b'"legacy paired"') == count


def crowd(port: int, admin_port: int, count: int) -> None:
    waiting = [crowd_client(port, n) for n in range(count)]
    for first in waiting:
        assert first.recv(8, socket.MSG_WAITALL) == own(first)
    assert f"rendezvous_legacy_waiting {float(count)}" in http(admin_port, "/metrics")[1]
    for n in range(0, count, 100):
        batch = range(n, min(n + 100, count))
        for first, second in zip(
            waiting[n : n + 100], [crowd_client(port, m) for m in batch], strict=True
        ):
            with first, second:
                told = second.recv(17, socket.MSG_WAITALL), first.recv(9, socket.MSG_WAITALL)
                assert told == (own(second) + own(first), own(second))


def own(sock: socket.socket) -> bytes:
    return legacy.encode_address(sock.getsockname())


def crowd_client(port: int, number: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.sendall(b"crowd %d" % number)
    return sock


async def test_clients_that_wait_leave_ranks_half_of_all_places() -> None:
    async with serving() as lobby:
        lobby.server.room = 20
        for number in range(10):
            await lobby.wait(b"name %d" % number)
        assert await (await lobby.knock(b"name 0")).end() == b""
        assert len(lobby.server.legacy.open) == 10
        comms = [await join(f"127.0.0.1:{lobby.port}", job=f"job {n}") for n in range(9)]
        for comm in comms:
            await comm.close()
