"""What the tests of processes have in common: how they start and end, and who is alive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAKES = Path(__file__).parent / "fakes"
ROOT = Path(__file__).parents[2]


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python with `words` in a folder, as in a terminal 80 columns wide."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_fakes(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start `cosmic` around the fakes, which say in the folder what becomes of them."""
    settings = {"FAKE_SERVER_FOLDER": str(folder), "TMPDIR": str(folder / "tmp")}
    return start(folder, str(FAKES / "cosmic.py"), *words, **settings, **environment)


def finish(process: subprocess.Popen[str], seconds: float = 50) -> tuple[int, str, str]:
    """Wait for the end; returns exit code, stdout and stderr."""
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait for a condition that another process brings about, and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return value


def pids(folder: Path) -> list[int]:
    """All processes that the fakes below `folder` have recorded."""
    # Not rglob: it fails where a temporary folder is removed while it looks.
    files = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    found = [int(pid) for f in files if f.suffix == ".pid" for pid in f.read_text().split()]
    servers = [recorded(f.parent, f.name)["pid"] for f in files if f.name == "server.json"]
    return found + servers


def recorded(folder: Path, name: str) -> Any:
    """What a fake has left in a JSON file; None where it has not."""
    path = Path(folder, name)
    return json.loads(path.read_text()) if path.exists() else None
