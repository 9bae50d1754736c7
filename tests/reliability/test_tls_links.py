"""Row 22: links that encrypt, whatever the sizes, and through relays that die."""

from __future__ import annotations

import random
import socket
import time

import pytest

from fmi_client.payloads import allocate
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.peer import POINT_TO_POINT, Payload
from fmi_client.protocol.tls import TlsStream
from fmi_client.protocol.transfers import Receive, Send
from fmi_client.transport.link import SocketLink
from fmi_client.transport.reactor import SyncReactor
from fmi_client.transport.tls import Identity, TlsSocket, make_identity, pin

pytestmark = pytest.mark.row(22)

KEY = (POINT_TO_POINT, 0, 0)
LITTLE, MUCH = 16 * 1024, 1024 * 1024
"""Room in the system between two ends; little is less than what is kept for a relay that dies."""


class Pair:
    """Both ends of a relayed link, with or without TLS, and what is said over it each way."""

    def __init__(self, seed: int = 0, *, room: int, encrypted: bool = True) -> None:
        self.room = room
        self.reactor = SyncReactor()
        self.random = random.Random(seed)
        self.identities = (make_identity(), make_identity()) if encrypted else None
        lost = lambda _: None  # noqa: E731
        self.links = [
            SocketLink(1 - n, self.reactor, Inbox(allocate, hold=True), lost) for n in (0, 1)
        ]
        self.sent: list[list[bytes]] = [[], []]
        self.received: list[list[Receive]] = [[], []]
        self.attach()

    def attach(self) -> None:
        """Give both ends a new connection."""
        socks = socket.socketpair()
        for sock in socks:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.room)
        ends = _encrypted(socks, *self.identities) if self.identities else socks
        for link, sock in zip(self.links, ends, strict=True):
            link.attach(sock, "relay", b"")

    def cut(self) -> None:
        """The relay dies with what it holds; another one takes its place."""
        for link in self.links:
            link._lose(ConnectionResetError("the relay died"))
        for link in self.links:
            link.suspend()
        got = [link.received for link in self.links]
        assert [self.links[n].resume(got[1 - n]) for n in (0, 1)] == [True, True]
        self.attach()

    def say(self, size: int, one: int | None = None) -> Send:
        """Send a message of so many bytes, from either end, which is awaited later."""
        one = self.random.randrange(2) if one is None else one
        data = self.random.randbytes(size)
        self.sent[one].append(data)
        return self.links[one].send(KEY, b"", Payload(b"", (data,)))

    def listen(self) -> None:
        """Await all that was sent so far."""
        for n, link in enumerate(self.links):
            while len(self.received[n]) < len(self.sent[1 - n]):
                receive = Receive(KEY, b"", None)
                self.received[n].append(receive)
                link.post(receive)

    def poll(self, times: int) -> None:
        for _ in range(times):
            self.reactor.poll(0.0)

    def finish(self) -> None:
        """All that was sent arrives, as it was sent."""
        self.listen()
        ends = [each for receives in self.received for each in receives]
        assert self.reactor.run_until(lambda: all(each.done for each in ends), time.monotonic() + 5)
        for n, link in enumerate(self.links):
            assert [bytes(each.data) for each in self.received[n]] == self.sent[1 - n]
            link.abort(ConnectionError("over"))
        self.reactor.close()


def _encrypted(
    socks: tuple[socket.socket, socket.socket], one: Identity, other: Identity
) -> list[TlsSocket]:
    streams = [
        TlsStream(pin(one, other.certificate, server_side=False).context),
        TlsStream(pin(other, one.certificate, server_side=True).context, server_side=True),
    ]
    while not all(stream.established for stream in streams):
        for n in (0, 1):
            streams[1 - n].receive(streams[n].take())
    return [TlsSocket(sock, stream) for sock, stream in zip(socks, streams, strict=True)]


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_dying_relay_had_arrives_once_and_in_order(seed: int, encrypted: bool) -> None:
    pair = Pair(seed, room=LITTLE, encrypted=encrypted)
    for _ in range(8):
        for _ in range(pair.random.randrange(12)):
            pair.say(pair.random.choice((0, 1, 500, 16_000)))
        if pair.random.random() < 0.7:
            pair.listen()
        pair.poll(pair.random.randrange(4))
        if pair.random.random() < 0.7:
            pair.cut()
    pair.say(300_000)
    pair.listen()
    pair.poll(pair.random.randrange(4))
    pair.cut()
    pair.finish()


def test_what_was_read_with_the_end_of_a_payload_needs_no_more_to_come() -> None:
    pair = Pair(room=MUCH)
    for size in (100_000, 1, 100_000, 200_000, 5):
        pair.say(size, 0)
    pair.finish()


def test_what_was_read_and_decrypted_is_there_when_it_is_awaited() -> None:
    """The inbox holds the first message until it is; the others are behind it, in TLS."""
    pair = Pair(room=MUCH)
    for size in (100_000, 1, 40_000, 5):
        pair.say(size, 0)
    pair.poll(10)
    pair.finish()


def test_what_is_encrypted_cannot_be_taken_back() -> None:
    pair = Pair(room=LITTLE)
    sends = [pair.say(16_000, 0) for _ in range(10)]
    socket_, last = pair.links[0]._tls, sends[-1]
    assert socket_ is not None
    # What is in the queue when all before it has gone is encrypted together.
    pair.reactor.run_until(lambda: socket_.promised > 32_000, time.monotonic() + 5)
    assert not last.started
    assert not pair.links[0].withdraw(last)
    pair.finish()
    pair = Pair(room=LITTLE)
    pair.say(300_000, 0)
    last = pair.say(16_000, 0)
    assert pair.links[0].withdraw(last)  # beyond what is encrypted at once
    pair.sent[0].pop()
    pair.finish()
