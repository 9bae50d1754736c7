"""Behind a load balancer: the ranks' addresses come in its header, and only there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fmi_client
from fmi_client.errors import ProtocolError
from fmi_client.protocol import auth
from fmi_client.protocol.addresses import Address
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.rendezvous import ClientSide, Welcome
from fmi_client.transport.knocking import Knocking
from rendezvous_server.proxy import MAX_BODY, split_header
from tests.support import KEY, logged, serving, until

TCP4 = bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 000c cb007109 0a000001 1092 2710")
TCP6 = bytes.fromhex(
    "0d0a0d0a000d0a515549540a 21 21 0024"
    "20010db8000000000000000000000009 20010db8000000000000000000000001 1092 2710"
)
MAPPED = bytes.fromhex(
    "0d0a0d0a000d0a515549540a 21 21 0024"
    "00000000000000000000ffffcb007109 00000000000000000000ffff0a000001 1092 2710"
)
LOCAL = bytes.fromhex("0d0a0d0a000d0a515549540a 20 00 0000")
LOCAL_TCP4 = bytes.fromhex("0d0a0d0a000d0a515549540a 20 11 000c cb007109 0a000001 1092 2710")
# With the identity of a VPC endpoint and a checksum behind the addresses, as AWS sends them.
EXTENDED = (
    TCP4[:14]
    + b"\x00\x1d"
    + TCP4[16:]
    + b"\xea\x00\x07\x01vpce-1"
    + b"\x03\x00\x04\x01\x02\x03\x04"
)
SEEN = ("203.0.113.9", 4242)

HEADERS: list[tuple[bytes, Address | None]] = [
    (TCP4, SEEN),
    (TCP6, ("2001:db8::9", 4242)),
    (MAPPED, SEEN),
    (EXTENDED, SEEN),
    (LOCAL, None),
    (LOCAL_TCP4, None),
]


@given(st.sampled_from(HEADERS), st.binary(max_size=64))
def test_a_header_is_read_when_it_is_complete_and_not_before(
    header: tuple[bytes, Address | None], rest: bytes
) -> None:
    data, address = header
    for end in range(len(data)):
        assert split_header(data[:end]) is None
    assert split_header(data + rest) == (address, rest)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x00", "no PROXY header"),
        (b"\r\n\r\n\x00\r\nQUIT\r", "no PROXY header"),
        (b"POST / HTTP/1.1", "no PROXY header"),
        (b"PROXY TCP4 203.0.113.9 10.0.0.1 4242 10000\r\n", "of version 1"),
        (b"PROXY", "of version 1"),
        (TCP4[:12] + b"\x11" + TCP4[13:], "unknown version and command 0x11"),
        (TCP4[:12] + b"\x22" + TCP4[13:], "unknown version and command 0x22"),
        (TCP4[:13] + b"\x12" + TCP4[14:], "family 0x12, not TCP"),  # UDP
        (TCP4[:13] + b"\x31" + TCP4[14:], "family 0x31, not TCP"),  # Unix socket
        (TCP4[:13] + b"\x00\x00\x00", "family 0x00, not TCP"),  # from nobody knows where
        (TCP4[:14] + b"\x00\x0b", "of 11 bytes"),
        (TCP6[:14] + b"\x00\x23", "of 35 bytes"),
        (TCP4[:14] + (MAX_BODY + 1).to_bytes(2, "big"), "over the limit"),
        (LOCAL[:14] + b"\xff\xff", "over the limit"),
    ],
)
def test_anything_else_is_refused_as_soon_as_it_is_seen(data: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        split_header(data)


@given(st.binary(max_size=80), st.booleans())
def test_no_bytes_break_the_parser(noise: bytes, signed: bool) -> None:
    with contextlib.suppress(ProtocolError):
        split_header((TCP4[:12] if signed else b"") + noise)


@asynccontextmanager
async def balancer(server: str) -> AsyncIterator[str]:
    """A load balancer in front of a server; connects from another address than its clients."""
    port = int(server.split(":")[1])
    pumps: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, out = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
        host, source = writer.get_extra_info("peername")
        out.write(TCP4[:16] + socket.inet_aton(host) + TCP4[20:24])
        out.write(source.to_bytes(2, "big") + TCP4[26:])
        pumps.update(map(asyncio.ensure_future, (pump(reader, out), pump(behind, writer))))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@pytest.mark.parametrize("kind", ["direct", "relay"])
async def test_a_job_behind_a_balancer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "relay":
        monkeypatch.setattr(Knocking, "start", lambda _: None)
    async with serving(proxy_protocol=True) as (server, behind), balancer(behind) as address:
        with logged() as logs:
            ranks = await asyncio.gather(
                *(
                    fmi_client.connect(address, job="job", rank=r, size=3, key=KEY, timeout=10)
                    for r in range(3)
                )
            )
        joined = {e["rank"]: e["address"] for e in logs if e["event"] == "joined"}
        members = next(iter(server.registry.jobs)).members
        for comm in ranks:
            port = comm._endpoint._punches.port
            assert members[comm.rank].reach[4].addresses == (("127.0.0.1", port),)
            assert joined[comm.rank] == f"127.0.0.1:{port}"
        totals = await asyncio.gather(*(comm.allreduce(np.ones(50_000)) for comm in ranks))
        assert all((total == 3).all() for total in totals)
        assert {link["kind"] for c in ranks for link in c.stats()["links"].values()} == {kind}
        await asyncio.gather(*(comm.close() for comm in ranks))
        await until(lambda: not server.relayed.legs and not server.open)


@pytest.mark.parametrize("step", [1, 10, 1000])
@pytest.mark.parametrize(("header", "seen"), [(TCP4, SEEN), (LOCAL, None)])
async def test_the_welcome_says_what_the_header_said(
    header: bytes, seen: Address | None, step: int
) -> None:
    async with serving(proxy_protocol=True) as (_, address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        here = writer.get_extra_info("sockname")
        hello = Hello("job", 2, 0, 0, 0, (("10.0.0.7", 4242),), auth.nonce())
        client = ClientSide(hello, None)
        events: list[object] = []
        out = header
        while not events:
            out, client.outgoing = out + bytes(client.outgoing), bytearray()
            for begin in range(0, len(out), step):
                writer.write(out[begin : begin + step])
                await asyncio.sleep(0)
            out = b""
            events += client.receive(await asyncio.wait_for(reader.read(4096), 5))
        (welcome,) = events
        assert isinstance(welcome, Welcome)
        assert welcome.observed == (seen or here)
        writer.close()


async def refusals(address: str, *openings: bytes) -> list[str]:
    """Begin connections with these bytes, see them cut without a word; what the log says."""
    with logged(logging.DEBUG) as logs:
        for opening in openings:
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(opening)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
    return [entry["why"] for entry in logs if entry["event"] == "refused"]


async def test_without_a_header_nobody_comes_in() -> None:
    async with serving(proxy_protocol=True) as (server, address):
        hello = bytes(ClientSide(Hello("job", 1, 0, 0, 0, (SEEN,), auth.nonce()), None).outgoing)
        none, text = await refusals(address, hello, b"PROXY UNKNOWN\r\n")
        assert "--proxy-protocol" in none
        assert "version 1" in text
        assert server.counters.refusals == 2


async def test_a_header_that_nobody_asked_for_is_none_of_ours() -> None:
    async with serving() as (_, address):
        assert await refusals(address, TCP4) == ["not a version 3 client"]


async def test_a_header_that_does_not_end_is_cut_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmi_client.protocol.rendezvous.AUTH_SECONDS", 0.1)
    async with serving(proxy_protocol=True) as (_, address):
        assert await refusals(address, b"", TCP4[:-1], TCP4, LOCAL) == []
