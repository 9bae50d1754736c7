"""Attacks on the way into a job and between its ranks: each is refused, and tells nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import fmi_client
from fmi_client.errors import AuthenticationFailed, FmiError, ProtocolError, RankTaken
from fmi_client.protocol import auth, frames
from fmi_client.protocol.peer import Handshake
from fmi_client.protocol.relay import relay_request
from fmi_client.protocol.rendezvous import (
    Admission,
    Authenticated,
    ClientSide,
    Hello,
    ServerSide,
    Welcome,
    error_message,
)
from fmi_client.transport.knocking import Knocking
from tests.support import KEY, serving

SECRET = b"0123456789abcdef"
UNTIL = int(time.time()) + 3600
HELLO = Hello("job", 4, 2, 0, UNTIL, (("127.0.0.1", 4242),), b"n" * auth.NONCE_BYTES)
CHALLENGE_BYTES = len(frames.encode({"t": "challenge", "nonce": bytes(16)}))
REFUSAL = frames.encode(error_message(AuthenticationFailed("authentication failed")))


def token(secret: bytes = SECRET, **changes: Any) -> auth.Token:
    arguments = {"job": "job", "size": 4, "expires": UNTIL} | changes
    return auth.Token.parse(fmi_client.make_token(secret, **arguments))


def proof(key: auth.Token | None, hello: Hello = HELLO) -> Callable[[bytes], bytes]:
    """What a rank with this token answers to a challenge."""

    def answer(challenge: bytes) -> bytes:
        side = ClientSide(hello, key)
        side.outgoing.clear()
        side.receive(challenge)
        return bytes(side.outgoing)

    return answer


def always(data: bytes) -> Callable[[bytes], bytes]:
    return lambda _: data


EARLIER = frames.encode({"t": "challenge", "nonce": b"e" * 16})
OLD = int(time.time()) - 1
# A proof covers its hello: another one's would be refused for that, whatever else is wrong.
LATE, BARE = replace(HELLO, expires=OLD), replace(HELLO, expires=0)
FIRST = replace(BARE, rank=0)
JOINS: dict[str, tuple[Hello, Callable[[bytes], bytes]]] = {
    "wrong key": (HELLO, proof(auth.Token(UNTIL, b"x" * 32))),
    "another job's token": (HELLO, proof(token(job="other"))),
    "token of another size": (HELLO, proof(token(size=5))),
    "another server's token": (HELLO, proof(token(b"fedcba9876543210"))),
    "expired token": (LATE, proof(token(expires=OLD), LATE)),
    "expiry put off": (HELLO, proof(token(expires=OLD))),
    "no token": (BARE, proof(None, BARE)),
    "replayed join": (HELLO, always(proof(token())(EARLIER))),
    "proof of another rank": (HELLO, proof(token(), replace(HELLO, rank=1))),
    "taken rank, no token": (FIRST, proof(None, FIRST)),
    "empty proof": (HELLO, always(frames.encode({"t": "proof", "mac": b""}))),
    "proof that is text": (HELLO, always(frames.encode({"t": "proof", "mac": "x" * 32}))),
    "proof without code": (HELLO, always(frames.encode({"t": "proof"}))),
    "request in place of proof": (HELLO, always(frames.encode({"t": "link", "peer": 0}))),
    "frame over the limit": (HELLO, always(b"\0\0\x10\x01")),
    "no msgpack": (HELLO, always(b"\0\0\0\1\xc1")),
}


async def said(address: str, first: bytes, then: Callable[[bytes], bytes] | None = None) -> bytes:
    """Return all that the server says to a caller, until it closes."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(first)
    heard = b""
    if then is not None:
        heard = await asyncio.wait_for(reader.readexactly(CHALLENGE_BYTES), 5)
        writer.write(then(heard))
    heard += await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return heard


async def join(address: str, rank: int, size: int = 2, **more: Any) -> Any:
    arguments: dict[str, Any] = {"job": "job", "key": KEY, "timeout": 10} | more
    return await fmi_client.connect(address, rank=rank, size=size, **arguments)


