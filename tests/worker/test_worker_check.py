"""The check as a Lambda function: the report is its result, whatever it says."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

import fmi_client
from lambda_worker import handlers
from lambda_worker.events import EventError
from tests.support import serving

SECRET = b"0123456789abcdef"


async def checked(**event: Any) -> dict[str, Any]:
    return await asyncio.to_thread(handlers.check, {"admin_port": 0, **event}, None)


async def test_the_report_is_the_result(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lambda_worker")
    async with serving() as (_, address):
        # As in all events: any case, and numbers that are strings.
        report = await asyncio.to_thread(
            handlers.check, {"SERVER": address, "ADMIN_PORT": "0", "Timeout": "5"}
        )
    assert json.loads(json.dumps(report)) == report
    assert report["ok"]
    assert report["nat"] == "none"
    assert f"check: connect: ok: {address} accepts connections" in caplog.messages


async def test_a_check_that_fails_is_a_result_too() -> None:
    async with serving(SECRET) as (_, address):
        report = await checked(server=address)
    assert not report["ok"]
    assert report["advice"].startswith("Give what admits you")


async def test_two_functions_test_their_link(monkeypatch: pytest.MonkeyPatch) -> None:
    expires = time.time() + 60
    token = fmi_client.make_token(SECRET, job="try", size=2, expires=expires)
    monkeypatch.setenv("FMI_TOKEN", token)
    async with serving(SECRET) as (_, address):
        event = {"server": address, "job": "try", "size": 2, "wait": 10}
        reports = await asyncio.gather(*(checked(rank=rank, **event) for rank in (0, 1)))
    assert [report["ok"] for report in reports] == [True, True]
    assert [report["links"][0]["kind"] for report in reports] == ["direct", "direct"]


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ([], "expected a JSON object"),
        ({}, "server: missing"),
        ({"server": " "}, "server: got ' '"),
        ({"server": "host:port"}, "not an address of the form host:port"),
        ({"server": "h", "rank": -1}, "rank: got -1"),
        ({"server": "h", "rank": 0}, "job, rank and size go together"),
        ({"server": "h", "timeout": 0}, "timeout: got 0"),
        ({"server": "h", "admin_port": 70000}, "admin_port=70000"),
        ({"server": "h", "token": "fmi3.1.x"}, "unknown field 'token'"),
    ],
)
def test_a_wrong_event_is_an_error(event: object, says: str) -> None:
    with pytest.raises(EventError, match=says):
        handlers.check(event)
