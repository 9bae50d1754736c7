"""Row 22: TLS to the server and between ranks, and what is refused."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

import fmi_client
from benchmarks.tls import compare
from fmi_client.errors import AuthenticationFailed, ProtocolError, RendezvousError
from fmi_client.protocol.peer import Handshake
from fmi_client.protocol.relay import relay_request
from fmi_client.protocol.tls import TlsStream
from fmi_client.transport.tls import make_identity, pin, server_trust
from rendezvous_server.config import ConfigError, read_tls
from rendezvous_server.connection import MAX_SEALED
from rendezvous_server.strangers import MAX_STRANGERS, MAX_TLS_STRANGERS
from tests.fmi.checking import causes, checked, step
from tests.processes import run_processes
from tests.reliability.certificates import write_certificate
from tests.reliability.conftest import Measured
from tests.reliability.restarts import server
from tests.server.test_proxy import balancer
from tests.support import KEY, logged, serving, until

pytestmark = [pytest.mark.row(22), pytest.mark.alone]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A server's certificate for 127.0.0.1, which ranks trust, and its key."""
    cert_file, key_file = write_certificate(tmp_path)
    monkeypatch.setenv("FMI_TLS_CA", str(cert_file))
    return cert_file, key_file


async def join(address: str, rank: int, size: int = 2, **more: Any) -> Any:
    arguments = {"job": "job", "timeout": 5.0, "key": KEY} | more
    return await fmi_client.connect(address, rank=rank, size=size, **arguments)


@pytest.mark.parametrize("channel", ["direct", "relay"])
async def test_everything_is_encrypted(files: tuple[Path, Path], channel: str) -> None:
    async with serving(tls=read_tls(*files)) as (_, address):
        ranks = await asyncio.gather(
            *(join("tls://" + address, r, 3, channel=channel) for r in range(3))
        )
        for count in (1, 5_000, 1_000_000):
            parts = [np.full(count, comm.rank + 1.0) for comm in ranks]
            sums = await asyncio.gather(
                *(comm.allreduce(part) for comm, part in zip(ranks, parts, strict=True))
            )
            assert all((total == 6).all() for total in sums)
        links = [link for comm in ranks for link in comm.stats()["links"].values()]
        assert links
        assert all(link["tls"] and link["kind"] == channel for link in links)
        await asyncio.gather(*(comm.close() for comm in ranks))


def _exchange(comm: Any) -> tuple[float, bool]:
    peer = 1 - comm.rank
    other = comm.sendrecv(np.full(2_000_000, float(comm.rank)), peer, peer)
    comm.send(b"small", peer)
    assert comm.recv(peer) == b"small"
    return float(other.mean()), comm.stats()["links"][peer]["tls"]


async def test_processes_with_the_blocking_driver(files: tuple[Path, Path]) -> None:
    async with serving(tls=read_tls(*files)) as (_, address):
        results = await asyncio.to_thread(run_processes, "tls://" + address, 2, _exchange)
    assert results == [(1.0, True), (0.0, True)]


async def test_a_server_with_a_certificate_takes_nobody_in_plain(
    files: tuple[Path, Path],
) -> None:
    async with serving(tls=read_tls(*files)) as (_, address):
        with pytest.raises(RendezvousError, match="wants TLS"):
            await join(address, 0, 1)


async def test_a_server_without_one_is_not_spoken_to_in_plain(files: tuple[Path, Path]) -> None:
    async with serving() as (_, address):
        with pytest.raises(RendezvousError, match="--tls-cert"):
            await join("tls://" + address, 0, 1, timeout=0.5)


async def test_a_server_that_nobody_trusts(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tls=read_tls(*files)) as (_, address):
        port = address.partition(":")[2]
        with pytest.raises(AuthenticationFailed, match=r"not trusted.*localhost"):
            await join(f"tls://localhost:{port}", 0, 1)  # its certificate is for 127.0.0.1
        monkeypatch.delenv("FMI_TLS_CA")
        with pytest.raises(AuthenticationFailed, match=r"may name a file of those to trust$"):
            await join("tls://" + address, 0, 1)


def _talk(low: Handshake, high: Handshake, spy: Callable[[bytes], bytes] = bytes) -> None:
    while low.outgoing or high.outgoing:
        for one, other in ((low, high), (high, low)):
            data, one.outgoing = bytes(one.outgoing), bytearray()
            if data:
                other.receive(spy(data))


def _pair(*, swapped: bool = False, key: bytes | None = KEY) -> tuple[Handshake, Handshake, Any]:
    """Both sides of a link; `swapped`: the server tells each its own certificate instead."""
    one, other, middle = make_identity(), make_identity(), make_identity()
    cookie = bytes(16)
    told = middle.certificate if swapped else other.certificate
    low = Handshake(0, 1, 0, key, cookie, tls=pin(one, told, server_side=False))
    high = Handshake(1, 0, 0, key, cookie, tls=pin(other, one.certificate, server_side=True))
    return low, high, (one, other, middle, cookie)


