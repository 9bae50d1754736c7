"""The live page: who may look at it."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest
from aiohttp import ClientSession

from rendezvous_server import admin, config, live
from rendezvous_server.access import (
    ALL_TRIES,
    SESSION_SECONDS,
    TRIES,
    TRIES_SECONDS,
    Access,
    TooManyTries,
)
from rendezvous_server.listen import MAX_HTTP
from tests.server.test_live import message, watched
from tests.server.test_server import server_process
from tests.support import serving, until

TOKEN = b"token-of-an-operator"
BEARER = {"Authorization": f"Bearer {TOKEN.decode()}"}
GUARDED = ("/", "/status", "/events")
HALF_A_FORM = (
    b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n\r\ntoken="
)


def test_the_cookie_proves_itself_and_expires() -> None:
    access = Access(TOKEN, loopback=False)
    cookie = access.cookie(1000.0)
    assert TOKEN.decode() not in cookie
    assert access.takes_cookie(cookie, 1000.0 + SESSION_SECONDS - 1)
    assert not access.takes_cookie(cookie, 1000.0 + SESSION_SECONDS)
    assert not Access(b"another operator's", loopback=False).takes_cookie(cookie, 1000.0)
    later = str(int(cookie.partition(".")[0]) + 1)
    for wrong in ("", ".", "x", cookie[:-1], cookie + "0", later + cookie[10:], "9" * 50, "\xb2.x"):
        assert not access.takes_cookie(wrong, 1000.0)
    assert not Access(None, loopback=True).takes_cookie(Access(None, True).cookie(0.0), 0.0)


@pytest.mark.parametrize(
    ("guesser", "same", "other"),
    [
        ("192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ("2001:db8::1", "2001:db8:0:0:ffff::", "2001:db8:0:1::1"),
        ("fe80::1%eth0", "fe80::2", "192.0.2.1"),
        ("", "", "192.0.2.1"),
    ],
)
def test_guessing_is_slow_and_keeps_nobody_else_out(guesser: str, same: str, other: str) -> None:
    access = Access(TOKEN, loopback=False)
    for number in range(TRIES):
        assert not access.takes(b"guess %d" % number, guesser, 1000.0 + number)
    with pytest.raises(TooManyTries, match="51 s"):
        access.takes(TOKEN, same, 1000.0 + TRIES - 1)
    assert access.takes(TOKEN, other, 1000.0 + TRIES - 1)
    assert access.takes_cookie(access.cookie(1000.0), 1010.0)  # who is in stays in
    assert access.takes(TOKEN, same, 1000.0 + TRIES_SECONDS)


def test_guessing_is_slow_for_all_the_world_together() -> None:
    access = Access(TOKEN, loopback=False)
    for number in range(ALL_TRIES):
        assert not access.takes(b"guess", f"2001:db8:0:{number:x}::1", 1000.0 + number / ALL_TRIES)
    with pytest.raises(TooManyTries, match="59 s"):
        access.takes(TOKEN, "192.0.2.1", 1001.0)
    assert access.takes(TOKEN, "192.0.2.1", 1001.0 + TRIES_SECONDS)
    assert not access._failures


async def test_where_others_reach_it_a_token_has_to_be_set() -> None:
    async with watched(loopback=False) as there:
        for path in GUARDED:
            async with there.get(path, headers=BEARER) as answer:
                assert answer.status == 403
                assert "--admin-token-file" in await answer.text()


@pytest.mark.parametrize("loopback", [True, False])
async def test_with_a_token_nothing_is_shown_without_it(loopback: bool) -> None:
    async with watched(loopback, TOKEN) as there:
        for path in GUARDED:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "rendezvous=1.2"}):
                async with there.get(path, headers=headers) as answer:
                    assert answer.status == 401
                    text = await answer.text()
                    assert "Jobs" not in text
                    assert "jobs" not in text
            async with there.get(path, headers=BEARER) as answer:
                assert answer.status == 200


async def test_a_browser_signs_in_with_a_form() -> None:
    async with watched(False, TOKEN) as there:
        url = f"http://127.0.0.1:{there.port}/login"
        async with there.session.post(url, data={"token": "wrong"}) as answer:
            assert answer.status == 401
            assert "Set-Cookie" not in answer.headers
            assert 'type="password"' in await answer.text()
        sent = {"token": f" {TOKEN.decode()}\n"}  # as copied with the end of its line
        async with there.session.post(url, data=sent, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (303, "./")
            cookie = answer.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN.decode() not in cookie
        pair = cookie.partition(";")[0]
        for path in GUARDED:
            async with there.get(path, headers={"Cookie": pair}) as answer:
                assert answer.status == 200
        for number in range(TRIES):
            async with there.get(
                "/status", headers={"Authorization": f"Bearer {number}"}
            ) as answer:
                pass
        assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (429, True)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        async with there.session.post(url, data=b"token=" + b"x" * 10_000, headers=form) as answer:
            assert answer.status == 413
        async with there.session.post(url, data=b"token=\xff", headers=form) as answer:
            assert answer.status == 400


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("attacker.example:{port}", 403),
        ("localhost.attacker.example", 403),
        ("10.0.0.1", 403),
        ("[", 403),
        ("", 403),
    ],
)
async def test_a_name_that_was_bent_to_lead_here_is_refused(host: str, status: int) -> None:
    async with watched() as there:
        headers = {"Host": host.format(port=there.port)}
        for path in GUARDED:
            async with there.get(path, headers=headers) as answer:
                assert answer.status == status
                assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])  # the latter: of another port
async def test_a_page_of_another_site_cannot_take_viewers_places(site: str) -> None:
    async with watched() as there:
        strange = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors"}
        for path in ("/events", "/status"):
            async with there.get(path, headers=strange) as answer:
                assert answer.status == 403
        link = strange | {"Sec-Fetch-Mode": "navigate"}
        for headers in (link, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
            async with there.get("/", headers=headers) as answer:
                assert answer.status == 200


async def test_a_page_of_another_site_cannot_use_up_a_browsers_tries() -> None:
    async with watched(True, TOKEN) as there:
        url = f"http://127.0.0.1:{there.port}/login"
        strange = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        for _ in range(TRIES + 1):
            async with there.session.post(url, data={"token": "x"}, headers=strange) as answer:
                assert answer.status == 403
        async with there.get("/status", headers=BEARER) as answer:
            assert answer.status == 200


async def test_a_form_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FORM_SECONDS", 0.05)
    async with watched(False, TOKEN) as there:
        reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
        writer.write(HALF_A_FORM)
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_a_form_that_does_not_come_does_not_hold_up_the_end(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(TOKEN)
    async with server_process("--admin-token-file", str(file)) as process:
        _, writer = await asyncio.open_connection("127.0.0.1", process.admin_port)
        writer.write(HALF_A_FORM)
        async with ClientSession() as session:  # answered after the form was begun
            await session.get(f"http://127.0.0.1:{process.admin_port}/livez")
        process.process.terminate()
        assert await asyncio.wait_for(process.process.wait(), 8) == 0
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHo", b"GET /livez HTTP/1.0\r\n"])
async def test_who_asks_for_nothing_takes_no_place_for_long(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "IDLE_SECONDS", 0.1)
    async with serving() as (server, _):
        runner, port = await admin.start(server, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        await runner.cleanup()


async def test_a_viewer_stays_for_as_long_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(live, "PERIOD", 0.05)
    monkeypatch.setattr(live, "HEARTBEAT", 0.5)
    async with serving() as (server, _), ClientSession() as session:
        runner, port = await admin.start(server, "127.0.0.1", 0)
        async with session.get(f"http://127.0.0.1:{port}/events") as answer:
            for _ in range(2):
                await message(answer)
        await runner.cleanup()


async def test_the_policy_allows_what_is_in_the_page_and_nothing_else() -> None:
    async with watched() as there, there.get("/") as answer:
        text, policy = await answer.text(), answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        code = b64encode(sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{code}'" in policy
    assert "http:" not in text
    assert "innerHTML" not in text


async def test_what_balancers_need_stays_open_and_the_option_arrives(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(TOKEN + b"\n")
    arguments = ("--allow-anonymous", "--admin-token-file", str(file))
    async with server_process(*arguments) as process, ClientSession() as session:
        base = f"http://127.0.0.1:{process.admin_port}"
        for path in ("/livez", "/readyz", "/metrics", "/address"):
            async with session.get(base + path) as answer:
                assert answer.status == 200
        for headers, status in (({}, 401), (BEARER, 200)):
            async with session.get(base + "/status", headers=headers) as answer:
                assert answer.status == status


async def test_a_scheduler_may_hand_the_token_over_in_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RENDEZVOUS_ADMIN_TOKEN", TOKEN.decode())
    async with server_process() as process, ClientSession() as session:
        url = f"http://127.0.0.1:{process.admin_port}/status"
        async with session.get(url) as answer:
            assert answer.status == 401
    with pytest.raises(config.ConfigError, match=r"in RENDEZVOUS_ADMIN_TOKEN or in .*, not in"):
        config.read_admin_token(tmp_path / "token", TOKEN.decode(), None)
    with pytest.raises(
        config.ConfigError, match="the admin token in RENDEZVOUS_ADMIN_TOKEN has 5 bytes"
    ):
        config.read_admin_token(None, "short", None)
    with pytest.raises(config.ConfigError, match="must not be the secret"):
        config.read_admin_token(None, TOKEN.decode(), TOKEN)


async def test_the_admin_port_of_all_interfaces_is_closed_without_a_token() -> None:
    async with serving() as (server, _), ClientSession() as session:
        for host, status in (("127.0.0.1", 200), ("0.0.0.0", 403)):
            runner, port = await admin.start(server, host, 0)
            async with session.get(f"http://127.0.0.1:{port}/status") as answer:
                assert answer.status == status
            await runner.cleanup()


@pytest.mark.parametrize("level", ["info", "debug"])
async def test_what_is_no_http_leaves_no_traceback_in_the_log(level: str) -> None:
    async with server_process("--log-level", level) as process:
        for sent in (b"GET / HTTP/1.1\r\nX: %s\r\n\r\n" % (b"x" * 20_000), b"\x16\x03\x01\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", process.admin_port)
            writer.write(sent)
            assert b" 400 " in await asyncio.wait_for(reader.readline(), 5)
            writer.close()
        process.process.terminate()
        if level == "debug":
            assert len((await process.event("no HTTP"))["why"]) <= 200
        await process.event("stopped")  # all lines before it are JSON


def test_errors_of_libraries_and_ours_are_told_with_their_traceback_in_one_line() -> None:
    code = """
