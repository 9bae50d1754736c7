"""A link over a socket, beside what whole jobs already prove."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from fmi_client.payloads import allocate
from fmi_client.protocol.inbox import Inbox, Receive
from fmi_client.protocol.peer import COLLECTIVE, Payload, head
from fmi_client.transport.link import WORTH_BYTES, SocketLink
from fmi_client.transport.reactor import SyncReactor

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