def test_ranks_trust_one_certificate_only() -> None:
    low, high, _ = _pair()
    _talk(low, high)
    assert low.proven
    assert high.proven
    low, high, _ = _pair(swapped=True)
    with pytest.raises(AuthenticationFailed, match="TLS"):
        _talk(low, high)


def test_the_job_key_finds_out_a_server_in_the_middle() -> None:
    """It tells each rank a certificate of its own, and speaks TLS with both."""
    one, middle = make_identity(), make_identity()
    low = Handshake(0, 1, 0, KEY, bytes(16), tls=pin(one, middle.certificate, server_side=False))
    liar = Handshake(1, 0, 0, None, bytes(16), tls=pin(middle, one.certificate, server_side=True))
    liar._expect = liar._expect._replace(keyed=True)
    liar.hello = liar.hello[:16] + b"\x01" + liar.hello[17:]
    liar.outgoing = bytearray(liar.hello)
    with pytest.raises(AuthenticationFailed, match="key"):
        _talk(low, liar)


def test_the_job_key_finds_out_a_server_that_passes_proofs_on() -> None:
    """It has no key, but both ranks have: only the certificates in their proofs tell."""
    one, other, middle = make_identity(), make_identity(), make_identity()
    low = Handshake(0, 1, 0, KEY, bytes(16), tls=pin(one, middle.certificate, server_side=False))
    high = Handshake(1, 0, 0, KEY, bytes(16), tls=pin(other, middle.certificate, server_side=True))
    as_high = TlsStream(pin(middle, one.certificate, server_side=True).context, server_side=True)
    as_low = TlsStream(pin(middle, other.certificate, server_side=False).context)

    def said(by: Handshake) -> bytes:
        data, by.outgoing = bytes(by.outgoing), bytearray()
        return data

    hello = said(low)
    low.receive(said(high))
    high.receive(hello)

    def pass_on() -> None:
        for _ in range(5):
            as_low.send(as_high.receive(said(low)))
            high.receive(as_low.take())
            as_high.send(as_low.receive(said(high)))
            low.receive(as_high.take())

    with pytest.raises(AuthenticationFailed, match="key"):
        pass_on()
    assert as_low.established
    assert as_high.established


def test_proofs_cover_both_certificates() -> None:
    low, _, (one, _, middle, cookie) = _pair()
    swapped = Handshake(0, 1, 0, KEY, cookie, tls=pin(one, middle.certificate, server_side=False))
    plain = Handshake(0, 1, 0, KEY, cookie)
    assert len({low._key, swapped._key, plain._key}) == 3


def test_changed_bytes_are_found_out() -> None:
    low, high, _ = _pair()
    _talk(low, high)
    low.pick()
    data = bytearray(low.outgoing)
    data[-1] ^= 1
    with pytest.raises(ProtocolError, match="TLS"):
        high.receive(bytes(data))


async def test_a_job_comes_in_one_way_only() -> None:
    """As where a balancer has the certificate: the server itself speaks no TLS."""
    from fmi_client.protocol.rendezvous import Hello
    from rendezvous_server.registry import Registry

    registry = Registry(60)
    at = ("127.0.0.1", 1)
    registry.join(Hello("job", 2, 0, 0, 0, (at,), bytes(16), certificate=b"cert"), at, 0, 0.0)
    with pytest.raises(RendezvousError, match="begun with tls"):
        registry.join(Hello("job", 2, 1, 0, 0, (at,), bytes(16)), at, 1, 0.0)


def test_a_rank_with_tls_refuses_a_peer_without() -> None:
    with pytest.raises(AuthenticationFailed, match="no certificate"):
        pin(make_identity(), b"", server_side=False)


def _compare(comm: Any, address: str) -> tuple[float, float]:
    """What `benchmarks.tls` measures, briefly: bytes a second in plain, and the ratio of times."""
    with fmi_client.sync.connect(
        f"tls://{address}", job="tls", rank=comm.rank, size=2, key=KEY
    ) as other:
        cell = compare(comm, other, "sendrecv", 1 << 20, 3, random.Random(0))
        assert other.stats()["links"][1 - comm.rank]["tls"]
    return cell.size / median(cell.plain), median(cell.ratios)


async def test_what_encryption_costs(files: tuple[Path, Path], measured: Measured) -> None:
    async with serving() as (_, plain), serving(tls=read_tls(*files)) as (_, address):
        function = partial(_compare, address=address)
        (rate, ratio), _ = await asyncio.to_thread(run_processes, plain, 2, function)
    measured("1 MiB both ways in plain", rate / 1e6, "MB/s", "no limit")
    measured("the same in TLS takes longer", ratio, "times", "no limit")