@pytest.mark.row(19)
async def test_before_authentication_all_refusals_are_the_same_bytes() -> None:
    async with serving(SECRET) as (server, address):
        taken = asyncio.ensure_future(join(address, 0, 4, token=token().encode()))
        while not server.registry.ranks:  # noqa: ASYNC110 (it has no event to wait for)
            await asyncio.sleep(0)
        for name, (hello, answer) in JOINS.items():
            heard = await said(address, frames.PREFACE + frames.encode(hello.encode()), answer)
            assert heard[CHALLENGE_BYTES:] == REFUSAL, name
        assert server.registry.ranks == 1
        # Who has a token is told more.
        with pytest.raises(RankTaken):
            await join(address, 0, 4, token=token().encode())
        taken.cancel()
        await asyncio.gather(taken, return_exceptions=True)


@pytest.mark.row(19)
async def test_a_rank_that_the_job_does_not_have_is_an_error_of_the_caller() -> None:
    for rank in (4, -1):
        with pytest.raises(ValueError, match="is not a rank"):
            await join("127.0.0.1:1", rank, 4)
        with pytest.raises(ValueError, match="is not a rank"):
            fmi_client.sync.connect("127.0.0.1:1", job="job", rank=rank, size=4)
    async with serving(SECRET) as (_, address):
        strange = frames.PREFACE + frames.encode(HELLO.encode() | {"rank": 4})
        assert await said(address, strange) == b""


@pytest.mark.row(19)
async def test_a_ticket_that_is_made_up_or_used_gets_no_word() -> None:
    async with serving() as (server, address):
        assert await said(address, relay_request(b"t" * 16)) == b""
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        ticket, other = server.registry.tickets._pairs
        pair = server.registry.tickets._pairs[ticket]
        both = relay_request(ticket) + relay_request(other)[1:]
        assert await said(address, both) == b""  # more than a leg may say
        host, port = address.split(":")
        _, leg = await asyncio.open_connection(host, int(port))
        leg.write(relay_request(ticket))
        while pair.first is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await said(address, relay_request(ticket)) == b""
        leg.close()
        await asyncio.gather(*(comm.close() for comm in ranks))


def flips(data: bytes) -> list[bytes]:
    """Return `data` with each byte spoilt in turn: each bit of it, and all."""
    masks = [1 << bit for bit in range(8)] + [255]
    return [
        data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :]
        for i in range(len(data))
        for mask in masks
    ]


def admitted(spoil: int, change: Callable[[bytes], list[bytes]]) -> list[int]:
    """Which variants of message number `spoil` are believed by whoever gets them."""
    believed = []
    for n in range(len(change(_conversation(-1, None)[spoil]))):
        try:
            _conversation(spoil, lambda data, n=n: change(data)[n])  # type: ignore[misc]
        except (FmiError, IndexError):  # refused, or the rest is awaited in vain
            continue
        believed.append(n)
    return believed


def _conversation(spoil: int, change: Callable[[bytes], bytes] | None) -> list[bytes]:
    """Join, with one of the four messages changed on its way."""
    client = ClientSide(HELLO, token())
    server = ServerSide(Admission(SECRET, False), ("127.0.0.1", 4242), 1000.0)
    sent: list[bytes] = []

    def carry(data: bytes) -> bytes:
        sent.append(data)
        return change(data) if change and len(sent) - 1 == spoil else data

    server.receive(carry(bytes(client.outgoing)), 1000.0)
    client.outgoing.clear()
    client.receive(carry(bytes(server.outgoing)))
    events = server.receive(carry(bytes(client.outgoing)), 1000.0)
    event = events[0]
    assert isinstance(event, Authenticated)
    welcome = client.receive(carry(frames.encode(event.welcome)))[0]
    assert isinstance(welcome, Welcome)
    return sent


@pytest.mark.row(19)
@pytest.mark.parametrize("message", range(4), ids=["hello", "challenge", "proof", "welcome"])
def test_no_byte_of_a_join_can_be_changed(message: int) -> None:
    assert admitted(message, lambda data: [data])
    assert admitted(message, flips) == []


def meet() -> tuple[Handshake, Handshake, list[bytes]]:
    """Let two ranks prove themselves and choose; returns also the six messages."""
    low, high = (Handshake(a, b, 1, KEY, b"c" * 16, "job") for a, b in ((0, 3), (3, 0)))
    sent: list[bytes] = []
    for n, (one, other) in enumerate([(low, high), (high, low)] * 3):
        if n == 4:
            low.pick()
        out, one.outgoing = bytes(one.outgoing), bytearray()
        sent.append(out)
        other.receive(out)
    return low, high, sent


