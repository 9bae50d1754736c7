"""The server as its users meet it: a process, its port, its logs, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

import fmi_client
from fmi_client.errors import (
    AuthenticationFailed,
    JobFull,
    JoinTimeout,
    RankTaken,
    RendezvousError,
    ServerDraining,
)
from fmi_client.hosts import parse_endpoint
from fmi_client.protocol import auth, frames
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.rendezvous import ClientSide
from rendezvous_server import config
from tests.reliability.strangers import enter
from tests.support import KEY, logged, serving, until

SECRET = b"0123456789abcdef"


class Process:
    """A server process and what it has logged."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.port = self.admin_port = 0

    async def event(self, name: str) -> dict[str, Any]:
        """Return the next log line with this event."""
        assert self.process.stderr is not None
        while line := await asyncio.wait_for(self.process.stderr.readline(), 10):
            entry: dict[str, Any] = json.loads(line)
            if entry["event"] == name:
                return entry
        raise AssertionError(f"the server ended without logging {name!r}")


@asynccontextmanager
async def server_process(*arguments: str) -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "rendezvous_server", "--port", "0", "--admin-port", "0"]
    started = await asyncio.create_subprocess_exec(
        *command, *arguments, stderr=asyncio.subprocess.PIPE
    )
    server = Process(started)
    try:
        listening = await server.event("listening")
        server.port, server.admin_port = listening["port"], listening["admin_port"]
        yield server
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


def connected(port: int, own_port: int = 0) -> socket.socket:
    """Connect as a rank does: from a port that it uses for everything."""
    sock = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        sock.setsockopt(socket.SOL_SOCKET, option, 1)
    sock.bind(("127.0.0.1", own_port))
    sock.settimeout(5)
    sock.connect(("127.0.0.1", port))
    return sock


def http(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def join(address: str, rank: int = 0, size: int = 1, **more: Any) -> Any:
    arguments = {"job": "job", "timeout": 5.0} | more
    return await fmi_client.connect(address, rank=rank, size=size, **arguments)


async def test_a_job_runs_and_the_process_ends_in_order(tmp_path: Path) -> None:
    secret_file = tmp_path / "secret"
    secret_file.write_bytes(SECRET + b"\n")
    async with server_process("--secret-file", str(secret_file)) as server:
        address = f"127.0.0.1:{server.port}"
        token = fmi_client.make_token(SECRET, job="job", size=3, expires=time.time() + 60)
        ranks = await asyncio.gather(*(join(address, r, 3, token=token, key=KEY) for r in range(3)))
        assert await asyncio.gather(*(comm.allreduce(1) for comm in ranks)) == [3, 3, 3]
        text = (await asyncio.to_thread(http, server.admin_port, "/metrics"))[1]
        assert "rendezvous_joins_total 3.0" in text
        assert "rendezvous_ranks 3.0" in text
        assert "rendezvous_relay_limits_total 0.0" in text
        for comm in ranks:
            await comm.close()
        ended = await server.event("ended")
        assert (ended["job"], ended["epoch"], ended["well"]) == ("job", 0, True)
        server.process.send_signal(signal.SIGTERM)
        await server.event("stopped")
        assert await server.process.wait() == 0


async def test_the_admin_port_says_who_asks() -> None:
    def ask() -> None:
        with connected(server.port) as rank:
            here = rank.getsockname()
            connection = HTTPConnection("127.0.0.1", server.admin_port)
            connection.sock = connected(server.admin_port, here[1])
            connection.request("GET", "/address", headers={"Connection": "close"})
            answer = json.load(connection.getresponse())
            connection.close()
            assert answer == {"address": here[0], "port": here[1]}

    async with server_process() as server:
        await asyncio.to_thread(ask)


async def test_sigterm_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmi_client.transport.control.DRAIN_SECONDS", 0.3)
    async with server_process() as server:
        address = f"127.0.0.1:{server.port}"
        waiting = asyncio.ensure_future(join(address, 0, 2, job="waits"))
        await server.event("joined")
        ranks = await asyncio.gather(*(join(address, r, 2, job="runs") for r in range(2)))
        assert await asyncio.to_thread(http, server.admin_port, "/readyz") == (200, "ok\n")
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ServerDraining):
            await waiting
        assert await asyncio.to_thread(http, server.admin_port, "/readyz") == (503, "draining\n")
        assert (await asyncio.to_thread(http, server.admin_port, "/livez"))[0] == 200
        # The link that exists does not notice.
        assert await asyncio.gather(*(comm.allreduce(2) for comm in ranks)) == [4, 4]
        for comm in ranks:
            await comm.close()
        assert await asyncio.wait_for(server.process.wait(), 5) == 0


