"""The picture of a terminal: what is on its screen at the end, and nothing is fetched for it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recording() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recording", ROOT / "docs/recording.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bars_that_were_drawn_over_are_gone(recording: ModuleType) -> None:
    two_bars = "first 10%\r\nsecond 10%"
    erased = "\r\x1b[2K\x1b[1A\x1b[2K"
    written = f"\x1b[?25l{two_bars}{erased}first \x1b[32mdone\x1b[0m\r\nsecond done\r\nresult\r\n"
    shown = ["first \x1b[32mdone\x1b[0m", "second done", "result", ""]
    assert recording.last_screen(written) == shown


def test_a_command_sees_a_terminal_of_the_pictures_width(
    recording: ModuleType, tmp_path: Path
) -> None:
    asks = "import os, sys; print(sys.stdout.isatty(), os.get_terminal_size().columns)"
    written = recording.in_a_terminal([sys.executable, "-c", asks], str(tmp_path))
    assert written == f"True {recording.COLUMNS}\r\n"


def test_a_command_that_fails_makes_no_picture(recording: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(recording.subprocess.CalledProcessError) as caught:
        recording.in_a_terminal([sys.executable, "-c", "raise SystemExit('why')"], str(tmp_path))
    assert b"why" in caught.value.output


def test_the_picture_holds_the_text_and_fetches_nothing(recording: ModuleType) -> None:
    svg = recording.draw(["\x1b[1m$ cosmic run\x1b[0m", "total 1,253"])
    text = re.sub(r"<[^>]+>", "", svg).replace("&#160;", " ")
    assert "$ cosmic run" in text
    assert "total 1,253" in text
    assert not re.search(r"url\(|@font-face|href=", svg.replace("url(#", "("))


def test_the_picture_in_the_documents_is_of_this_command() -> None:
    svg = (ROOT / "docs/img/run.svg").read_text().replace("&#160;", " ")
    for word in ("$ cosmic run", "infer: 4 ranks", "NMAD"):
        assert word in svg, f"run `make recording`: {word} is not in the picture"
