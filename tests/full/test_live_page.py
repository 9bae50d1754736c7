"""The live page as an operator sees it: a real server, real ranks, a real browser."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from asyncio.subprocess import Process as Child
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.test_server import Process, server_process
from tests.support import closed_port

if TYPE_CHECKING:
    from playwright.async_api import Page

pytestmark = pytest.mark.full

HOSTILE = "<img src=x onerror=\"document.title='hurt'\"><script>alert(1)</script>\u202egnp"
PATIENCE = 15_000.0
"""Milliseconds; the machine may be busy."""

RANK = """
import sys, fmi_client
address, job, rank, size = sys.argv[1:]
comm = fmi_client.sync.connect(address, job=job, rank=int(rank), size=int(size), timeout=60)
comm.barrier()
print("met", flush=True)
sys.stdin.read()
comm.close()
"""


@asynccontextmanager
async def server_for(*pages: Page, arguments: Sequence[str] = ()) -> AsyncIterator[Process]:
    """A server that `pages` look at no more when it ends."""
    async with server_process(*arguments) as server:
        yield server
        for each in pages:
            await each.goto("about:blank")


@asynccontextmanager
async def ranks(address: str, job: str, numbers: set[int], size: int) -> AsyncIterator[list[Child]]:
    """Ranks as processes, which live until their input ends."""
    children: list[Child] = []
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    try:
        for number in sorted(numbers):
            command = [sys.executable, "-c", RANK, address, job, str(number), str(size)]
            children.append(
                await asyncio.create_subprocess_exec(
                    *command, **pipes, stderr=asyncio.subprocess.DEVNULL
                )
            )
        yield children
    finally:
        for child in children:
            if child.returncode is None:
                child.kill()
            await child.wait()


@asynccontextmanager
async def waiting(address: str, job: str, numbers: set[int], size: int) -> AsyncIterator[None]:
    """Many ranks that wait, in one process."""
    code = f"""
import asyncio, fmi_client
async def main():
    join = lambda r: fmi_client.connect("{address}", job={job!r}, rank=r, size={size}, timeout=60)
    await asyncio.gather(*(join(r) for r in {numbers!r}), return_exceptions=True)
