"""Connections that break while they are made, and those that are not chosen: nobody notices."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import numpy as np
import pytest

import fmi_client
from fmi_client.errors import RendezvousError
from fmi_client.join_request import JoinRequest
from fmi_client.protocol.addresses import Address
from fmi_client.protocol.hello import Hello
from fmi_client.socket_endpoint import SocketEndpoint
from fmi_client.transport import punch
from tests.support import KEY, serving, until

HELLO, PROOF, CHOICE = range(3)
LOW, HIGH = True, False


class Breaker:
    """Where a connection breaks: before the message that one side sends.

    What this side sends from then on is lost, and it sees the end a little later. The other
    side sees the end at once, or (`silent`) never.
    """

    def __init__(self, low: bool, message: int, times: int, silent: bool = False) -> None:
        self.where = (low, message)
        self.left = times
        self.silent = silent
        self.held: list[socket.socket] = []

    def passes(self, low: bool, message: int, sock: socket.socket) -> None:
        if self.left and (low, message) == self.where:
            self.left -= 1
            near, far = socket.socketpair()
            near.setblocking(False)
            if self.silent:
                self.held.append(sock.dup())
            os.dup2(near.fileno(), sock.fileno(), inheritable=False)
            near.close()
            self.held.append(far)
            asyncio.get_running_loop().call_later(0.02, far.close)

    def close(self) -> None:
        for sock in self.held:
            sock.close()


def fragile(breaker: Breaker) -> type[punch._Trial]:
    class Fragile(punch._Trial):
        sent = 0

        def _write(self) -> bool:
            if self.handshake.outgoing:
                self.punch.reactor.unwatch(self.sock)
                breaker.passes(self.handshake.low, self.sent, self.sock)
                self.punch.reactor.watch(self.sock, self.read)
                self.sent += 1
            return super()._write()

    return Fragile


async def pair(address: str) -> list[Any]:
    ranks = (
        fmi_client.connect(address, job="job", rank=r, size=2, key=KEY, timeout=10)
        for r in range(2)
    )
    return await asyncio.gather(*ranks)


async def talk(comm: Any, data: list[bytes]) -> float:
    """Send small messages and a large one, both ways; returns the seconds to the first."""
    loop = asyncio.get_running_loop()
    began, peer = loop.time(), 1 - comm.rank
    sends = [comm.send((comm.rank, k), peer, tag=7) for k in range(9)]
    sending = asyncio.gather(*sends, comm.send(data[comm.rank], peer, tag=7))
    assert await comm.recv(peer, tag=7) == (peer, 0)
    took = loop.time() - began
    assert [await comm.recv(peer, tag=7) for _ in range(8)] == [(peer, k) for k in range(1, 9)]
    assert await comm.recv(peer, tag=7) == data[peer]
    await sending
    return took


async def exchange(ranks: list[Any]) -> float:
    data = [np.random.default_rng(r).bytes(1_000_000) for r in range(2)]
    return max(await asyncio.gather(*(talk(comm, data) for comm in ranks)))


@pytest.mark.parametrize("relay", [True, False], ids=["relay", "no relay"])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("message", [HELLO, PROOF, CHOICE], ids=["hello", "proof", "choice"])
@pytest.mark.parametrize("low", [LOW, HIGH], ids=["low", "high"])
async def test_a_connection_that_breaks_is_replaced(
    monkeypatch: pytest.MonkeyPatch, low: bool, message: int, times: int, relay: bool
) -> None:
    breaker = Breaker(low, message, times)
    monkeypatch.setattr(punch, "_Trial", fragile(breaker))
    async with serving(relay=relay) as (_, address):
        ranks = await pair(address)
        took = await exchange(ranks)
        assert breaker.left == 0
        assert took < 1.5, took
        for comm in ranks:
            await comm.close()
    breaker.close()


@pytest.mark.parametrize("message", [HELLO, PROOF, CHOICE], ids=["hello", "proof", "choice"])
@pytest.mark.parametrize("low", [LOW, HIGH], ids=["low", "high"])
async def test_a_connection_that_breaks_on_one_side_only_is_replaced(
    monkeypatch: pytest.MonkeyPatch, low: bool, message: int
) -> None:
    """The dead half blocks the way for a new connection between the same ports."""
    breaker = Breaker(low, message, 1, silent=True)
    monkeypatch.setattr(punch, "_Trial", fragile(breaker))
    async with serving() as (_, address):
        ranks = await pair(address)
        assert await exchange(ranks) < 1.5
        assert breaker.left == 0
        for comm in ranks:
            await comm.close()
    breaker.close()


async def test_connections_that_are_not_chosen_disturb_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank with several addresses is reached at each of them; one connection is to stay."""
    proven: list[bool] = []

    class Counting(punch._Trial):
        def close(self) -> None:
            proven.append(self.handshake.proven)
            super().close()

    def known(request: JoinRequest, own: tuple[Address, ...]) -> Hello:
        others = ((f"127.0.0.{n}", own[0][1]) for n in range(2, 7))
        return make_hello(request, (*own, *others))

    make_hello = JoinRequest.hello
    monkeypatch.setattr(JoinRequest, "hello", known)
    monkeypatch.setattr(punch, "_Trial", Counting)
    async with serving(relay=False) as (_, address):
        for _ in range(10):
            ranks = await pair(address)
            await exchange(ranks)
            for comm in ranks:
                await comm.close()
    assert proven.count(True) >= 10, "there was nothing to choose from"


async def test_a_punch_that_the_peer_never_heard_of_ends_soon_after_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(punch, "LAST_SECONDS", 0.1)
    monkeypatch.setattr("fmi_client.socket_endpoint.REJOIN_SECONDS", 0.1)
    tell = SocketEndpoint._punch
    monkeypatch.setattr(
        SocketEndpoint, "_punch", lambda self, told: None if self.rank else tell(self, told)
    )
    async with serving() as (server, address):
        ranks = await pair(address)
        barriers = [asyncio.ensure_future(comm.barrier()) for comm in ranks]
        await until(lambda: bool(ranks[0]._endpoint._punches.under_way))
        await server.stop()
        for comm, barrier in reversed(list(zip(ranks, barriers, strict=True))):
            with pytest.raises(RendezvousError, match="connection to the server lost"):
                await asyncio.wait_for(barrier, 3)
            await comm.close()
