"""What the README shows runs."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from tests.support import serving

ROOT = Path(__file__).parent.parent


async def test_the_client_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "127.0.0.1:10000" in code
    async with serving() as (_, address):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-c", code.replace("127.0.0.1:10000", address)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 20)
    assert err == b""
    assert out.decode() == "[10. 10. 10.] ['rank 0', 'rank 1', 'rank 2', 'rank 3']\n"


def test_every_page_begins_with_what_it_answers() -> None:
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/tutorials").glob("*.md")]:
        _, first, *_ = re.sub(r"<!--.*?-->\n\n", "", page.read_text()).split("\n\n")
        assert re.match(r"\w.*[.?](\s|$)", first, re.DOTALL), f"{page.name}: {first}"


def test_every_file_that_the_documents_point_at_exists() -> None:
    for page in [*ROOT.glob("*/README.md"), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points at {target}"