async def test_a_second_server_does_without_the_default_admin_port() -> None:
    async with server_process() as first:
        taken = str(first.admin_port)
        command = [sys.executable, "-m", "rendezvous_server", "--port", "0"]
        strict = await asyncio.create_subprocess_exec(
            *command, "--admin-port", taken, stderr=asyncio.subprocess.PIPE
        )
        _, err = await asyncio.wait_for(strict.communicate(), 10)
        assert strict.returncode == 1
        assert f"cannot listen at 127.0.0.1:{taken}: Address already in use".encode() in err
        assert b"Traceback" not in err
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # if it is taken, it is taken
            holder.bind(("127.0.0.1", 10001))
            holder.listen()
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        server = Process(process)
        try:
            assert (await server.event("no admin port"))["port"] == 10001
            assert (await server.event("listening"))["admin_port"] is None
        finally:
            process.terminate()
            assert await process.wait() == 0


async def test_a_scheduler_may_hand_the_secret_over_in_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RENDEZVOUS_SECRET", SECRET.decode())
    async with server_process() as server:
        address = f"127.0.0.1:{server.port}"
        token = fmi_client.make_token(SECRET, job="job", size=1, expires=time.time() + 60)
        await (await join(address, token=token)).close()
        with pytest.raises(AuthenticationFailed):
            await join(address)
    with pytest.raises(config.ConfigError, match=r"RENDEZVOUS_SECRET or in .*, not in both"):
        config.read_secret(tmp_path / "secret", SECRET.decode())
    with pytest.raises(config.ConfigError, match="the secret in RENDEZVOUS_SECRET has 0 bytes"):
        config.read_secret(None, "")


async def test_wrong_and_missing_tokens_are_refused_alike() -> None:
    def token(secret: bytes = SECRET, after: float = 60, size: int = 1) -> str:
        return fmi_client.make_token(secret, job="job", size=size, expires=time.time() + after)

    async with serving(SECRET) as (server, address):
        await (await join(address, token=token())).close()
        for bad, guess in (
            (None, "wants a token"),
            (token(b"another secret"), "another secret, or the token is for another job"),
            (token(after=-5), r"the token expired at \d{4}-.* UTC"),
            (token(size=2), "another secret, or the token is for another job or size"),
        ):
            with pytest.raises(AuthenticationFailed, match=f"authentication failed: .*{guess}"):
                await join(address, token=bad)
        assert server.counters.refusals == 4


