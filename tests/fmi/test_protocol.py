"""The protocol cores without sockets: whole, byte by byte, and attacked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fmi_client
from fmi_client.errors import AuthenticationFailed, FmiError, ProtocolError, RankTaken
from fmi_client.payloads import allocate
from fmi_client.protocol import auth, frames, peer
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.notice import Notice
from fmi_client.protocol.peer import COLLECTIVE, Handshake, Payload
from fmi_client.protocol.rendezvous import (
    Admission,
    Authenticated,
    ClientSide,
    PunchNow,
    Ready,
    Request,
    ServerSide,
    Welcome,
    error_message,
)
from fmi_client.protocol.transfers import Receive

SECRET = b"a secret of the server"
NOW = 1000.0
HELLO = Hello("job", 4, 2, 0, 2000, (("10.0.0.7", 4242),), b"n" * auth.NONCE_BYTES)
SEEN = ("203.0.113.9", 4242)


def token(**changes: Any) -> auth.Token:
    arguments = {"job": "job", "size": 4, "expires": 2000} | changes
    return auth.Token.parse(fmi_client.make_token(SECRET, **arguments))


def converse(
    client: ClientSide, server: ServerSide, step: int = 10**6, now: float = NOW
) -> tuple[list[Any], list[Any]]:
    """Carry bytes between the two sides, `step` at a time, until both are silent."""
    at_client: list[Any] = []
    at_server: list[Any] = []
    while client.outgoing or server.outgoing:
        data, client.outgoing = bytes(client.outgoing), bytearray()
        for i in range(0, len(data), step):
            for event in server.receive(data[i : i + step], now):
                at_server.append(event)
                if isinstance(event, Authenticated):
                    server.outgoing += frames.encode(event.welcome)
        data, server.outgoing = bytes(server.outgoing), bytearray()
        for i in range(0, len(data), step):
            at_client += client.receive(data[i : i + step])
    return at_client, at_server


def test_addresses_have_one_form() -> None:
    """They are compared as text: what the server saw with what a rank says of itself."""
    odd = replace(HELLO, candidates=(("::ffff:10.0.0.7", 1), ("2001:DB8:0::1", 2)))
    assert Hello.decode(odd.encode()).candidates == (("10.0.0.7", 1), ("2001:db8::1", 2))
    side = ServerSide(Admission(None, True), ("::ffff:203.0.113.9", 4242), NOW)
    assert side.observed == SEEN


@pytest.mark.parametrize("step", [1, 7, 10**6])
def test_a_rank_with_a_token_is_admitted_and_recognises_the_server(step: int) -> None:
    client = ClientSide(HELLO, token())
    server = ServerSide(Admission(SECRET, False), SEEN, NOW)
    at_client, at_server = converse(client, server, step)
    assert at_client == [Welcome(SEEN)]
    assert [event.hello for event in at_server] == [HELLO]
    client.link(3)
    client.tell(Notice(2, "abort", "why", None, 5, (1,)))
    server.outgoing += frames.encode({"t": "ready"})
    punch = {"t": "punch", "peer": 3, "at": [["10.0.0.8", 1]], "cookie": b"c" * 16}
    punch |= {"ticket": b"t" * 16, "hopeless": False}
    server.outgoing += frames.encode(punch)
    at_client, at_server = converse(client, server, step)
    assert at_server[0] == Request({"t": "link", "peer": 3})
    assert Notice.decode(at_server[1].message, 2) == Notice(2, "abort", "why", None, 5, (1,))
    assert at_client == [Ready(), PunchNow(3, (("10.0.0.8", 1),), b"c" * 16, b"t" * 16)]


@pytest.mark.parametrize(
    ("hello", "ticket", "admission", "now"),
    [
        (HELLO, token(expires=2001), Admission(SECRET, False), NOW),
        (HELLO, token(job="other"), Admission(SECRET, False), NOW),
        (HELLO, token(size=5), Admission(SECRET, False), NOW),
        (HELLO, auth.Token(2000, b"x" * 32), Admission(SECRET, False), NOW),
        (HELLO, token(), Admission(b"another server's secret", False), NOW),
        (HELLO, token(), Admission(SECRET, False), 2000.0),
        (HELLO, token(), Admission(None, True), NOW),
        (replace(HELLO, expires=0), None, Admission(SECRET, False), NOW),
        (HELLO, None, Admission(SECRET, True), NOW),
    ],
    ids=[
        *("expiry not of the token", "another job", "another size", "made-up key"),
        *("another secret", "expired", "server without secret", "no token", "no proof"),
    ],
)
def test_whoever_may_not_join_is_told_the_same(
    hello: Hello, ticket: auth.Token | None, admission: Admission, now: float
) -> None:
    server = ServerSide(admission, SEEN, now)
    with pytest.raises(AuthenticationFailed) as caught:
        converse(ClientSide(hello, ticket), server, now=now)
    assert error_message(caught.value) == {
        "t": "error", "code": "auth", "why": "authentication failed"
    }  # fmt: skip


def test_a_server_that_does_not_know_the_secret_is_not_believed() -> None:
    client = ClientSide(HELLO, token())
    client.receive(frames.encode({"t": "challenge", "nonce": b"n" * 16}))
    welcome = {"t": "welcome", "mac": b"m" * 32, "seen": list(SEEN)}
    with pytest.raises(AuthenticationFailed, match="server does not know"):
        client.receive(frames.encode(welcome))


def test_a_replayed_proof_is_worth_nothing() -> None:
    client, first = ClientSide(HELLO, token()), ServerSide(Admission(SECRET, False), SEEN, NOW)
    hello = bytes(client.outgoing)
    first.receive(hello, NOW)
    client.outgoing.clear()
    client.receive(bytes(first.outgoing))
    proof = bytes(client.outgoing)
    assert isinstance(first.receive(proof, NOW)[0], Authenticated)
    second = ServerSide(Admission(SECRET, False), SEEN, NOW)
    with pytest.raises(AuthenticationFailed):
        second.receive(hello + proof, NOW)


def test_refusals_arrive_as_the_errors_that_they_are() -> None:
    client = ClientSide(HELLO, token())
    client.receive(frames.encode({"t": "challenge", "nonce": b"n" * 16}))
    with pytest.raises(RankTaken, match="is here already"):
        client.receive(frames.encode(error_message(RankTaken("rank 2 is here already"))))


def test_before_proof_the_server_sends_no_more_than_it_got() -> None:
    client, server = ClientSide(HELLO, token()), ServerSide(Admission(SECRET, False), SEEN, NOW)
    hello = bytes(client.outgoing)
    server.receive(hello, NOW)
    refusal = frames.encode(error_message(AuthenticationFailed("authentication failed")))
    assert len(server.outgoing) + len(refusal) <= len(hello)


def test_a_long_frame_is_refused_from_its_length() -> None:
    server = ServerSide(Admission(SECRET, False), SEEN, NOW)
    with pytest.raises(ProtocolError, match="over the limit of 4096"):
        server.receive(b"\x00" + (4097).to_bytes(4, "big"), NOW)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_documented_errors_whole_and_byte_by_byte(
    data: bytes, preface: bool
) -> None:
    def outcome(step: int) -> str:
        server = ServerSide(Admission(SECRET, False), SEEN, NOW)
        stream = b"\x00" + data if preface else data
        try:
            for i in range(0, len(stream), step):
                server.receive(stream[i : i + step], NOW)
        except FmiError as error:
            return str(error)
        return bytes(server.outgoing).hex()[:10]

    assert outcome(1) == outcome(1000)


@given(st.sets(st.integers(0, 99)))
def test_rank_bitmaps(ranks: set[int]) -> None:
    assert frames.unpack_ranks(frames.pack_ranks(ranks, 100)) == sorted(ranks)


@pytest.mark.parametrize("text", ["", "fmi3.12", "fmi3.x.AAAA", "fmi2.1." + "A" * 43, "a.b.c"])
def test_malformed_tokens_are_refused_without_repeating_them(text: str) -> None:
    with pytest.raises(ValueError, match="make_token") as caught:
        auth.Token.parse(text)
    assert not text or text not in str(caught.value)


def test_keys_are_32_bytes_or_64_digits() -> None:
    assert auth.parse_key("00" * 32) == bytes(32)
    assert auth.parse_key(None) is None
    for bad in (b"short", "zz" * 32, "00", b"\0" * 33):
        with pytest.raises(ValueError, match="32 bytes"):
            auth.parse_key(bad)
    with pytest.raises(ValueError, match="empty"):
        fmi_client.make_token(b"", job="j", size=1, expires=1)


# ----------------------------------------------------------------- between two ranks

COOKIE = b"c" * 16


def shake(low: Handshake, high: Handshake, step: int = 1000) -> None:
    """Carry bytes until both are silent; the lower rank picks once it has proof."""
    while low.outgoing or high.outgoing:
        for one, other in ((low, high), (high, low)):
            data, one.outgoing = bytes(one.outgoing), bytearray()
            for i in range(0, len(data), step):
                other.receive(data[i : i + step])
        if low.proven and not low.complete and not high.complete and not low.outgoing:
            low.pick()


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("key", [None, b"k" * 32])
def test_two_ranks_prove_themselves_and_choose(key: bytes | None, step: int) -> None:
    low, high = Handshake(0, 3, 1, key, COOKIE), Handshake(3, 0, 1, key, COOKIE)
    shake(low, high, step)
    assert low.complete
    assert high.complete
    high.receive(b"first message")
    assert high.rest() == b"first message"


@pytest.mark.parametrize(
    "other",
    [
        lambda: Handshake(3, 0, 1, b"K" * 32, COOKIE),
        lambda: Handshake(3, 0, 1, None, COOKIE),
        lambda: Handshake(3, 0, 1, b"k" * 32, b"d" * 16),
        lambda: Handshake(3, 0, 2, b"k" * 32, COOKIE),
        lambda: Handshake(2, 0, 1, b"k" * 32, COOKIE),
        lambda: Handshake(3, 1, 1, b"k" * 32, COOKIE),
        lambda: Handshake(0, 3, 1, b"k" * 32, COOKIE),
    ],
    ids=["key", "no key", "cookie", "epoch", "rank", "receiver", "itself"],
)
def test_strangers_are_refused(other: Any) -> None:
    with pytest.raises(AuthenticationFailed):
        shake(Handshake(0, 3, 1, b"k" * 32, COOKIE), other())


def test_a_reflected_proof_is_refused() -> None:
    """Somebody in the middle cannot answer a rank with what the rank itself sent."""
    low, high = Handshake(0, 3, 1, None, COOKIE), Handshake(3, 0, 1, None, COOKIE)
    low.receive(bytes(high.outgoing))
    proof = bytes(low.outgoing)[peer.HELLO_BYTES :]
    with pytest.raises(AuthenticationFailed, match="key"):
        low.receive(proof)


messages = st.lists(
    st.tuples(
        st.integers(0, 3), st.binary(max_size=9), st.binary(max_size=5), st.integers(0, 5000)
    ),
    max_size=6,
)


@given(messages, st.integers(1, 6000), st.lists(st.booleans(), min_size=6, max_size=6))
def test_messages_arrive_however_the_stream_is_cut_and_whenever_they_are_awaited(
    sent: list[tuple[int, bytes, bytes, int]], step: int, early: list[bool]
) -> None:
    inbox = Inbox(allocate, stage_bytes=64)
    stream, receives = b"", []
    for i, (number, meta, signature, size) in enumerate(sent):
        data = bytes([i % 251]) * size
        key = (COLLECTIVE, 7, number)
        stream += peer.head(key, signature, Payload(meta, (data,)), size) + data
        into = memoryview(bytearray(size)) if i % 2 else None
        receives.append((Receive(key, signature, into), data, meta))
    # Receives of one key are posted in the order of sending, some before anything arrives.
    for receive, _, _ in receives:
        if early[receive.key[2]]:
            inbox.post(receive)
    for i in range(0, len(stream), step):
        inbox.feed(stream[i : i + step])
    for receive, _, _ in receives:
        if not early[receive.key[2]]:
            inbox.post(receive)
    for receive, data, meta in receives:
        assert receive.done
        assert receive.error is None
        assert bytes(receive.data) == data
        assert receive.meta == meta
        assert receive.into is None or bytes(receive.into) == data
    assert inbox.waiting == inbox.unexpected_bytes == 0


def test_a_payload_is_received_straight_into_its_place() -> None:
    inbox, into = Inbox(allocate), memoryview(bytearray(10))
    inbox.post(Receive((COLLECTIVE, 0, 0), b"", into))
    inbox.feed(peer.head((COLLECTIVE, 0, 0), b"", Payload(b"", ()), 10))
    inbox.get_buffer()[:4] = b"abcd"
    inbox.buffer_updated(4)
    assert bytes(into[:4]) == b"abcd"
    assert len(inbox.get_buffer()) == 6


@pytest.mark.parametrize(
    "header",
    [b"\xff" * 32, peer.head((9, 0, 0), b"", Payload(b"", ()), 0), b"\1\1" + bytes(30)],
)
def test_malformed_headers_are_protocol_errors(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        Inbox(allocate).feed(header)


def test_a_message_of_another_size_than_its_place_is_an_error() -> None:
    for post_first in (True, False):
        inbox, receive = Inbox(allocate), Receive((1, 0, 0), b"", memoryview(bytearray(3)))
        if post_first:
            inbox.post(receive)
        inbox.feed(peer.head((1, 0, 0), b"", Payload(b"", ()), 2) + b"ab")
        if not post_first:
            inbox.post(receive)
        assert isinstance(receive.error, ProtocolError)


def test_a_message_whose_receive_is_taken_back_half_way_goes_to_the_next_one() -> None:
    inbox, key = Inbox(allocate), (1, 0, 7)
    first, second, third = (Receive(key, b"", None) for _ in range(3))
    inbox.post(first)
    inbox.post(second)
    inbox.feed(peer.head(key, b"", Payload(b"", ()), 8) + b"abcd")
    inbox.cancel(first)
    inbox.post(third)
    inbox.feed(b"efgh" + peer.head(key, b"", Payload(b"", ()), 2) + b"ij")
    assert not first.done
    assert bytes(second.data) == b"abcdefgh"
    assert bytes(third.data) == b"ij"
    assert inbox.waiting == inbox.unexpected_bytes == 0
