"""What a check makes of servers that work, that do not, and of what is none."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import pytest

import fmi_client
from fmi_client import check
from fmi_client.check import Plan, run
from fmi_client.hosts import parse_endpoint
from tests.fmi.checking import (
    ALONE,
    CHALLENGE,
    SECRET,
    Talk,
    after_hello,
    causes,
    checked,
    drips,
    hangs_up,
    listening,
    resets,
    says,
    statuses,
    step,
    token,
)
from tests.support import closed_port, serving


async def test_all_is_well_and_running_jobs_notice_nothing() -> None:
    async with serving() as (server, address):
        waiting = asyncio.ensure_future(
            fmi_client.connect(address, job="check", rank=0, size=2, timeout=10)
        )
        report = await checked(address.replace("127.0.0.1", "localhost"))
        other = await fmi_client.connect(address, job="check", rank=1, size=2, timeout=10)
        comms = [await waiting, other]
        assert await asyncio.gather(*(comm.allreduce(1) for comm in comms)) == [2, 2]
        for comm in comms:
            await comm.close()
        assert server.counters.joins == 3
        assert not server.counters.refusals
    assert statuses(report) == ALONE
    assert report.ok
    assert report.nat == "none"
    assert report.local == report.observed
    assert report.round_trip_seconds is not None
    assert "on this machine" in report.advice


async def test_the_report_is_json_with_stable_keys() -> None:
    async with serving() as (_, address):
        report = json.loads(json.dumps((await checked(address)).as_dict()))
    assert list(report) == [
        *("server", "ok", "advice", "round_trip_seconds", "local", "observed", "nat"),
        *("links", "steps"),
    ]
    assert report["server"] == address
    assert list(report["steps"][0]) == ["name", "status", "text", "seconds", "cause"]


async def test_a_slow_server_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (_, address):
        assert "median of 20" in step(await checked(address), "round trip").text
        monkeypatch.setattr(check, "ROUND_TRIP_SECONDS", 0)
        assert step(await checked(address), "round trip").text.endswith("median of 1")


async def test_steps_are_told_when_they_begin_and_end() -> None:
    told: list[tuple[str, str]] = []
    async with serving() as (_, address):
        await asyncio.to_thread(
            run,
            Plan.make(address, admin_port=0),
            lambda name, doing: told.append(("begin", name)),
            lambda step: told.append(("end", step.name)),
        )
    assert told == [(word, name) for name in ALONE for word in ("begin", "end")]


JOB = {"job": "job", "rank": 0, "size": 1}


@pytest.mark.parametrize(
    ("arguments", "environment", "cause"),
    [
        ({}, None, "token_missing"),
        (JOB, None, "token_missing"),
        ({}, token(), "token_unused"),
        (JOB | {"token": token(-60)}, None, "token_expired"),
        (JOB | {"token": token(job="other")}, None, "token_wrong"),
        (JOB, token(size=2), "token_wrong"),
        ({"secret": SECRET + b"0"}, None, "secret_wrong"),
        ({"secret": SECRET + b"\n"}, token(), None),
        (JOB | {"secret": SECRET}, None, None),
        (JOB | {"token": token()}, token(-60), None),
        (JOB, token(), None),
    ],
    ids=[
        *("nothing", "nothing-for-a-job", "unused", "expired", "other-job", "other-size"),
        *("other-secret", "secret", "secret-for-a-job", "token", "environment"),
    ],
)
async def test_a_server_with_a_secret(
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    environment: str | None,
    cause: str | None,
) -> None:
    if environment:
        monkeypatch.setenv("FMI_TOKEN", environment)
    async with serving(SECRET) as (_, address):
        report = await checked(address, **arguments)
    assert causes(report) == ([cause] if cause else [])
    assert report.ok is (cause is None)
    # Without admission, there is still something to tell.
    assert step(report, "round trip").status == "ok"
    assert report.round_trip_seconds is not None
    assert report.nat == (None if cause else "none")


async def test_a_server_that_ends() -> None:
    async with serving() as (server, address):
        server.registry.draining = True
        report = await checked(address, timeout=1.0)
    assert causes(report) == ["draining"]


async def test_a_port_that_closed_while_the_admin_port_says_why() -> None:
    async def ready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readline()).startswith(b"GET /readyz ")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\ndraining\n")

    async with listening(ready) as port:
        report = await checked(f"127.0.0.1:{closed_port()}", admin_port=port)
        assert causes(report) == ["draining"]
    report = await checked(f"127.0.0.1:{closed_port()}", admin_port=port)
    assert causes(report) == ["refused"]


@pytest.mark.parametrize(
    ("talk", "where", "cause"),
    [
        (says(b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n"), "server", "http"),
        (says(b"SSH-2.0-OpenSSH_9.6\r\n"), "server", "ssh"),
        (says(b"\x15\x03\x03\x00\x02\x02\x46"), "server", "tls"),
        (says(b"\x1b[2J220 mail"), "server", "stranger"),
        (says(b"\x00\x00\x00\x01\x80"), "server", "stranger"),
        (says(b"\x00\x00"), "server", "stranger"),
        (says(b""), "server", "silent"),
        (hangs_up, "server", "closed"),
        (resets, "server", "closed"),
        (drips, "server", "stranger"),
        (after_hello({"t": "error", "code": "refused", "why": "\x1b[2J"}), "server", "stranger"),
        (after_hello(CHALLENGE), "authenticate", "lost"),
        (after_hello(CHALLENGE, {"t": "error", "code": "refused"}), "authenticate", "lost"),
        (
            after_hello(CHALLENGE, {"t": "error", "why": "\x1b[2Jfull"}),
            "authenticate",
            "turned_away",
        ),
    ],
)
async def test_what_is_no_server(talk: Talk, where: str, cause: str) -> None:
    start = time.monotonic()
    async with listening(talk) as port:
        report = await checked(f"127.0.0.1:{port}", timeout=0.6)
    assert time.monotonic() - start < 3
    failed = next(step for step in report.steps if step.status == "failed")
    assert (failed.name, failed.cause) == (where, cause)
    assert failed.text.isprintable()


async def test_nothing_listens() -> None:
    report = await checked(f"127.0.0.1:{closed_port()}")
    assert causes(report) == ["refused"]
    assert statuses(report) == {"resolve": "ok", "connect": "failed"}
    assert step(report, "connect").text.endswith("connection refused")


async def test_the_addresses_of_a_server_are_tried_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as (_, address):
        port = parse_endpoint(address)[1]
        found = (("127.0.0.9", port), ("127.0.0.1", port))
        monkeypatch.setattr(check, "resolve", lambda *_: found)
        report = await checked(f"fmi.example.org:{port}")
        assert report.ok
        assert step(report, "resolve").text == "fmi.example.org is 127.0.0.9, 127.0.0.1"
        assert step(report, "connect").text == f"127.0.0.1:{port} accepts connections"
    report = await checked(f"fmi.example.org:{port}")
    assert causes(report) == ["refused"]
    assert step(report, "connect").text == "; ".join(
        f"{ip}:{port}: connection refused" for ip, _ in found
    )


async def test_packets_vanish() -> None:
    """As behind a security group: a queue that is full drops what knocks."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        report = await checked(f"127.0.0.1:{full.getsockname()[1]}", timeout=0.5)
        for sock in waiting:
            sock.close()
    assert causes(report) == ["black_hole"]


@pytest.mark.parametrize(
    ("code", "cause"), [(socket.EAI_NONAME, "no_such_name"), (socket.EAI_AGAIN, "name_server")]
)
async def test_a_name_that_is_not_known(
    monkeypatch: pytest.MonkeyPatch, code: int, cause: str
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(code, "no")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    report = await checked("nowhere.invalid")
    assert causes(report) == [cause]
    assert statuses(report) == {"resolve": "failed"}


async def test_a_name_that_cannot_be_one() -> None:
    with pytest.raises(ValueError, match="is not an address of the form host:port"):
        await checked(f"{'x' * 64}.example.org")


async def test_a_name_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(10))
    assert causes(await checked("nowhere.invalid", timeout=0.05)) == ["name_server"]
    # The process can end all the same.
    assert [each.daemon for each in threading.enumerate() if each.name == "in time"] == [True]
    over.set()
