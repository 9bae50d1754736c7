"""A real browser, Debian's Chromium: `page` as on a desk, `phone` as in the hand.

Both fail a test whose page writes an error to the console, raises one, or asks any other host than
this machine for anything: a page of ours needs no network. A test that expects such a thing looks
at `complaints` and clears it.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.async_api import BrowserContext, Page

DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
OWN = {"127.0.0.1", "localhost", "::1"}
OPTIONS = [
    "--no-sandbox",  # CI is root in a container, where the sandbox does not work
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's /dev/shm is small
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No other host is found: neither by a page, nor by the browser for itself.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost, EXCLUDE ::1",
]


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What a page should not have done, in the order it did; the test fails if any is left."""
    seen: list[str] = []
    yield seen
    assert not seen, "\n".join(["the page has complaints:", *seen])


@pytest.fixture
async def page(complaints: list[str]) -> AsyncIterator[Page]:
    """A page of 1280 x 800 pixels; `await page.goto(url)`, an `http:` or `file:` one."""
    async with _open(DESK, complaints) as opened:
        yield opened


@pytest.fixture
async def phone(complaints: list[str]) -> AsyncIterator[Page]:
    """A page of 390 x 844 pixels, touched with a finger."""
    async with _open(PHONE, complaints) as opened:
        yield opened


@asynccontextmanager
async def _open(device: dict[str, Any], complaints: list[str]) -> AsyncIterator[Page]:
    """A browser for each test: one that lasts would hold on to the event loop of its first test."""
    api = pytest.importorskip("playwright.async_api", reason="pip install playwright")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    async with api.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        context = await browser.new_context(**device)
        _listen(context, complaints)
        yield await context.new_page()
        await browser.close()


def _listen(context: BrowserContext, complaints: list[str]) -> None:
    """Note what pages of this context, also such as they open, should not do."""

    def asked(url: str) -> None:
        host = urlsplit(url).hostname  # None: file:, data:, blob:, about:
        if host is not None and host not in OWN:
            complaints.append(f"asked another host: {url}")

    def opened(page: Page) -> None:
        page.on("websocket", lambda socket: asked(socket.url))

    context.on("page", opened)
    context.on("request", lambda request: asked(request.url))
    context.on("weberror", lambda error: complaints.append(f"error: {error.error}"))
    context.on(
        "console",
        lambda said: said.type == "error" and complaints.append(f"console: {said.text}"),
    )
