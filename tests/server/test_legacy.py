"""TCPunch's own clients, versions 1 and 2: what they send and are told, byte by byte.

The facts are those of the originals' sources; docs/legacy.md says which, and what was run.
"""

from __future__ import annotations

import math
import uuid

import pytest

from fmi_client.errors import ProtocolError, RendezvousError
from rendezvous_server import legacy
from rendezvous_server.config import ConfigError, read_networks
from rendezvous_server.legacy import Client, NameReader, Pool, Reply, Request
from rendezvous_server.legacy_connection import Legacy

TOKEN = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


def request_2(name: bytes, token: str = "") -> bytes:
    """Return what a client of version 2 sends."""
    return name.ljust(100, b"\0") + token.encode().ljust(37, b"\0") + b"\0\0\0\0"


# ------------------------------------------------------------------------- the bytes


def test_version_1_tells_an_address_in_8_bytes() -> None:
    assert legacy.encode_address(("192.0.2.7", 10000)) == b"\xc0\x00\x02\x07\x27\x10\x00\x00"


def test_version_2_answers_in_50_bytes() -> None:
    told = legacy.encode_response(
        legacy.Status.PAIRED, ("192.0.2.7", 10000), ("198.51.100.1", 258), TOKEN
    )
    assert told == (
        b"\x01\xc0\x00\x02\x07\x27\x10\xc6\x33\x64\x01\x01\x02"
        b"00112233-4455-6677-8899-aabbccddeeff\0"
    )
    assert legacy.refusal(2) == b"\x03" + bytes(12) + b"00000000-0000-0000-0000-000000000000\0"
    assert legacy.refusal(1) == b""


def test_a_name_of_version_1_is_complete_when_it_falls_quiet() -> None:
    reader = NameReader()
    for byte in b"job0_1":
        assert reader.receive(bytes([byte])) is None
    assert reader.quiet() == Request(1, b"job0_1")
    longest = NameReader()
    assert longest.receive(b"x" * 100) is None
    assert longest.quiet() == Request(1, b"x" * 100)
    with pytest.raises(ProtocolError, match="more than 100"):
        longest.receive(b"y")


def test_a_request_of_version_2_may_come_in_parts() -> None:
    data = request_2(b"job0_1", str(TOKEN))
    for cut in range(1, len(data)):
        reader = NameReader()
        assert reader.receive(data[:cut]) is None
        if cut > len(b"job0_1"):  # up to there it is what a client of version 1 sends
            assert reader.quiet() is None
        assert reader.receive(data[cut:]) == Request(2, b"job0_1", TOKEN)


def test_a_request_of_version_2_may_fill_its_name_and_set_its_flags() -> None:
    data = request_2(b"x" * 100)[:-4] + b"\xff\xff\xff\xff"
    assert NameReader().receive(data) == Request(2, b"x" * 100)


@pytest.mark.parametrize(
    "data",
    [
        request_2(b"name", "no token"),
        request_2(b"name", "\xe4"),
        request_2(b"\xff"),
        request_2(b"name") + b"\0",
    ],
)
def test_malformed_requests_of_version_2(data: bytes) -> None:
    reader = NameReader()
    with pytest.raises(ProtocolError):
        reader.receive(data)
    assert reader.version == 2


# -------------------------------------------------------------------------- the pool


def client(name: bytes, version: int = 1, port: int = 1, token: uuid.UUID | None = None) -> Client:
    return Client(Request(version, name, token), ("192.0.2.7", port), connection=port)


def address(port: int) -> bytes:
    return legacy.encode_address(("192.0.2.7", port))


def test_version_1_is_told_its_address_and_then_its_peers() -> None:
    pool = Pool(60)
    first, second = client(b"n", port=1), client(b"n", port=2)
    assert pool.join(first, 0) == (None, [Reply(first, address(1))])
    assert pool.join(second, 0) == (
        first,
        [Reply(first, address(2), last=True), Reply(second, address(2) + address(1), last=True)],
    )
    assert (len(pool), pool.pairs) == (0, 1)


def test_version_2_is_told_that_it_waits_and_then_its_peer() -> None:
    pool = Pool(60)
    first, second = client(b"n", 2, port=1), client(b"n", 2, port=2)
    _, [waits] = pool.join(first, 0)
    assert waits.data[:13] == b"\0" + address(1)[:6] + bytes(6)
    peer, told = pool.join(second, 0)
    assert peer is first
    assert [reply.client for reply in told] == [first, second]
    assert told[0].data == b"\1" + address(1)[:6] + address(2)[:6] + waits.data[13:]
    assert told[1].data[:13] == b"\1" + address(2)[:6] + address(1)[:6]
    assert told[1].data[13:] != waits.data[13:]
    assert all(reply.last for reply in told)


