"""A link over a socket, beside what whole jobs already prove."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator

import pytest

from fmi_client.errors import RankFailed
from fmi_client.payloads import allocate
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.peer import COLLECTIVE, Payload, head
from fmi_client.protocol.transfers import Receive
from fmi_client.transport.link import JOIN_BYTES, WORTH_BYTES, SocketLink
from fmi_client.transport.reactor import SyncReactor
from tests.reliability.strangers import reset

KEY = (COLLECTIVE, 0, 0)
NBYTES = 2 * WORTH_BYTES + 7


@pytest.fixture
def ends() -> Iterator[tuple[SocketLink, SyncReactor, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ours.setblocking(False)
    reactor = SyncReactor()
    link = SocketLink(1, reactor, Inbox(allocate), lambda _: None)
    link.attach(ours, "direct", b"")
    with theirs:
        yield link, reactor, theirs
    link.abort(ConnectionError("over"))
    reactor.close()


def test_the_rest_of_a_large_payload_is_not_waited_for_in_vain(
    ends: tuple[SocketLink, SyncReactor, socket.socket],
) -> None:
    """A link wakes up for much, but the last piece of a payload, or a small message, is little."""
    link, reactor, theirs = ends
    data = bytes(range(256)) * (NBYTES // 256) + bytes(7)
    whole = head(KEY, b"", Payload(b"", (data,)), NBYTES) + data
    first, second = Receive(KEY, b"", None), Receive(KEY, b"", None)
    link.post(first)
    sent = 0
    for size in (1000, WORTH_BYTES, WORTH_BYTES, NBYTES):  # the rest, when all else was read
        theirs.sendall(whole[sent : sent + size])
        sent += size
        reactor.run_until(lambda: first.done, time.monotonic() + 0.05)
    assert first.done
    assert first.data == data
    link.post(second)
    theirs.sendall(head(KEY, b"", Payload(b"", ()), 0))
    assert reactor.run_until(lambda: second.done, time.monotonic() + 5)


def test_a_small_message_to_a_peer_that_is_known_to_be_gone_fails_at_once(
    ends: tuple[SocketLink, SyncReactor, socket.socket],
) -> None:
    """The send itself finds the connection reset, and the link has failed before it returns."""
    link, reactor, theirs = ends
    heard = Receive(KEY, b"", None)  # until then what is sent is kept, to be sent again
    link.post(heard)
    theirs.sendall(head(KEY, b"", Payload(b"", ()), 0))
    assert reactor.run_until(lambda: heard.done, time.monotonic() + 5)
    gone = RankFailed("rank 1 died", rank=1)
    link._on_lost = lambda lost: lost.fail(gone)
    reset(theirs)
    sent = [link.send(KEY, b"", Payload(b"", (b"few",))) for _ in range(3)]
    assert [(each.done, each.error) for each in sent] == [(True, gone)] * 3


def test_a_link_sleeps_until_much_of_a_large_payload_has_come(
    ends: tuple[SocketLink, SyncReactor, socket.socket],
) -> None:
    link, reactor, theirs = ends
    link.post(Receive(KEY, b"", None))
    theirs.sendall(head(KEY, b"", Payload(b"", ()), NBYTES) + bytes(10))
    reactor.run_until(lambda: link.inbox.receiving, time.monotonic() + 5)
    left = link.inbox.left
    theirs.sendall(bytes(1000))
    reactor.run_until(lambda: link.inbox.left < left, time.monotonic() + 0.05)
    assert link.inbox.left == left
    theirs.sendall(bytes(WORTH_BYTES))
    assert reactor.run_until(lambda: link.inbox.left < left, time.monotonic() + 5)


class Far:
    """The other end of a link whose connections break: what it got of the bytes, and should."""

    def __init__(self) -> None:
        self.reactor = SyncReactor()
        self.link = SocketLink(1, self.reactor, Inbox(allocate), lambda _: None)
        self.got = self.sent = b""
        self.largest = self._messages = 0
        self._sock = socket.socket()

    def connect(self, kind: str) -> None:
        """Give the link a connection, with little room in the system's buffers."""
        self._sock.close()
        ours, self._sock = socket.socketpair()
        for sock in (ours, self._sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock.setblocking(False)
        self.link.attach(ours, kind, b"")

    def send(self, data: bytes) -> None:
        key, payload = (COLLECTIVE, 0, self._messages), Payload(b"", (data,))
        self._messages += 1
        self.largest = max(self.largest, len(data))
        self.sent += head(key, b"", payload, len(data)) + data
        self.link.send(key, b"", payload)

    def read(self, most: int = 1 << 20) -> None:
        self.reactor.poll(0.0)
        with contextlib.suppress(BlockingIOError):
            self.got += self._sock.recv(most)

    def read_all(self) -> None:
        end = time.monotonic() + 5
        while len(self.got) < len(self.sent) and time.monotonic() < end:
            self.read()

    def lose(self) -> None:
        """End the connection: what it had taken and not delivered is gone."""
        self._sock.close()
        self.link._lose(ConnectionResetError())

    def close(self) -> None:
        self._sock.close()
        self.link.abort(ConnectionError("over"))
        self.reactor.close()


@pytest.fixture
def far() -> Iterator[Far]:
    far = Far()
    yield far
    far.close()


def test_a_link_that_was_direct_counts_anew_through_a_relay(far: Far) -> None:
    """Its first connection broke before the peer had it: what that took has come to nobody."""
    far.connect("direct")
    far.send(b"a" * 100)
    far.lose()
    assert far.link.revive()
    far.connect("relay")
    far.read_all()
    far.lose()
    far.link.suspend()
    assert far.link.resume(len(far.got))
    far.connect("relay")
    far.send(b"b")
    far.read_all()
    assert far.got == far.sent


@pytest.mark.parametrize("seed", range(60))
def test_no_byte_is_wrong_or_comes_twice_however_often_a_relay_dies(far: Far, seed: int) -> None:
    """Where it cannot go on, because too much was under way, it says so."""
    chance = random.Random(seed)
    far.connect("direct" if seed % 2 else "relay")
    if seed % 2:
        for _ in range(chance.randrange(9)):
            far.send(chance.randbytes(chance.choice((0, 1, 200))))
        far.lose()
        assert far.link.revive()
        far.connect("relay")
    for _ in range(chance.randrange(3, 30)):
        action = chance.random()
        if action < 0.5:
            far.send(chance.randbytes(chance.choice((0, 1, 10, 1000, 16384, 20_000, 70_000))))
        elif action < 0.8:
            for _ in range(chance.randrange(1, 8)):
                far.read(chance.choice((1, 100, 3000, 60_000)))
        else:
            far.lose()
            far.link.suspend()
            if not far.link.resume(len(far.got)):
                assert far.largest > JOIN_BYTES
                break
            far.connect("relay")
    else:
        far.read_all()
        assert len(far.got) == len(far.sent)
    assert far.sent.startswith(far.got)
