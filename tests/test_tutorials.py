"""Each page of docs/tutorials, run from top to bottom in an empty folder, prints what it shows.

docs/tutorials/README.md says what its blocks mean. Runners at hand (sybil, pytest-examples,
mktestdocs, pytest-codeblocks) have no shell that lasts from block to block, or compare no output.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise, takewhile
from pathlib import Path

import pytest

from tests.support import closed_port

ROOT = Path(__file__).parent.parent
PAGES = sorted(set((ROOT / "docs/tutorials").glob("*.md")) - {ROOT / "docs/tutorials/README.md"})
BLOCK = re.compile(r"(?:^`(\S+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
END = ":end of block:"

pytestmark = pytest.mark.timeout(120)  # torch starts in many processes


@contextmanager
def terminal(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """One bash with the programs of this environment; what it leaves behind ends with it."""
    foreign = ("COV", "FMI_", "RENDEZVOUS_")  # coverage: torch takes twice as long to start
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(ROOT)}
    bash = subprocess.Popen(
        ["bash"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=env | {"RENDEZVOUS_PORT": str(port)},
        text=True,
        start_new_session=True,
    )
    try:
        yield bash
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun ends its workers if it may
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(bash.pid, number)
                bash.communicate(timeout=5)


def enter(bash: subprocess.Popen[str], commands: str) -> str:
    """Let bash execute commands; returns what they print, without white space at ends of lines."""
    assert bash.stdin is not None
    assert bash.stdout is not None
    bash.stdin.write(f"{commands}\necho; echo {END}\n")
    bash.stdin.flush()
    said = "".join(takewhile(lambda line: line != f"{END}\n", bash.stdout))
    return re.sub(" +$", "", said, flags=re.MULTILINE).rstrip("\n")


def is_shown(said: str, shown: str) -> bool:
    """Whether a page that shows this output means that one: `…` stands for what differs."""
    lines = re.sub(r"(?m)^…\\\n", r"(?:.*\\n)*?", re.escape(f"{shown}\n")).replace("…", ".*")
    return re.fullmatch(lines, f"{said}\n") is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    port = closed_port()  # the usual one may be taken
    blocks = BLOCK.findall(page.read_text().replace("10000", str(port)))
    started = "".join(text for _, language, text in blocks if language == "sh")
    with terminal(tmp_path, port) as bash:
        for (name, language, text), (_, following, shown) in pairwise([*blocks, ("", "", "")]):
            if language == "python":
                assert name in started
                (tmp_path / name).write_text(text)
            elif language == "sh":
                said = enter(bash, text)
                expected = shown.rstrip("\n") if following == "text" else ""
                assert is_shown(said, expected), f"{text}prints\n{said}"
        # It has ended all that it began, or else this waits in vain.
        assert bash.communicate("wait\n", timeout=10) == ("", None)


def test_dots_stand_for_the_rest_of_a_line_or_for_any_lines() -> None:
    assert is_shown("", "")
    assert not is_shown("more", "")
    assert is_shown("a 0.3 s", "a … s")
    assert not is_shown("a 0.3 s\nb", "a … s")
    assert is_shown("b", "…\nb")
    assert is_shown("1\n2\nb", "…\nb")
    assert not is_shown("1\n2", "…\nb")
    assert is_shown("a\nb\nc", "a\n…")
    assert not is_shown("[3, 3,]", "[3. 3.]")
