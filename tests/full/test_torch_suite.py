"""torch's own tests of torch.distributed pass with our backend where they pass with gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.full.torch_suite import record, running

ENOUGH = 0.95
"""Share of gloo's passes below which the backend is not what it says."""

SECONDS = 420

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.timeout(SECONDS + 30)
def test_what_passes_with_gloo_passes_with_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got, printed = run(tmp_path)
    with capsys.disabled():
        print(f"\n{printed}")
    assert got.runs["gloo"].passed(), "nothing passes with gloo: this says nothing about ours"
    assert got.share() >= ENOUGH
    assert not missing(got), "these passed when passing.txt was written"


@pytest.mark.full
def test_a_test_that_does_not_end_is_a_failure(tmp_path: Path) -> None:
    # Five seconds are what it takes until the barrier's timeout, which is its own.
    got, _ = run(tmp_path, "--backend=gloo", "-k=test_barrier_timeout_group", "--deadline=2")
    (outcome,) = got.runs["gloo"].outcomes
    assert outcome.status == "failed"
    assert "process 1" in outcome.reason
    assert "no end within 2 s" in outcome.reason
    assert outcome.seconds < 30


def run(folder: Path, *options: str) -> tuple[record.Record, str]:
    """Run the suite in processes of their own; returns the outcomes, and what was printed."""
    results = folder / "results.json"
    command = [sys.executable, "-m", "tests.full.torch_suite", *options]
    command += [f"--json={results}", f"--logs={folder / 'logs'}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, complaints = process.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks, too, if it was stopped
    assert results.exists(), complaints[-2000:]
    return record.read(results), printed


def missing(got: record.Record) -> set[str]:
    """Return what passed once and does not now; gloo's own failures are torch's, not ours."""
    known = set(record.PASSING.read_text().split())
    return (known & got.runs["gloo"].passed()) - got.runs["fmi"].passed()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "Traceback:\n  File\nAssertionError: no end within 2 s\n",
            "AssertionError: no end within 2 s",
        ),
        (
            "RuntimeError: Process 0 exited with error code 10 and exception:\nTraceback:\n  File\n"
            "AssertionError: Scalars are not equal!\n\nExpected 1 but got 0.\nAbsolute: 1\n"
            "Process 1 exited with error code 10 and exception:\nValueError: no\n",
            "AssertionError: Scalars are not equal! Expected 1 but got 0.",
        ),
        (
            "torch.distributed.DistBackendError: [rank 0] gone",
            "torch.distributed.DistBackendError: [rank 0] gone",
        ),
        ("killed", "killed"),
    ],
)
def test_the_reason_is_the_first_rank_s_error(text: str, error: str) -> None:
    assert running.reason(text) == error


def test_the_page_and_the_names_are_of_one_run() -> None:
    passed = len(record.PASSING.read_text().split())
    assert f"| `fmi` | {passed} |" in record.PAGE.read_text()
