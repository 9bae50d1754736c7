"""The browser of the tests: it shows a page, and notices what a page should not do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import until

if TYPE_CHECKING:
    from playwright.async_api import Page

pytestmark = pytest.mark.full

HTML = "<!doctype html><meta name=viewport content='width=device-width'><title>{}</title>{}"


def write(folder: Path, body: str, title: str = "a page") -> str:
    """URL of a page with this body."""
    path = folder / "page.html"
    path.write_text(HTML.format(title, body))
    return path.as_uri()


async def test_a_page_is_shown(page: Page, tmp_path: Path) -> None:
    script = "<p id=told></p><script>told.textContent = innerWidth</script>"
    await page.goto(write(tmp_path, script, "shown"))
    assert await page.title() == "shown"
    assert await page.inner_text("#told") == "1280"
    assert (await page.screenshot()).startswith(b"\x89PNG")
    assert (await page.pdf()).startswith(b"%PDF")


async def test_a_phone_is_narrow_and_has_no_mouse(phone: Page, tmp_path: Path) -> None:
    await phone.goto(write(tmp_path, ""))
    said = await phone.evaluate("[innerWidth, matchMedia('(hover: none)').matches]")
    assert said == [390, True]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("<script>console.error('no data')</script>", ["console: no data"]),
        ("<script>throw Error('a defect')</script>", ["error: a defect"]),
        ("<img src=http://cdn.invalid/x.png>", ["asked another host: http://cdn.invalid/x.png"]),
        ("<img src=http://192.0.2.1/x.png>", ["asked another host: http://192.0.2.1/x.png"]),
        (
            "<script>new WebSocket('ws://x.invalid')</script>",
            ["asked another host: ws://x.invalid"],
        ),
    ],
)
async def test_what_a_page_should_not_do(
    page: Page, complaints: list[str], tmp_path: Path, body: str, told: list[str]
) -> None:
    await page.goto(write(tmp_path, body))
    await until(lambda: set(told) <= {line.rstrip("/") for line in complaints})
    await page.close()  # nothing more is told of it
    complaints.clear()
