"""Records what a terminal shows after `cosmic run`, as docs/img/run.svg: `make recording`."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "docs/img/run.svg"
COLUMNS, ROWS = 84, 50

CODE = re.compile(r"\x1b\[(?P<arguments>[?\d;]*)(?P<what>[A-Za-z])|[\r\n]")

FONT_FACES = re.compile(r"@font-face \{.*?\}", re.DOTALL)
"""Rich's pictures fetch a font. Ours do not: the reader's monospace one does."""


def in_a_terminal(command: list[str], folder: str) -> str:
    """Run a command whose output is a terminal; return all that it wrote, codes included.

    Raises:
        CalledProcessError: the command failed.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:
        pass  # so a terminal says that nobody holds its other end any more
    os.close(ours)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command, written)
    return written.decode()


def last_screen(written: str) -> list[str]:
    """Return the lines that are there at the end, their colours as codes.

    Knows what rich's progress bars use: up, erase the line, and its beginning.
    """
    lines, row, at = [""], 0, 0
    for code in CODE.finditer(written):
        lines[row] += written[at : code.start()]
        at = code.end()
        match code["what"] or code[0]:
            case "\n":
                row += 1
                lines += [""] * (row == len(lines))
            case "A":
                row = max(0, row - int(code["arguments"] or 1))
            case "K":
                lines[row] = ""
            case "m":
                lines[row] += code[0]
    lines[row] += written[at:]
    return lines


def draw(lines: list[str]) -> str:
    """Return the picture of a terminal."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title="cosmic run", theme=DIMMED_MONOKAI, unique_id="run")
    return FONT_FACES.sub("", svg)


def main() -> None:
    """Run a job in a folder of its own, and draw what is left on the screen."""
    with tempfile.TemporaryDirectory() as folder:
        written = in_a_terminal([sys.executable, "-m", "workflow", "run"], folder)
    shown = "\n".join(last_screen(written)).strip().split("\n")
    IMAGE.write_text(draw(["\x1b[1m$ cosmic run\x1b[0m", *shown]) + "\n")
    print(IMAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
