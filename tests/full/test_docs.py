"""The site of `make docs`: it builds without a warning, and holds what it is there for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import fmi_client
from fmi_client import errors, ops
from tests.full.local_aws import ROOT

if TYPE_CHECKING:
    from playwright.async_api import Page

pytestmark = [pytest.mark.full, pytest.mark.timeout(120)]


def _build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = _build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def _entries(page: Path) -> set[str]:
    return set(re.findall(r'<h[2-4] id="([^"]+)"', page.read_text()))


def _pages(site: Path) -> list[Path]:
    """All but one whose links are of the place that it is served at."""
    return [page for page in site.rglob("*.html") if page.name != "404.html"]


def test_the_reference_has_every_public_name(site: Path) -> None:
    shown = _entries(site / "reference/fmi_client.html")
    elsewhere = {*errors.__all__, *ops.__all__, "sync"}
    for name in set(fmi_client.__all__) - elsewhere:
        assert f"fmi_client.{name}" in shown
    assert {f"fmi_client.errors.{name}" for name in errors.__all__} <= _entries(
        site / "reference/errors.html"
    )
    assert {f"fmi_client.ops.{name}" for name in ops.__all__} <= _entries(
        site / "reference/ops.html"
    )


def test_the_reference_has_the_options_of_every_command(site: Path) -> None:
    shown = (site / "reference/cosmic.html").read_text()
    for word in ("cosmic-run", "cosmic-data-upload", "--world-size", "--relay-bytes"):
        assert word in shown


def test_links_of_the_repository_lead_somewhere_on_the_site_too(site: Path) -> None:
    for page in _pages(site):
        for target in re.findall(r'(?:href|src)="(?![a-z]+:|#)([^"#?]+)', page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(site)}: {target}"


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in _pages(site):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{page.name}: {tag}"


async def test_no_page_is_wider_than_a_phone(site: Path, phone: Page) -> None:
    for page in _pages(site):
        await phone.goto(page.as_uri())
        width = await phone.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, page.relative_to(site)


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[no such page](nowhere.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    nav = settings.index("nav:\n  -")
    hooks = re.sub(r"^hooks:.*\n", "", settings[:nav], flags=re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(hooks + "nav: [index.md]\n")
    built = _build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr
