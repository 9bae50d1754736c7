"""The live page: what it says of jobs, to whom, and what viewers cost."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientResponse, ClientSession, web
from yarl import URL

import fmi_client
from fmi_client.errors import CollectiveTimeout, FmiError, JoinTimeout
from rendezvous_server import admin, config, live
from rendezvous_server.access import SESSION_SECONDS, TRIES, TRIES_SECONDS, Access, TooManyTries
from rendezvous_server.server import Server
from rendezvous_server.status import Query
from tests.server.test_registry import HELLO
from tests.server.test_server import server_process
from tests.support import serving, until

TOKEN = b"token-of-an-operator"
BEARER = {"Authorization": f"Bearer {TOKEN.decode()}"}
GUARDED = ("/", "/status", "/events")
SMALL = (socket.SOL_SOCKET, socket.SO_SNDBUF, live.SEND_BUFFER)


@dataclass
class Watched:
    """A server with its page in this process."""

    server: Server
    address: str
    live: live.Live
    port: int
    session: ClientSession

    def get(self, path: str, **more: Any) -> Any:
        return self.session.get(f"http://127.0.0.1:{self.port}{path}", **more)

    async def status(self, query: str = "") -> Any:
        """Return the snapshot of this moment."""
        self.live._views.clear()
        async with self.get(f"/status{query}") as answer:
            assert answer.status == 200
            return await answer.json()

    def waits(self, job: str, rank: int, size: int) -> None:
        """Let a rank wait that nobody has to send away afterwards."""
        hello = replace(HELLO, job=job, rank=rank, size=size)
        self.server.registry.join(hello, ("192.0.2.1", 2000), (job, rank), time.time())

    async def join(self, job: str, rank: int, size: int, **more: Any) -> Any:
        arguments = {"timeout": 10.0} | more
        return await fmi_client.connect(self.address, job=job, rank=rank, size=size, **arguments)


@asynccontextmanager
async def watched(
    loopback: bool = True, token: bytes | None = None, **more: Any
) -> AsyncIterator[Watched]:
    async with serving(**more) as (server, address), ClientSession() as session:
        pages = live.Pages(server, Access(token, loopback))
        app = web.Application()
        app.on_shutdown.append(pages.close)
        app.add_routes(pages.routes())
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield Watched(server, address, pages.live, runner.addresses[0][1], session)
        finally:
            await asyncio.wait_for(runner.cleanup(), 5)


async def message(answer: ClientResponse) -> Any:
    """Return the next event."""
    while line := await asyncio.wait_for(answer.content.readline(), 5):
        if line.startswith(b"data: "):
            return json.loads(line[6:])
    raise AssertionError("the stream has ended")


def words(tree: Any) -> str:
    """Return the text of a tree, without the times that its reader fills in."""
    return tree if isinstance(tree, str) else "".join(map(words, tree[2:]))


# ------------------------------------------------------------------------------ what it says
async def test_it_says_for_whom_a_job_waits() -> None:
    async with watched() as there:
        for rank in set(range(64)) - {17}:
            there.waits("run", rank, 64)
        async with there.get("/") as answer:
            text = re.sub("<.*?>", "", await answer.text())
        assert "63 of 64 ranks here, waiting 0 s for rank 17" in text
        (job,) = (await there.status())["jobs"]
        assert (job["state"], job["here"], job["missing"]) == ("WAITING", 63, "17")
        (job,) = (await there.status("?job=run"))["jobs"]
        assert [each["rank"] for each in job["ranks"]] == [r for r in range(64) if r != 17]
        assert job["ranks"][0]["address"] == "192.0.2.1:2000"


async def test_lost_ranks_are_shown_with_why_and_the_job_after_its_end() -> None:
    async with watched() as there:
        ranks = await asyncio.gather(*(there.join("run", r, 3) for r in range(3)))
        await asyncio.gather(*(comm.barrier() for comm in ranks))
        member = next(iter(there.server.registry.jobs)).members[1]
        member.connection._transport.abort()  # type: ignore[attr-defined]
        await until(lambda: there.server.counters.lost == 1)
        snapshot = await there.status()
        (job,) = snapshot["jobs"]
        assert (job["state"], job["here"], job["lost_count"], job["links"]) == ("RUNNING", 2, 1, 3)
        ((lost,), told) = (job["lost"], words(live.page.main(snapshot)))
        assert (lost["rank"], lost["why"]) == (1, "its connection to the server closed")
        assert "2 of 3 ranks here, 1 lost; running for" in told
        assert "rank 1 lost  ago: its connection to the server closed" in told
        assert snapshot["counts"] == {
            **{"jobs": 1, "waiting": 0, "running": 1, "troubled": 1, "ranks": 2}
        }
        for comm in ranks:
            await comm.close()
        await until(lambda: not there.server.registry.jobs)
        snapshot = await there.status()
        assert [each["well"] for each in snapshot["ended"]] == [False]
        assert "1 of 3 ranks lost" in words(live.page.main(snapshot))


async def test_a_job_that_was_never_complete_can_be_looked_at_after_its_end() -> None:
    async with watched() as there:
        waiting = (there.join("run", r, 9, timeout=0.3) for r in range(9) if r not in (3, 4))
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, JoinTimeout) for error in errors)
        await until(lambda: not there.server.registry.jobs)
        snapshot = await there.status()
        (ended,) = snapshot["ended"]
        assert (ended["complete"], ended["came"], ended["never_came"]) == (False, 7, "3, 4")
        assert "7 of 9 ranks came, ranks 3, 4 never did" in words(live.page.main(snapshot))


async def test_a_rank_that_waits_in_vain_says_for_whom() -> None:
    async with watched() as there:
        ranks = await asyncio.gather(*(there.join("run", r, 2) for r in range(2)))
        with pytest.raises(CollectiveTimeout):
            await ranks[0].allreduce(1, timeout=0.2)
        snapshot = await there.status()
        assert snapshot["jobs"][0]["said"]["kind"] == "timeout"
        assert snapshot["counts"]["troubled"] == 1
        said = words(live.page.main(snapshot))
        assert "rank 0 waited in vain for rank 1 in allreduce" in said
        for comm in ranks:
            await comm.close()


async def test_a_rank_that_ends_the_job_says_why() -> None:
    async with watched() as there:
        ranks = await asyncio.gather(*(there.join("run", r, 2) for r in range(2)))
        await ranks[1].abort("no more galaxies")
        for comm in ranks:
            await comm.close()
        await until(lambda: not there.server.registry.jobs)
        snapshot = await there.status()
        assert not snapshot["ended"][0]["well"]
        said = words(live.page.main(snapshot))
        assert "it was ended" in said
        assert "rank 1 ended it: no more galaxies" in said


async def test_what_is_relayed_is_counted_by_job_and_pair() -> None:
    async with watched(relay_bytes=10**9) as there:
        ranks = await asyncio.gather(
            *(there.join("run", r, 2, channel="relay") for r in range(2)),
            *(there.join("other", r, 2) for r in range(2)),
        )
        await asyncio.gather(*(comm.allreduce(np.zeros(100_000)) for comm in ranks))
        snapshot = await there.status("?job=run")
        (job,) = snapshot["jobs"]
        assert (job["links"], job["links_relayed"], job["relay_pairs"]) == (1, 1, 1)
        assert job["relay_bytes"] > 100_000 * 8
        ((pair,), passed) = (job["relaying"], job["relay_bytes"])
        assert (pair["ranks"], pair["bytes"]) == ([0, 1], passed)
        assert "1 of these relayed (1 now): 1.6 MB of at most 1 GB" in words(
            live.page.main(snapshot)
        )
        snapshot = await there.status("?job=other")
        assert snapshot["jobs"][0]["links_relayed"] == 0
        assert snapshot["jobs"][0]["relaying"] == []
        assert snapshot["server"]["relay_pairs_now"] == 1
        for comm in ranks:
            await comm.close()


async def test_refused_connections_are_told_by_reason() -> None:
    async with watched() as there:
        there.waits("run", 0, 2)
        for _ in range(3):
            with pytest.raises(FmiError):
                await there.join("run", 1, 5)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(there.address.partition(":")[2])
        )
        writer.write(b"GET /secret HTTP/1.1\r\n\r\n")
        assert await reader.read() == b""
        writer.close()
        snapshot = await there.status()
        assert [(r["kind"], r["count"]) for r in snapshot["refusals"]] == [
            ("JobFull", 3),
            ("ProtocolError", 1),
        ]
        assert "/secret" not in json.dumps(snapshot)


async def test_names_of_strangers_are_text() -> None:
    name = "<img src=x onerror=alert(1)>\"'&\u202e\n"
    async with watched() as there:
        rank = await there.join(name, 0, 1)
        for path in ("/", "/?q=%3Cimg", f"/?job={'%3Cscript%3E'}"):
            async with there.get(path) as answer:
                text = await answer.text()
            assert "<img" not in text
            assert "<script>alert" not in text
            assert text.count("<script>") == 1
        async with there.get("/") as answer:
            text = await answer.text()
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
        assert "\u202e" not in text
        (job,) = (await there.status())["jobs"]
        assert job["name"] == name
        await rank.close()


# ------------------------------------------------------------------------------ who may look
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


def test_guessing_is_slow_for_all_the_world_together() -> None:
    access = Access(TOKEN, loopback=False)
    for number in range(TRIES):
        assert not access.takes(b"guess %d" % number, 1000.0 + number)
    with pytest.raises(TooManyTries, match="51 s"):
        access.takes(TOKEN, 1000.0 + TRIES - 1)
    assert access.takes_cookie(access.cookie(1000.0), 1010.0)  # who is in stays in
    assert access.takes(TOKEN, 1000.0 + TRIES_SECONDS)


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


async def test_a_page_of_another_site_cannot_take_viewers_places() -> None:
    async with watched() as there:
        strange = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
        for path in ("/events", "/status"):
            async with there.get(path, headers=strange) as answer:
                assert answer.status == 403
        link = strange | {"Sec-Fetch-Mode": "navigate"}
        async with there.get("/", headers=link) as answer:
            assert answer.status == 200


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
    with pytest.raises(config.ConfigError, match="RENDEZVOUS_ADMIN_TOKEN has 5 bytes"):
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


# ----------------------------------------------------------------------- what viewers cost
async def test_a_viewer_is_told_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PERIOD", 0.02)
    async with watched() as there, there.get("/events") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert await answer.content.readline() == b"retry: 2000\n"
        assert "No job is here" in words((await message(answer))["page"])
        there.waits("run", 1, 4)
        told = await message(answer)
        assert abs(told["now"] - time.time()) < 10
        assert told["title"].startswith("1 waiting")
        assert "for ranks 0, 2, 3" in words(told["page"])
        there.server.registry.expire(time.time() + 10_000)
        assert "never did" in words((await message(answer))["page"])


async def test_where_nothing_changes_little_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PERIOD", 0.01)
    monkeypatch.setattr(live, "HEARTBEAT", 0.1)
    async with watched() as there, there.get("/events") as answer:
        assert "page" in await message(answer)
        for _ in range(3):
            assert set(await message(answer)) == {"now"}


async def test_without_viewers_nothing_is_made_and_with_many_it_is_made_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "PERIOD", 0.2)
    made: list[Query] = []
    make = live.View.make

    def counted(view: live.View, *arguments: Any) -> None:
        made.append(view.query)
        make(view, *arguments)

    monkeypatch.setattr(live.View, "make", counted)
    async with watched() as there:
        rank = await there.join("run", 0, 1)
        await asyncio.sleep(0.3)
        assert made == []
        start = time.monotonic()
        streams = [await there.get("/events") for _ in range(10)]
        for stream in streams:
            await message(stream)
        async with there.get("/"), there.get("/status"):
            pass
        periods = (time.monotonic() - start) / 0.2
        assert 1 <= len(made) <= periods + 1
        for stream in streams:
            stream.close()
        await until(lambda: not there.live.viewers)
        await until(lambda: there.live._task is not None and there.live._task.done())
        made.clear()
        await asyncio.sleep(0.3)
        assert made == []
        await rank.close()


async def test_a_viewer_that_stalls_costs_little_and_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "PERIOD", 0.005)
    monkeypatch.setattr(live, "WRITE_SECONDS", 0.5)
    # The system's own patience, which ends later, is not what is tested.
    monkeypatch.setattr(live, "_bound", lambda sock: sock.setsockopt(*SMALL))
    async with watched() as there:
        big, asked = "x" * 100_000, 0
        monkeypatch.setattr(live.page, "main", lambda _: ["main", {}, big + str(time.monotonic())])
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stalled, ("127.0.0.1", there.port))
        await loop.sock_sendall(stalled, b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await until(lambda: len(there.live.viewers) == 1)
        (viewer,) = there.live.viewers
        transport = viewer.gone.__self__  # type: ignore[attr-defined]
        async with there.get("/events") as fast:
            while not transport.is_closing():
                await message(fast)  # who reads is not held up
                asked += 1
                assert transport.get_write_buffer_size() < 2 * len(big) + 100_000
        await until(lambda: viewer not in there.live.viewers)
        assert asked > 10
        stalled.close()


async def test_there_are_at_most_some_dozens_of_viewers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_VIEWERS", 2)
    monkeypatch.setattr(live, "PERIOD", 0.02)
    async with watched() as there:
        streams = [await there.get("/events") for _ in range(2)]
        for stream in streams:
            await message(stream)
        async with there.get("/events") as answer:
            assert answer.status == 503
        streams.pop().close()
        await until(lambda: len(there.live.viewers) == 1)
        async with there.get("/events") as answer:
            assert answer.status == 200
        streams.pop().close()


async def test_a_server_that_stops_lets_go_of_its_viewers() -> None:
    async with server_process() as process, ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{process.admin_port}/events") as answer:
            await message(answer)
            process.process.terminate()
            while await asyncio.wait_for(answer.content.readline(), 5):
                pass
        assert await asyncio.wait_for(process.process.wait(), 5) == 0


async def test_viewers_see_that_the_server_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PERIOD", 0.02)
    async with watched() as there, there.get("/events") as answer:
        await message(answer)
        there.server.registry.drain()
        assert "DRAINING" in words((await message(answer))["page"])


async def test_jobs_are_found_by_name() -> None:
    async with watched() as there:
        ranks = [await there.join(name, 0, 1) for name in ("alpha-1", "alpha-12", "beta")]
        found = await there.status("?q=alpha")
        assert [job["name"] for job in found["jobs"]] == ["alpha-1", "alpha-12"]
        assert (found["matching"], found["counts"]["jobs"]) == (2, 3)
        assert [job["name"] for job in (await there.status("?job=alpha-1"))["jobs"]] == ["alpha-1"]
        assert (await there.status("?q=gamma"))["jobs"] == []
        for rank in ranks:
            await rank.close()
        ended = await there.status("?q=beta")
        assert [job["name"] for job in ended["ended"]] == ["beta"]


async def test_queries_of_all_kinds_are_answered_and_not_kept() -> None:
    async with watched() as there:
        for number in range(3 * live.MAX_VIEWS):
            async with there.get(f"/status?q={number}") as answer:
                assert answer.status == 200
        assert len(there.live._views) <= live.MAX_VIEWS
        for query in ("%ff", "%ed%a0%80", "%00", "a" * 5000, "%3C%2Fscript%3E", "&&=", "%"):
            for name in ("q", "job"):
                for path in ("/", "/status"):
                    url = URL(f"http://127.0.0.1:{there.port}{path}?{name}={query}", encoded=True)
                    async with there.session.get(url) as answer:
                        assert answer.status == 200
        async with there.session.head(f"http://127.0.0.1:{there.port}/events") as answer:
            assert answer.status == 405


async def test_refusals_of_tcpunch_clients_are_told_too() -> None:
    async with watched(legacy=config.read_networks(["127.0.0.1"])) as there:
        host, _, port = there.address.partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"a name")
        await until(lambda: len(there.server.legacy.pool) == 1)
        writer.write(b"and more")
        await until(lambda: there.server.legacy.refused == 1)
        writer.close()
        (refusal,) = (await there.status())["refusals"]
        assert (refusal["kind"], refusal["why"]) == ("Legacy", "bytes after the name")