@pytest.mark.row(19)
def test_no_byte_of_a_handshake_between_ranks_can_be_changed() -> None:
    low, high, sent = meet()
    assert low.complete
    assert high.complete
    for message in range(len(sent)):
        for i in range(len(sent[message])):
            for mask in (1, 128, 255):
                assert not _completes(message, i, mask)


def _completes(message: int, i: int, mask: int) -> bool:
    ranks = [Handshake(a, b, 1, KEY, b"c" * 16, "job") for a, b in ((0, 3), (3, 0))]
    try:
        for n, (one, other) in enumerate([(0, 1), (1, 0)] * 3):
            if n == 4 and ranks[0].proven:
                ranks[0].pick()
            out, ranks[one].outgoing = ranks[one].outgoing, bytearray()
            if n == message:
                out[i] ^= mask
            ranks[other].receive(bytes(out))
    except (AuthenticationFailed, ProtocolError):
        return False
    return all(rank.complete for rank in ranks)


@pytest.mark.row(19)
@pytest.mark.parametrize(
    "changes",
    [{"key": b"K" * 32}, {"key": None}, {"epoch": 2}, {"cookie": b"d" * 16}, {"job": "other"}],
    ids=lambda changes: next(iter(changes)),
)
def test_ranks_of_different_jobs_do_not_link(changes: dict[str, Any]) -> None:
    mine: dict[str, Any] = {"epoch": 1, "key": KEY, "cookie": b"c" * 16, "job": "job"}
    low, high = Handshake(0, 3, **mine), Handshake(3, 0, **(mine | changes))
    with pytest.raises(AuthenticationFailed):
        converse(low, high)


def converse(low: Handshake, high: Handshake) -> None:
    for one, other in ((low, high), (high, low)) * 2:
        out, one.outgoing = bytes(one.outgoing), bytearray()
        other.receive(out)


@pytest.mark.row(19)
def test_a_replayed_or_reflected_handshake_is_refused() -> None:
    _, _, sent = meet()
    replay = b"".join(sent[1::2])  # all that the higher rank said in another conversation
    for data in (replay, b"".join(sent[::2])):
        low = Handshake(0, 3, 1, KEY, b"c" * 16, "job")
        with pytest.raises(AuthenticationFailed):
            low.receive(data)
    low = Handshake(0, 3, 1, KEY, b"c" * 16, "job")
    with pytest.raises(AuthenticationFailed):
        low.receive(low.hello)  # connected to itself
    for me, peer in ((0, 3), (3, 0)):
        rank = Handshake(me, peer, 1, KEY, b"c" * 16, "job")
        rank.outgoing.clear()
        rank.receive(Handshake(peer, me, 1, b"no key", b"").hello)  # anybody can say that
        with pytest.raises(AuthenticationFailed):
            rank.receive(bytes(rank.outgoing))  # a stranger gives it its own proof back


@pytest.mark.row(19)
@pytest.mark.parametrize("forged", [False, True], ids=["silent", "forged hellos"])
async def test_strangers_cannot_keep_the_peer_out(
    monkeypatch: pytest.MonkeyPatch, forged: bool
) -> None:
    """Where only the peer can connect, as behind a NAT, and strangers were there first."""
    start = Knocking.start
    monkeypatch.setattr(Knocking, "start", lambda self: start(self) if self._gives_way else None)
    async with serving(relay=False) as (_, address):
        ranks = await asyncio.gather(*(join(address, r) for r in range(2)))
        hello = Handshake(1, 0, 0, KEY, bytes(16)).hello if forged else b""
        callers = []
        for _ in range(200):
            _, writer = await asyncio.open_connection(
                "127.0.0.1", ranks[0]._endpoint._punches.port, local_addr=("127.0.0.2", 0)
            )
            writer.write(hello)
            callers.append(writer)
        await asyncio.wait_for(asyncio.gather(*(comm.barrier() for comm in ranks)), 3)
        for writer in callers:
            writer.close()
        await asyncio.gather(*(comm.close() for comm in ranks))