def test_only_the_same_name_and_version_meet() -> None:
    pool = Pool(60)
    for each in (client(b"n"), client(b"n", 2), client(b"m"), client(b"n" * 2)):
        assert pool.join(each, 0)[0] is None
    assert len(pool) == 4


def test_the_third_of_a_name_waits_for_the_fourth() -> None:
    pool = Pool(60)
    clients = [client(b"n", port=port) for port in range(4)]
    assert [pool.join(each, 0)[0] for each in clients] == [None, clients[0], None, clients[2]]


def test_who_left_is_never_paired() -> None:
    pool = Pool(60)
    gone, next_one = client(b"n"), client(b"n")
    pool.join(gone, 0)
    assert pool.leave(gone)
    assert pool.join(next_one, 0)[0] is None
    assert not pool.leave(gone)  # and takes nobody's place with it
    assert pool.join(client(b"n"), 0)[0] is next_one


def test_a_token_takes_back_the_place_and_its_old_connection_ends() -> None:
    pool = Pool(60)
    old = client(b"n", 2, port=1)
    pool.join(old, 0)
    again = client(b"n", 2, port=2, token=old.token)
    peer, [sent_away, waits] = pool.join(again, 0)
    assert peer is None
    assert (sent_away.client, sent_away.data[0], sent_away.last) == (old, 2, True)
    assert (waits.client, waits.data[0], waits.data[13:]) == (again, 0, sent_away.data[13:])
    assert not pool.leave(old)
    assert pool.join(client(b"n", 2), 0)[0] is again


def test_a_token_that_nobody_has_is_that_of_a_newcomer() -> None:
    pool = Pool(60)
    other = client(b"other", 2)
    pool.join(other, 0)
    first = client(b"n", 2, token=other.token)
    assert pool.join(first, 0)[0] is None
    assert first.token != other.token
    assert pool.join(client(b"n", 2, token=TOKEN), 0)[0] is first


def test_who_waits_too_long_is_sent_away() -> None:
    pool = Pool(60)
    early, late, modern = client(b"early"), client(b"late"), client(b"modern", 2)
    for each, now in ((early, 0), (modern, 0), (late, 1)):
        pool.join(each, now)
    assert pool.expire(59.9) == []
    sent_away = pool.expire(60)
    assert [(r.client, r.data[:1], r.last) for r in sent_away] == [
        (early, b"", True),
        (modern, b"\2", True),
    ]
    assert sent_away[1].data[13:] == f"{modern.token}\0".encode()
    assert [reply.client for reply in pool.expire(math.inf)] == [late]


def test_version_1_waits_longer() -> None:
    pool = Pool(6 * 3600)
    for version in (1, 2):
        pool.join(client(b"n", version), 0)
    assert [reply.client.request.version for reply in pool.expire(legacy.PATIENCE)] == [2]
    assert [reply.client.request.version for reply in pool.expire(6 * 3600)] == [1]


def test_not_more_than_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy, "MAX_WAITING", 2)
    pool = Pool(60)
    for name in (b"1", b"2"):
        pool.join(client(name), 0)
    with pytest.raises(RendezvousError, match="2 clients wait"):
        pool.join(client(b"3"), 0)
    pool.join(client(b"1"), 0)  # who makes a pair needs no room
    pool.join(client(b"3"), 0)


def test_ten_thousand_wait_and_meet() -> None:
    pool = Pool(60)
    first = [client(str(n).encode(), port=n) for n in range(10_000)]
    assert not any(pool.join(each, 0)[0] for each in first)
    for each in first:
        assert pool.join(client(each.request.name), 0)[0] is each
    assert (len(pool), pool.pairs) == (0, 10_000)


def test_networks() -> None:
    served = Legacy(read_networks(["10.1.0.0/16", "192.0.2.7"]), ttl=60)
    for host in ("10.1.2.3", "::ffff:10.1.2.3", "192.0.2.7"):
        assert served.serves(host)
    for host in ("10.2.0.1", "::ffff:10.2.0.1", "2001:db8::1", "fe80::1%2"):
        assert not served.serves(host)
    for bad in ("::/0", "10.0.0.0/33", "10.1.2.3/8", "anywhere"):
        with pytest.raises(ConfigError, match="takes IPv4 networks"):
            read_networks([bad])
