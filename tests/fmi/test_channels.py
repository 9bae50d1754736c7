"""channel=: what ranks that could do both are held to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import fmi_client
from fmi_client.errors import PunchFailed
from tests.fmi.test_failures import outcome
from tests.support import KEY, serving


async def exchange(address: str, channels: tuple[str, str]) -> list[Any]:
    async def rank(r: int) -> Any:
        options: dict[str, Any] = {"job": "job", "size": 2, "key": KEY, "timeout": 5}
        async with fmi_client.connect(address, rank=r, channel=channels[r], **options) as comm:
            error = await outcome(comm.barrier())
            return error or comm.stats()["links"][1 - r]["kind"]

    return await asyncio.gather(rank(0), rank(1))


@pytest.mark.parametrize(
    ("channels", "kind"),
    [
        (("auto", "auto"), "direct"),
        (("direct", "direct"), "direct"),
        (("relay", "relay"), "relay"),
        (("auto", "relay"), "relay"),
        (("relay", "auto"), "relay"),
    ],
)
async def test_the_channel_that_was_asked_for_is_taken(
    channels: tuple[str, str], kind: str
) -> None:
    async with serving() as (_, address):
        assert await exchange(address, channels) == [kind, kind]


async def test_relay_does_not_wait_for_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmi_client.transport.punch.RELAY_AFTER", 100)
    monkeypatch.setattr("fmi_client.transport.punch.RELAY_GRACE", 100)
    async with serving() as (_, address):
        assert await exchange(address, ("relay", "relay")) == ["relay", "relay"]


async def test_direct_is_never_relayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmi_client.punches.PUNCH_SECONDS", 1.0)
    # Nobody can be reached: every connection is one to the server.
    monkeypatch.setattr("fmi_client.transport.knocking.Knocking.start", lambda _: None)
    async with serving() as (_, address):
        for error in await exchange(address, ("direct", "direct")):
            assert isinstance(error, PunchFailed)
            assert "channel='direct' rules out the relay" in str(error)
        assert await exchange(address, ("auto", "auto")) == ["relay", "relay"]


async def test_relay_fails_at_once_where_the_server_does_not() -> None:
    async with serving(relay=False) as (_, address):
        async with asyncio.timeout(2):
            for error in await exchange(address, ("relay", "relay")):
                assert isinstance(error, PunchFailed)
                assert "nothing but the relay, and the server does not relay" in str(error)
