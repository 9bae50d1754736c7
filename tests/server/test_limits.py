"""What a rank may ask for, and leave unread; and jobs that go on at another server."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from fmi_client.errors import ProtocolError
from fmi_client.hosts import parse_endpoint
from fmi_client.protocol.frames import encode
from rendezvous_server.registry import SPARE_LINKS, Outbox, Registry
from rendezvous_server.several import SharingServer
from tests.reliability.restarts import join, leave
from tests.reliability.strangers import enter
from tests.server import test_registry
from tests.support import serving, until

pytestmark = pytest.mark.alone


def test_who_asks_for_links_again_and_again_is_stopped() -> None:
    """Each time both ask they get tickets, which take memory for as long as they last."""
    registry = Registry(ttl=60)
    members = [test_registry.join(registry, rank, size=2)[0] for rank in range(2)]

    def both_ask() -> None:
        for member in members:
            registry.request(member, {"t": "link", "peer": 1 - member.rank}, test_registry.NOW)

    for _ in range(2 * 2 + SPARE_LINKS):
        both_ask()
    with pytest.raises(ProtocolError, match="asked for too often"):
        both_ask()


async def test_who_does_not_read_what_it_asks_for_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its answers, which have a bit for each rank, would pile up here."""
    answered = 0
    request = Registry.request

    def counting(self: Registry, *asked: Any) -> Outbox:
        nonlocal answered
        answered += 1
        return request(self, *asked)

    monkeypatch.setattr(Registry, "request", counting)
    async with serving() as (server, address):
        port = parse_endpoint(address)[1]
        sock, _ = await asyncio.to_thread(enter, port, "job", 0, 60_000)
        with sock, suppress(ConnectionError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.to_thread(sock.sendall, encode({"t": "who"}) * 100_000)
        await until(lambda: server.registry.ranks == 0)
    assert 0 < answered < 10_000  # of 100,000


@pytest.fixture
def rare_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers say that they live once, when they start, and then only where a test lets them."""
    monkeypatch.setattr("rendezvous_server.others.BEAT_SECONDS", 1000)


@pytest.mark.usefixtures("rare_beats")
@pytest.mark.parametrize("heard", ["by its own beat", "from the other"])
async def test_a_server_that_was_given_up_and_lives_hands_its_jobs_over(
    heard: str, two: list[tuple[SharingServer, str]]
) -> None:
    """Its ranks, of which the other carries one, come again, and are together there."""
    (old, at_old), (new, at_new) = two
    first = asyncio.ensure_future(join(at_old, 0, 3))
    await until(lambda: old.registry.ranks == 1)
    ranks = await asyncio.gather(first, join(at_old, 1, 3), join(at_new, 2, 3))
    assert old.registry.ranks == 3
    shared = new.others._shared
    await shared.bury(old.others._shared.me)  # as if it had been silent for long
    assert await shared.claim("job") == shared.me
    await (old if heard == "by its own beat" else new).others._beat_once()
    await until(lambda: new.registry.ranks == 3)
    assert (old.registry.ranks, old.registry.jobs) == (0, {})
    totals = await asyncio.gather(*(comm.allreduce(np.ones(2)) for comm in ranks))
    assert [total.tolist() for total in totals] == [[3, 3]] * 3
    await leave(ranks)