import logging, structlog
from rendezvous_server.__main__ import _configure_logs
_configure_logs("info")
try:
    1 / 0
except ZeroDivisionError as error:
    logging.getLogger("aiohttp.server").error("a %s", "request", exc_info=error)
    structlog.get_logger().exception("ours")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("a request", "error"),
        ("ours", "error"),
    ]
    assert all("ZeroDivisionError" in line["exception"] for line in lines)


@pytest.mark.parametrize("request_line", [b"GET /livez", b"POST /login"])
async def test_what_is_sent_is_not_decompressed(
    request_line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(admin_token=TOKEN) as (server, _):
        runner, port = await admin.start(server, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_line + HALF_A_FORM[HALF_A_FORM.index(b" HTTP") : -10])
        writer.write(b"\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n" + b"?" * 40)
        assert b" 500 " not in await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await runner.cleanup()
    assert not caplog.records


async def test_forms_that_never_come_take_no_more_places_than_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(admin_token=TOKEN) as (server, _):
        runner, port = await admin.start(server, "127.0.0.1", 0)
        assert runner.server is not None
        viewer, strangers = None, []
        for number in range(MAX_HTTP + 20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            strangers.append(writer)
            if number == 0:
                viewer = reader
                writer.write(b"GET /events HTTP/1.1\r\nHost: x\r\n")
                writer.write(b"Authorization: Bearer " + TOKEN + b"\r\n\r\n")
            else:
                writer.write(HALF_A_FORM)
            await asyncio.sleep(0.001)  # its request is being answered before the next comes
        assert len(runner.server.connections) <= MAX_HTTP
        assert viewer is not None
        assert not viewer.at_eof()
        for writer in strangers:
            writer.transport.abort()
        await until(lambda: not runner.server.connections)
        await runner.cleanup()
    assert not caplog.records