async def test_a_rank_that_came_again_was_not_lost() -> None:
    async def come(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        own = (("10.0.0.7", 4242),)
        client = ClientSide(Hello("job", 2, 0, 0, 0, own, auth.nonce(), b"i" * 16), None)
        events: list[object] = []
        while not events:
            writer.write(bytes(client.outgoing))
            client.outgoing.clear()
            events += client.receive(await asyncio.wait_for(reader.read(4096), 5))
        return reader, writer

    with logged() as logs:
        async with serving() as (server, address):
            old, first = await come(address)
            _, writer = await come(address)
            await old.read()
            first.close()
            await until(lambda: len(server.open) == 1)
            assert (server.registry.ranks, server.counters.lost_ranks) == (1, 0)
            writer.close()
            await until(lambda: not server.open)
            assert (server.registry.ranks, server.counters.lost_ranks) == (0, 1)
    assert [entry["event"] for entry in logs][:3] == ["joined", "joined", "lost"]


async def test_strangers_do_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rendezvous_server.server.EXPIRY_PERIOD", 0.25)
    with logged() as logs:
        async with serving() as (_, address):
            start = time.monotonic()
            for _ in range(60):
                reader, writer = await asyncio.open_connection(*address.split(":"))
                writer.write(b"x")
                assert await reader.read() == b""
                writer.close()
            told = lambda: sum(entry.get("more", 1) for entry in logs)  # noqa: E731
            await until(lambda: told() == 60)
            ticks = 1 + (time.monotonic() - start) / 0.25
    assert len(logs) <= 2 * ticks
    assert logs[0]["why"] == "not a version 3 client"  # who makes a mistake can read it at once


async def test_refusals_name_the_reason() -> None:
    async with serving() as (_, address):
        first = asyncio.ensure_future(join(address, 0, 2, timeout=30))
        with pytest.raises(JoinTimeout, match="1 of 2 ranks did not join") as caught:
            await join(address, 1, 2, job="alone", timeout=0.1)
        assert caught.value.missing == [0]
        with pytest.raises(RankTaken):
            await join(address, 0, 2)
        with pytest.raises(JobFull, match="has 2 ranks, not 3"):
            await join(address, 1, 3)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_no_server_is_said_so() -> None:
    with socket.socket() as sock:  # bound but not listening: refuses, and nobody else takes it
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        with pytest.raises(RendezvousError, match=r"within 0.2 s \(Connection refused\)"):
            await join(f"127.0.0.1:{port}", timeout=0.2)
    with pytest.raises(RendezvousError, match="cannot resolve"):
        await join("no-such-host.invalid:1")
    for bad in ("", "host:port", "host:0", "a:b:c"):
        with pytest.raises((ValueError, RendezvousError)):
            await join(bad)


async def test_strangers_are_cut_off_and_learn_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmi_client.protocol.rendezvous.AUTH_SECONDS", 0.1)
    async with serving(SECRET) as (server, address):
        host, port = address.split(":")
        for knock in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x00\x00",
            b"\x00\xff\xff\xff\xff",
            b"\x00" * 9,
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(knock)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        assert server.registry.ranks == 0
        assert not server.open


async def test_a_rank_that_asks_for_nonsense_is_thrown_out() -> None:
    async with serving() as (server, address):
        comm = await join(address)
        control = comm._endpoint._control
        control.side.outgoing += frames.encode({"t": "nonsense"})
        control.flush()
        await asyncio.wait_for(server.emptied.wait(), 5)
        assert server.counters.lost_ranks == 1
        await comm.close()


async def test_jobs_are_ended_after_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rendezvous_server.server.EXPIRY_PERIOD", 0.02)
    async with serving(job_ttl=0.05) as (_, address):
        with pytest.raises(RendezvousError, match="ended by the server after"):
            await join(address, 0, 2)


async def test_ranks_that_the_server_sends_away_are_not_lost() -> None:
    async def waits(epoch: int = 0) -> asyncio.Task[Any]:
        task = asyncio.create_task(join(address, 0, 2, epoch=epoch))
        await until(lambda: server.counters.joins > epoch)
        return task

    with logged() as logs:
        async with serving() as (server, address):
            first, second = await waits(), await waits(epoch=1)
            with pytest.raises(RendezvousError, match="started again with epoch 1"):
                await first
            server.deliver(server.registry.expire(time.time() + 10_000))
            with pytest.raises(RendezvousError, match="ended by the server after 600 s"):
                await second
            await until(lambda: not server.open)
            assert (server.registry.ranks, server.counters.lost_ranks) == (0, 0)
    events = [(entry["event"], entry["epoch"], entry.get("why")) for entry in logs]
    assert events == [
        ("joined", 0, None),
        ("ended", 0, "job 'job' was started again with epoch 1"),
        ("joined", 1, None),
        ("ended", 1, "job 'job' was ended by the server after 600 s"),
    ]


async def test_a_new_epoch_takes_over_from_a_job_that_hangs() -> None:
    async with serving() as (_, address):
        old = asyncio.ensure_future(join(address, 0, 2, epoch=0))
        while not old.done():
            new = asyncio.ensure_future(join(address, 0, 1, epoch=1))
            await (await new).close()
            await asyncio.wait([old], timeout=0.01)
        with pytest.raises(RendezvousError, match="started again with epoch 1"):
            await old


@pytest.mark.parametrize("says_goodbye", [True, False])
async def test_a_goodbye_counts_though_a_write_fails_before_it_is_read(says_goodbye: bool) -> None:
    """Ranks that leave at the same time are told of each other when they have closed already."""
    async with serving(allow_anonymous=True) as (server, address):
        sock, _ = await asyncio.to_thread(enter, parse_endpoint(address)[1], "bye")
        [connection] = server.open
        if says_goodbye:
            sock.sendall(frames.encode({"t": "leave"}))
        sock.close()
        for _ in range(2):  # the first is answered with a reset
            connection.write(frames.encode({"t": "gone", "rank": 1, "clean": True}))
        await until(lambda: not server.open)
        assert server.counters.lost_ranks == (0 if says_goodbye else 1)
