"""The live page: what it says of jobs, and what viewers cost."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientResponse, ClientSession, web
from yarl import URL

import fmi_client
from fmi_client.errors import CollectiveTimeout, FmiError, JoinTimeout
from rendezvous_server import config, live
from rendezvous_server.access import Access
from rendezvous_server.server import Server
from rendezvous_server.status import Query
from tests.server.test_registry import HELLO
from tests.server.test_server import server_process
from tests.support import serving, until

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
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
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
        await until(lambda: there.server.counters.lost_ranks == 1)
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
        assert snapshot["jobs"][0]["said"]["kind"] in ("timeout", "missing")
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
        there.server.registry.drain(time.time())
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
        await until(lambda: there.server.counters.refusals == 1)
        writer.close()
        (refusal,) = (await there.status())["refusals"]
        assert (refusal["kind"], refusal["why"]) == ("Legacy", "bytes after the name")
