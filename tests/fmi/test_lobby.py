"""Callers at a rank's door, where the rank has no descriptor for them; legs that cannot be laid."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fmi_client.protocol.peer import Handshake
from fmi_client.transport import lobby
from fmi_client.transport.lobby import Lobby
from fmi_client.transport.reactor import SyncReactor
from fmi_client.transport.relay import Dial
from tests.support import KEY, close_by_reset, closed_port

SECONDS = 5.0


@pytest.fixture
def reactor() -> Iterator[SyncReactor]:
    made = SyncReactor()
    yield made
    made.close()


class Door(socket.socket):
    """A listener of a process that has no descriptor left for the first callers."""

    without = 2
    asked = 0

    def accept(self) -> Any:
        self.asked += 1
        if self.asked <= self.without:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


class Expected:
    """A punch that awaits rank 1."""

    peer = 1

    def __init__(self) -> None:
        self.adopted: list[tuple[socket.socket, bytes]] = []

    def adopt(self, sock: socket.socket, hello: bytes) -> None:
        self.adopted.append((sock, hello))


def test_a_caller_for_whom_there_is_no_descriptor_is_let_in_when_there_is_one(
    reactor: SyncReactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "SHORTAGE_SECONDS", 0.05)
    hello, punch = Handshake(1, 0, 0, KEY, bytes(16)).hello, Expected()
    with Door() as door, socket.socket() as caller:
        door.bind(("127.0.0.1", 0))
        Lobby(reactor, [door], 0, {1: punch}.get)  # type: ignore[arg-type]
        caller.connect(door.getsockname())
        caller.sendall(hello)
        began = time.monotonic()
        assert reactor.run_until(lambda: bool(punch.adopted), time.monotonic() + SECONDS)
        (adopted,) = punch.adopted
        assert adopted[1] == hello
        assert door.asked == door.without + 1
        assert time.monotonic() - began > door.without * 0.05, "it asked again without a pause"
        adopted[0].close()


# ------------------------------------------------------------------------------- relay legs
def refused(reactor: SyncReactor, port: int) -> list[tuple[str, bool]]:
    """Lay a leg to a port; returns why that failed, and whether it is final."""
    said: list[tuple[str, bool]] = []

    def failed(what: str, final: bool) -> None:
        said.append((what, final))

    dial = Dial(reactor, ("127.0.0.1", port), bytes(16), pytest.fail, failed)  # type: ignore[arg-type]
    assert reactor.run_until(lambda: bool(said), time.monotonic() + SECONDS)
    assert not dial.waiting
    return said


def test_a_leg_to_a_server_that_is_not_there(reactor: SyncReactor) -> None:
    said = refused(reactor, closed_port())
    assert said == [("cannot be asked to relay (Connection refused)", False)]


@pytest.mark.parametrize(
    ("by_reset", "why"),
    [
        (False, "refuses to relay"),
        (True, "cannot be asked to relay (Connection reset by peer)"),
    ],
)
def test_a_leg_to_a_server_that_goes(reactor: SyncReactor, by_reset: bool, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            sock, _ = server.accept()
            sock.recv(1)
            if by_reset:
                close_by_reset(sock)
            else:
                sock.recv(4096)  # what is left unread is a reset, too
            sock.close()

        with ThreadPoolExecutor(1) as pool:
            gone = pool.submit(hang_up)
            assert refused(reactor, server.getsockname()[1]) == [(why, False)]
            gone.result()