# ------------------------------------------------------------------------ settings
def test_settings_are_checked(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert isinstance(read_tls(*files), ssl.SSLContext)
    assert read_tls(None, None) is None
    with pytest.raises(ConfigError, match="both"):
        read_tls(files[0], None)
    with pytest.raises(ConfigError, match=r"--tls-key .*none\.pem: No such file"):
        read_tls(files[0], tmp_path / "none.pem")
    with pytest.raises(ConfigError, match="two PEM files"):
        read_tls(files[1], files[0])


def test_a_server_says_what_to_do_about_its_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    _, other = write_certificate(tmp_path / "other")
    variables = {"RENDEZVOUS_TLS_CERT": str(files[0]), "RENDEZVOUS_TLS_KEY": str(other)}
    ran = subprocess.run(
        [sys.executable, "-m", "rendezvous_server", "--port", "0", "--admin-port", "0"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ran.returncode == 2
    *_, last = ran.stderr.splitlines()
    assert last.startswith("python -m rendezvous_server: error: --tls-cert")
    assert last.endswith("give the key that belongs to this certificate, this one does not")


# ----------------------------------------------------------------------- strangers
async def _told(address: str, *said: bytes) -> bytes:
    """Say something to a server; returns all that it answers before it closes."""
    reader, writer = await asyncio.open_connection(*address.split(":"))
    for each in said:
        writer.write(each)
    told = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return told


def _client_hello() -> bytes:
    return TlsStream(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), host="127.0.0.1").take()


def test_what_comes_after_the_end_of_tls_is_not_kept() -> None:
    one, other = make_identity(), make_identity()
    low = TlsStream(pin(one, other.certificate, server_side=False).context)
    high = TlsStream(pin(other, one.certificate, server_side=True).context, server_side=True)
    while not (low.established and high.established):
        high.receive(low.take())
        low.receive(high.take())
    low.send(b"the last")
    with suppress(ssl.SSLWantReadError):
        low._tls.unwrap()
    assert high.receive(low.take()) == b"the last"
    with pytest.raises(ProtocolError, match="end"):
        high.receive(b"more")
    assert not high.buffered
    with pytest.raises(ssl.SSLZeroReturnError):
        high.read_into(memoryview(bytearray(10)))


@pytest.mark.parametrize("established", [False, True])
async def test_strangers_send_little_inside_tls(
    files: tuple[Path, Path], established: bool
) -> None:
    """A greeting or a message, of no forbidden length, in records of one byte each."""
    async with serving(tls=read_tls(*files)) as (server, address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        stream = TlsStream(server_trust(), host="127.0.0.1")
        while not stream.established and established:
            writer.write(stream.take())
            stream.receive(await reader.read(65536))
        begin = b"\0" + struct.pack("!I", 4096) if established else bytes.fromhex("01003e80")
        sent = 0
        with logged() as logs, suppress(ConnectionError):
            while not reader.at_eof() and sent < 3 * MAX_SEALED:
                one, begin = begin[:1] or b"\0", begin[1:]
                stream.send(one)
                data = stream.take() if established else bytes.fromhex("1603010001") + one
                writer.write(data)
                await writer.drain()
                sent += len(data)
                await asyncio.sleep(0)
            await until(lambda: not server.open)
        writer.close()
        assert [each["why"] for each in logs] == ["too much inside TLS before the proof"]
        assert MAX_SEALED - 2000 < sent < 2 * MAX_SEALED


async def test_strangers_inside_tls_are_cut_in_time(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmi_client.protocol.rendezvous.AUTH_SECONDS", 0.2)
    hello = _client_hello()
    async with serving(tls=read_tls(*files)) as (server, address):
        begun = time.monotonic()
        answers = await asyncio.gather(
            *(_told(address, said) for said in (hello[:1], hello[:100], hello)),
            return_exceptions=True,
        )
        assert time.monotonic() - begun < 2
        assert server.counters.handshake_timeouts == 3
        assert all(isinstance(each, ConnectionError) or len(each) < 4096 for each in answers)


async def test_there_is_room_for_fewer_strangers_where_each_costs_more(
    files: tuple[Path, Path],
) -> None:
    async with serving(tls=read_tls(*files)) as (server, _):
        assert server.strangers._room == MAX_TLS_STRANGERS
    async with serving() as (server, _):
        assert server.strangers._room == MAX_STRANGERS


async def test_what_is_no_tls_is_refused_in_a_few_bytes(files: tuple[Path, Path]) -> None:
    async with serving(tls=read_tls(*files)) as (_, address):
        assert len(await _told(address, b"\x16" + b"GET / HTTP/1.1\r\n")) < 16  # an alert
        assert await _told(address, b"GET / HTTP/1.1\r\n") == b""


async def test_a_relay_leg_inside_tls_is_refused(files: tuple[Path, Path]) -> None:
    """It would be encrypted twice, and the server has no place for it."""
    async with serving(tls=read_tls(*files)) as (_, address):
        host, port = address.split(":")
        with logged() as logs:
            reader, writer = await asyncio.open_connection(host, int(port), ssl=server_trust())
            writer.write(relay_request(bytes(16)))
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        assert [each["why"] for each in logs] == ["a relay leg inside TLS"]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_in_place_of_tls_is_refused_in_our_words(
    files: tuple[Path, Path], seed: int
) -> None:
    chance = random.Random(seed)
    context = read_tls(*files)
    assert context is not None
    for _ in range(20):
        data = bytearray(_client_hello())
        for _ in range(chance.randrange(1, 5)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        step = chance.choice((1, 100, len(data)))
        stream = TlsStream(context, server_side=True)
        with suppress(AuthenticationFailed, ProtocolError):
            for start in range(0, len(data), step):
                stream.receive(bytes(data[start : start + step]))
        stream.send(b"what it would say")
        assert len(stream.take()) < 2000


# ------------------------------------------------------------- balancers and restarts
async def test_a_balancers_header_comes_before_tls(files: tuple[Path, Path]) -> None:
    async with (
        serving(tls=read_tls(*files), proxy_protocol=True) as (server, behind),
        balancer(behind) as address,
    ):
        ranks = await asyncio.gather(*(join("tls://" + address, r) for r in range(2)))
        members = next(iter(server.registry.jobs)).members
        for comm in ranks:
            port = comm._endpoint._punches.port
            assert members[comm.rank].reach[4].addresses == (("127.0.0.1", port),)
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        await asyncio.gather(*(comm.close() for comm in ranks))


@pytest.mark.parametrize("channel", ["direct", "relay"])
async def test_ranks_come_back_to_the_next_server_in_tls(
    files: tuple[Path, Path], channel: str, measured: Measured
) -> None:
    """With the certificates that they had: links that were not made yet need them."""
    data = np.random.default_rng(0).bytes(10_000_000)
    options = ("--tls-cert", str(files[0]), "--tls-key", str(files[1]))
    async with server(options=options) as place:
        address = "tls://" + place.address
        ranks = await asyncio.gather(
            *(join(address, r, 4, channel=channel, timeout=20.0) for r in range(4))
        )
        await asyncio.gather(ranks[0].send("before", 1), ranks[1].recv(0))
        place.signal(signal.SIGSTOP)
        sending = asyncio.gather(*(ranks[0].send(each, 1) for each in (b"first", data, b"last")))
        receiving = asyncio.gather(ranks[1].recv(0), ranks[2].recv(3))
        await asyncio.wait([sending, receiving], timeout=0.1)
        await place.kill()
        await place.start()
        back = time.monotonic()
        await ranks[3].send("a new link", 2)
        assert await receiving == [b"first", "a new link"]
        assert [await ranks[1].recv(0), await ranks[1].recv(0)] == [data, b"last"]
        await sending
        measured(f"restart, in TLS ({channel} links)", time.monotonic() - back, "s", "< 10")
        links = [link for comm in ranks for link in comm.stats()["links"].values()]
        assert all(link["tls"] and link["kind"] == channel for link in links)
        await asyncio.gather(*(comm.close() for comm in ranks))


# ---------------------------------------------------------------------------- checks
async def test_a_check_goes_the_way_of_a_rank(files: tuple[Path, Path]) -> None:
    async with serving(tls=read_tls(*files)) as (_, address):
        report = await checked("tls://" + address)
        assert report.server == "tls://" + address
        assert [each.name for each in report.steps][:4] == ["resolve", "connect", "TLS", "server"]
        encrypted = step(report, "TLS")
        assert encrypted.status == "warning"  # for it ends soon
        assert encrypted.text == "TLSv1.3; the certificate is trusted, and valid for 3 days"
        assert step(report, "authenticate").status == step(report, "round trip").status == "ok"
        assert causes(await checked(address)) == ["wants_tls"]


async def test_a_check_of_who_is_not_trusted_or_speaks_no_tls(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tls=read_tls(*files)) as (_, address), serving() as (_, plain):
        assert causes(await checked("tls://" + plain)) == ["no_tls"]
        assert causes(await checked("tls://localhost" + address[9:])) == ["certificate"]
        monkeypatch.setenv("FMI_TLS_CA", str(files[1]))
        report = await checked("tls://" + address)
        assert causes(report) == ["certificate"]
        assert "holds no certificate" in step(report, "TLS").text
        monkeypatch.setitem(sys.modules, "cryptography", None)
        assert causes(await checked("tls://" + address)) == ["no_extra"]