asyncio.run(main())
"""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        child.kill()
        await child.wait()


async def sees(page: Page, text: str, where: str = "main") -> None:
    """Wait until `where` says so; the page is not loaded again."""
    playwright = pytest.importorskip("playwright.async_api")
    expect = playwright.expect(page.locator(where))
    await expect.to_contain_text(re.compile(text), timeout=PATIENCE)


async def fits(page: Page) -> None:
    """Nothing is wider than the screen."""
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_it_follows_a_job_from_its_first_rank_to_its_end(page: Page) -> None:
    async with server_for(page) as server:
        address = f"127.0.0.1:{server.port}"
        await page.goto(f"http://127.0.0.1:{server.admin_port}/")
        await sees(page, "No job is here")
        await page.evaluate("window.loaded = 'once'")
        async with ranks(address, "run", {0}, 3):
            await sees(page, r"1 of 3 ranks here, waiting \d+ s for ranks 1, 2")
            async with ranks(address, "run", {1}, 3):
                await sees(page, r"2 of 3 ranks here, waiting \d+ s for rank 2")
                assert "1 waiting" in await page.title()
                async with ranks(address, "run", {2}, 3) as last:
                    await sees(page, "RUNNING run")
                    await sees(page, r"3 of 3 ranks here; running for \d+ s")
                    await sees(page, "3 pairs introduced, none relayed")
                    last[0].send_signal(signal.SIGKILL)
                    await sees(page, "2 of 3 ranks here, 1 lost")
                    await sees(page, r"rank 2 lost \d+ s ago: its connection", ".lost li")
        await sees(page, "FAILED run")
        await sees(page, r"\d of 3 ranks lost, \d+ s ago")
        assert await page.evaluate("window.loaded") == "once"


async def test_rank_17_is_missed_on_a_desk_and_on_a_phone(
    page: Page, phone: Page, tmp_path: Path
) -> None:
    async with server_for(page, phone) as server:
        address = f"127.0.0.1:{server.port}"
        async with waiting(address, "run-42", set(range(64)) - {17}, 64):
            for each in (page, phone):
                await each.goto(f"http://127.0.0.1:{server.admin_port}/")
                await sees(each, r"63 of 64 ranks here, waiting \d+ s for rank 17")
                await each.get_by_role("link", name="run-42").click()
                await sees(each, "Ranks here")
                assert await each.locator("tbody tr").count() == 63
                await fits(each)
                await each.screenshot(path=tmp_path / "page.png")


async def test_names_of_strangers_do_nothing(page: Page, phone: Page) -> None:
    long = "w" * 256
    async with server_for(page, phone) as server:
        address, url = f"127.0.0.1:{server.port}", f"http://127.0.0.1:{server.admin_port}/"
        await page.goto(url)
        await sees(page, "No job is here")
        async with waiting(address, HOSTILE, {0}, 2), waiting(address, long, {0}, 2):
            await sees(page, re.escape("<img src=x onerror="))  # as it came in live
            await sees(page, re.escape(r"\u202egnp"))
            await page.reload()  # as it is written into the page
            for _ in range(2):
                assert await page.locator("img, main script").count() == 0
                assert "hurt" not in await page.title()
                await page.get_by_role("link", name="<img").click()
                await sees(page, "Ranks here")
            assert await page.locator("main h2 bdi").inner_text() == HOSTILE.replace(
                "\u202e", r"\u202e"
            )
            await phone.goto(url)
            await sees(phone, "www")
            await fits(phone)


async def test_a_server_that_restarts_is_lost_and_found(page: Page, complaints: list[str]) -> None:
    admin = closed_port()
    url = f"http://127.0.0.1:{admin}/"
    async with server_process("--admin-port", str(admin)):
        await page.goto(url)
        await sees(page, "^Live$", "#line")
    await sees(page, r"Connection lost; this was \d+ s ago\. Trying again\.", "#line")
    async with (
        server_for(page, arguments=("--admin-port", str(admin))) as server,
        waiting(f"127.0.0.1:{server.port}", "after", {0}, 2),
    ):
        await sees(page, "^Live$", "#line")
        await sees(page, "1 of 2 ranks here")
    assert all("ERR_" in each for each in complaints), complaints  # that it was not there
    complaints.clear()


async def test_ages_are_right_whatever_the_browsers_clock_says(page: Page) -> None:
    await page.add_init_script("Date.now = () => 0")
    async with server_for(page) as server, waiting(f"127.0.0.1:{server.port}", "job", {0}, 2):
        await page.goto(f"http://127.0.0.1:{server.admin_port}/")
        await sees(page, r"waiting [1-9] s for rank 1")
        await sees(page, r"the server ends it in 5 h 59 min")
        for seconds, text in ((192, "3 min 12 s"), (21_360, "5 h 56 min"), (9e4, "1 d 1 h")):
            assert await page.evaluate(f"duration({seconds})") == text


async def test_without_javascript_it_is_a_snapshot(page: Page) -> None:
    browser = page.context.browser
    assert browser is not None
    context = await browser.new_context(java_script_enabled=False)
    still = await context.new_page()
    async with server_process() as server:
        async with waiting(f"127.0.0.1:{server.port}", "job", {0, 2}, 4):
            while True:  # it does not change by itself
                await still.goto(f"http://127.0.0.1:{server.admin_port}/?q=jo")
                text = await still.inner_text("body")
                if "2 of 4 ranks here" in text:
                    break
        assert re.search(r"waiting \d+ s for ranks 1, 3", text)
        assert "reload for a new one" in text
    await context.close()


async def test_an_operator_signs_in(page: Page, tmp_path: Path, complaints: list[str]) -> None:
    file = tmp_path / "token"
    file.write_text("token-of-an-operator\n")
    async with server_for(page, arguments=("--admin-token-file", str(file))) as server:
        await page.goto(f"http://127.0.0.1:{server.admin_port}/")
        await page.get_by_label("Admin token").fill("a guess")
        await page.get_by_role("button", name="Sign in").click()
        await sees(page, "That is not the admin token")
        await page.get_by_label("Admin token").fill("token-of-an-operator")
        await page.get_by_role("button", name="Sign in").click()
        await sees(page, "^Live$", "#line")
        assert "token" not in page.url
        assert await page.evaluate("document.cookie") == ""
    assert all("401" in each for each in complaints), complaints  # before it signed in
    complaints.clear()


async def test_jobs_are_searched_for(page: Page) -> None:
    async with server_for(page) as server:
        address = f"127.0.0.1:{server.port}"
        async with waiting(address, "alpha", {0}, 2), waiting(address, "beta", {0}, 2):
            await page.goto(f"http://127.0.0.1:{server.admin_port}/")
            await sees(page, "beta")
            await page.get_by_label("Jobs with").fill("alp")
            await page.get_by_role("button", name="Search").click()
            await sees(page, "^Live$", "#line")
            names: Any = await page.locator("article bdi").all_inner_texts()
            assert names == ["alpha"]
