"""The report's page in a real browser: it sorts, filters, prints, and asks nobody for anything."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workflow.report import write
from workflow.results import Results

sys.path.insert(0, str(Path(__file__).parent.parent / "workflow"))

from made_runs import made_run, made_sweep, many_findings, original_run, save_predictions

if TYPE_CHECKING:
    from playwright.async_api import Page

pytestmark = pytest.mark.full

EVIL = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report of a sweep with failures, a name that would run, and one that has no blank."""
    folder = tmp_path_factory.mktemp("report")
    npz = save_predictions(folder / "predictions.npz")
    made = made_sweep((1, 2, 4), (8, 32, 128), failed=[(2, 32, 2), (4, 8, 1)], predictions=npz)
    odd = made_run(3, 8, name=EVIL, engine=EVIL, error="x" * 300, status="failed")
    long = made_run(1, 8, repeat=3, name="w" * 100, environment={"cpu": "c" * 300})
    originals = [original_run(25, size, inference_s=20.0) for size in (1.0, 2.0)]
    runs = (*made.runs, odd, long, *originals)
    write(replace(Results(runs, many_findings())), str(folder), EVIL)
    return (folder / "report.html").as_uri()


async def column(page: Page, key: str, table: str = "runs") -> list[str]:
    """The cells of a column that are shown, as they stand there from top to bottom."""
    texts: list[str] = await page.evaluate(
        """([table, key]) => {
            const found = document.getElementById(table);
            const heads = [...found.tHead.rows[0].cells];
            const at = heads.findIndex((head) => head.dataset.key === key);
            const rows = [...found.tBodies[0].rows].filter((row) => row.offsetParent !== null);
            return rows.map((row) => row.cells[at].dataset.v ?? row.cells[at].textContent.trim());
        }""",
        [table, key],
    )
    return texts


async def test_columns_sort_by_number_with_the_keyboard_and_the_unknown_last(
    page: Page, url: str
) -> None:
    await page.goto(url)
    head = page.locator("#runs th[data-key=total_s]")
    await head.locator("button").focus()
    await page.keyboard.press("Enter")
    assert await head.get_attribute("aria-sort") == "ascending"
    up = await column(page, "total_s")
    known = [float(text) for text in up if text]
    assert known == sorted(known)
    assert up[len(known) :] == [""] * (len(up) - len(known)) != []
    await page.keyboard.press("Space")
    assert await head.get_attribute("aria-sort") == "descending"
    assert [float(text) for text in (await column(page, "total_s"))[: len(known)]] == known[::-1]
    await page.locator("#runs th[data-key=run] button").click()
    assert await head.get_attribute("aria-sort") is None
    assert len(await page.locator("#runs th[aria-sort]").all()) == 1
    names = await column(page, "run")
    assert names.index("w1-b8-small-r1") < names.index("w1-b32-small-r1")  # numbers as numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b128", 6),
        ("world_size=2 status=ok", 5),
        ("STATUS=failed", 3),
        ("batch_size>=32 world_size<4 source=cosmic", 0),
        ("batch_size>=32 world_size<4 cosmic", 8),
        ("nothing-like-that", 0),
        ("no_column=3", 0),
        ("(", 0),
    ],
)
async def test_rows_are_filtered(page: Page, url: str, text: str, expected: int) -> None:
    await page.goto(url)
    everything = len(await column(page, "run"))
    await page.locator("#runs-tools input").fill(text)
    assert len(await column(page, "run")) == expected
    said = await page.locator("#runs-tools output").text_content()
    assert said == f"{expected} of {everything} rows"
    assert len(await column(page, "configuration", "configurations")) > 9  # the other table's own
    await page.locator("#runs-tools input").fill("")
    assert len(await column(page, "run")) == everything == 22


async def test_names_of_strangers_are_text(page: Page, url: str) -> None:
    await page.goto(url)
    assert await page.title() == EVIL
    assert await page.locator("h1").text_content() == EVIL
    assert EVIL in await column(page, "run")
    assert await page.locator("img[src=x]").count() == 0


async def test_every_picture_is_drawn(page: Page, url: str) -> None:
    await page.goto(url)
    widths = await page.evaluate("Array.from(document.images, (image) => image.naturalWidth)")
    assert len(widths) > 10
    assert all(width > 300 for width in widths)


async def test_a_phone_scrolls_tables_and_not_the_page(phone: Page, url: str) -> None:
    await phone.goto(url)
    size = await phone.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert size == [390, 390]
    box = "document.querySelector('#runs').parentElement"
    assert await phone.evaluate(f"{box}.scrollWidth > {box}.clientWidth")


async def test_it_works_without_scripts(page: Page, url: str) -> None:
    browser = page.context.browser
    assert browser is not None
    context = await browser.new_context(java_script_enabled=False)
    plain = await context.new_page()
    await plain.goto(url)
    assert not await plain.locator("#runs-tools").is_visible()
    assert await plain.locator("#runs tbody tr").count() == 22
    assert await plain.locator("#runs th button").count() == 0
    await context.close()


async def test_paper_has_the_whole_page(page: Page, url: str, tmp_path: Path) -> None:
    await page.goto(url)
    await page.emulate_media(media="print", color_scheme="dark")
    await page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert await page.locator("details:not([open])").count() == 0
    assert not await page.locator("nav").is_visible()
    colour = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(255, 255, 255)"
    await page.set_viewport_size({"width": 1039, "height": 700})  # A4 across, without margins
    box = "document.querySelector('#runs').parentElement"
    assert await page.evaluate(f"{box}.scrollWidth <= innerWidth")
    assert await page.evaluate(f"{box}.scrollHeight <= {box}.clientHeight + 1")
    path = tmp_path / "report.pdf"
    await page.pdf(path=path, prefer_css_page_size=True)
    content = path.read_bytes()
    boxes = {m.decode() for m in re.findall(rb"/MediaBox \[([\d. ]+)\]", content)}
    sizes = sorted(tuple(int(float(n) / 10) for n in box.split()[2:]) for box in boxes)
    assert sizes == [(59, 84), (84, 59)]  # A4 upright, and across for the tables
