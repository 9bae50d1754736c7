"""Run torch's own tests of torch.distributed with gloo and with our backend, and count.

Prints a table of passed, failed and skipped, and every failure with its reason. Exits with 1 if
a test failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.full.torch_suite import record, running


def main() -> int:
    given = _arguments()
    cases = running.load()
    tests = running.names(cases, given.pattern)
    given.logs.mkdir(parents=True, exist_ok=True)
    with _ready(given.backend):
        runs = [_run(cases, tests, backend, given) for backend in given.backend]
    made = record.Record(record.about(given.jobs), {run.backend: run for run in runs})
    _tell(made, given.logs)
    if given.json:
        record.save(made, given.json)
    if given.write:
        record.publish(made)
    return any(run.those("failed") for run in runs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.full.torch_suite", description=__doc__)
    add = parser.add_argument
    add("--backend", nargs="+", choices=["gloo", "fmi"], default=["gloo", "fmi"])
    add("-k", dest="pattern", default="", help="only tests in whose names this occurs")
    add("--jobs", type=int, default=4, help="tests at a time (default: 4)")
    add("--deadline", type=float, default=60.0, help="seconds for each test (default: 60)")
    logs = Path(tempfile.gettempdir(), "torch-suite")
    add("--logs", type=Path, default=logs, help="what tests print (default: %(default)s)")
    add("--json", type=Path, help="write all outcomes there")
    add("--write", action="store_true", help="write docs/torch-suite.md, passing.txt")
    given = parser.parse_args()
    if given.write and (given.pattern or len(given.backend) < 2):
        parser.error("--write takes all tests, and both backends")
    return given


@contextmanager
def _ready(backends: Sequence[str]) -> Iterator[None]:
    """Register our backend, and have a server for it."""
    if "fmi" not in backends:
        yield
        return
    # Not before the suite is there: it is what sets how many threads numpy and torch start.
    import fmi_client.torch_backend  # noqa: F401
    from tests.processes import serve_rendezvous

    with serve_rendezvous() as server:
        os.environ["FMI_SERVER"] = server
        yield


def _run(
    cases: type[unittest.TestCase], tests: list[str], backend: str, given: argparse.Namespace
) -> record.Run:
    logs = given.logs / backend
    logs.mkdir(exist_ok=True)
    settings = running.Settings(backend, given.deadline, given.jobs, logs)
    began = time.monotonic()
    outcomes = []
    for done, outcome in enumerate(running.run(cases, tests, settings), 1):
        outcomes.append(outcome)
        if outcome.status == "failed" or done % 50 == 0:
            print(f"{backend}, {done} of {len(tests)}: {outcome.test} {outcome.status}", flush=True)
    return record.Run(backend, round(time.monotonic() - began, 1), outcomes)


def _tell(made: record.Record, logs: Path) -> None:
    print(record.table(made.runs.values()))
    for run in made.runs.values():
        print(f"\nFailed with {run.backend} (logs in {logs / run.backend}):")
        print(record.failures(run))
    if len(made.runs) == 2 and made.runs["gloo"].passed():
        print(f"\n{record.summary(made)}")


if __name__ == "__main__":
    sys.exit(main())
