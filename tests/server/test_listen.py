"""Where the server listens: both versions of IP at one port, or the one there is."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
from typing import Any

import pytest

from rendezvous_server import listen as listening
from rendezvous_server.listen import EVERYWHERE, MAX_HTTP, listen, room_for_http, room_for_ranks
from tests.server.test_server import http, join, server_process

create_server = socket.create_server


def close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests open no port to the world."""
    every = listening._addresses

    def narrowed(host: str) -> list[str]:
        return ["127.0.0.1", "::1"] if every(host) == ["0.0.0.0", "::"] else every(host)

    monkeypatch.setattr(listening, "_addresses", narrowed)


@pytest.mark.usefixtures("ipv6")
def test_both_versions_share_a_free_port() -> None:
    sockets = listen(EVERYWHERE, 0)
    assert [sock.family for sock in sockets] == [socket.AF_INET, socket.AF_INET6]
    (port,) = {sock.getsockname()[1] for sock in sockets}
    for host in ("127.0.0.1", "::1"):
        socket.create_connection((host, port), timeout=5).close()
    with pytest.raises(OSError, match="in use"):
        listen(EVERYWHERE, port)
    close(sockets)


def refusing(monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> list[int]:
    """Let the first attempts at IPv6 fail; returns the ports that were asked for."""
    asked: list[int] = []

    def create(address: tuple[str, int], **options: Any) -> socket.socket:
        if ":" in address[0]:
            asked.append(address[1])
            if len(asked) <= times:
                raise OSError(code, os.strerror(code))
        return create_server(("127.0.0.1", 0), **options | {"family": socket.AF_INET})

    monkeypatch.setattr(socket, "create_server", create)
    return asked


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_machine_without_ipv6(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    refusing(monkeypatch, code, times=9)
    sockets = listen(EVERYWHERE, 0)
    assert len(sockets) == 1
    close(sockets)
    with pytest.raises(OSError, match=os.strerror(code)):
        listen("::1", 0)


def test_an_address_that_is_not_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_addresses", lambda _: ["127.0.0.1", "203.0.113.1"])
    with pytest.raises(OSError, match=r"203\.0\.113\.1"):
        listen("a-name", 0)


def test_a_port_that_is_free_in_one_version_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refusing(monkeypatch, errno.EADDRINUSE, times=2)
    sockets = listen(EVERYWHERE, 0)
    assert len(sockets) == 2
    assert len(set(asked)) == 3
    close(sockets)
    asked.clear()
    with pytest.raises(OSError, match="in use"):
        listen(EVERYWHERE, 10000)


@pytest.mark.parametrize("limit", [64, 128, 256, 1024, resource.RLIM_INFINITY])
def test_operators_leave_room_for_ranks(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    own = 20  # what a server has open before anybody comes
    assert 4 <= room_for_http() <= MAX_HTTP
    if limit != resource.RLIM_INFINITY:
        assert own + room_for_http() + room_for_ranks() < limit


@pytest.mark.usefixtures("ipv6")
async def test_ranks_and_operators_may_come_by_ipv6() -> None:
    async with server_process("--host", "::1") as server:
        comm = await join(f"[::1]:{server.port}")
        assert (await server.event("joined"))["address"].startswith("[::1]:")
        await comm.close()
        ready = await asyncio.to_thread(http, server.admin_port, "/readyz", "[::1]")
        assert ready == (200, "ok\n")
        with contextlib.closing(socket.socket()) as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.1", server.port))
