"""A newcomer's first ten minutes: clone, `make run`, and the README's example."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLD_SECONDS = 600
WARM_SECONDS = 30

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(COLD_SECONDS + 300),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout to clone"),
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
]


def newcomers_environment(home: Path) -> dict[str, str]:
    """Ours without the active virtual environment and without what tests set."""
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    path = [p for p in kept["PATH"].split(":") if not p.startswith(str(ROOT))]
    return kept | {"HOME": str(home), "PATH": ":".join(path)}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "cosmic")], check=True)
    return tmp_path / "cosmic"


def make_run(clone: Path, arguments: str, *options: str, **env: str) -> tuple[float, str]:
    start = time.monotonic()
    result = subprocess.run(
        ["make", *options, "run", f"ARGS={arguments}"],
        cwd=clone,
        env=newcomers_environment(clone.parent) | env,
        capture_output=True,
        text=True,
        timeout=COLD_SECONDS + 100,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return time.monotonic() - start, result.stdout


@pytest.mark.nightly
def test_make_run_in_a_fresh_clone(clone: Path) -> None:
    cold, out = make_run(clone, "--run cold")
    assert cold < COLD_SECONDS
    check_run(clone, "cold", out)
    warm, _ = make_run(clone, "--world-size 2 --batch-size 64 --run warm")
    assert warm < WARM_SECONDS
    records = json.loads((clone / "results/warm/combined_data.json").read_text())
    assert [record["rows"] for record in records] == [626, 627]
    assert_clean(clone)


def test_make_run_with_an_environment(clone: Path) -> None:
    """The same with ours, for making one takes a minute and more, and CI has just done that."""
    if not (ROOT / ".venv/.ready").exists():
        pytest.skip("make env was not run")
    (clone / ".venv").symlink_to((ROOT / ".venv").resolve())
    given = ("-o", ".venv/.ready")  # however old: it is not this clone's to remake
    _, out = make_run(clone, "--run warm", *given, PYTHONPATH=str(clone))
    check_run(clone, "warm", out)
    (clone / ".venv").unlink()
    assert_clean(clone)


def check_run(clone: Path, run: str, out: str) -> None:
    assert "combined_data.json" in out
    records = json.loads((clone / f"results/{run}/combined_data.json").read_text())
    assert [record["rank"] for record in records] == [0, 1, 2, 3]
    assert sum(record["rows"] for record in records) == 1253
    assert (clone / f"results/{run}/redshift.png").stat().st_size > 10_000


def assert_clean(clone: Path) -> None:
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    )
    assert status.stdout == "", "a run leaves files that git would add"
