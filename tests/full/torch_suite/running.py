"""torch's own tests of torch.distributed, each with ranks that are forked for it.

The tests are torch.testing._internal.distributed.distributed_test, as the wheel brings them. Which
of them run is decided by the backend's name when the module is imported ("only gloo supports
timeouts"), so that under a name the suite does not know, most of what gloo has to show is skipped.
Here it is imported as for gloo, whatever runs: every backend meets the same tests. Afterwards the
name is the backend's own, in the module and in the environment, where the tests take it from.

Four ranks run a test, as more tests of subgroups do with four than with torch's three; eight where
a test skips less than that.

torch spawns the ranks of every test, and each imports torch. Here they are forks of a process that
has imported it and has computed nothing with it: it has no threads that a fork could lose.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import time
import unittest
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

fork = multiprocessing.get_context("fork")

RANKS = 4
MORE_RANKS = 8

# Some of torch's say what they expected only after an empty line.
ERROR = re.compile(r"^[\w.]*(?:Error|Exception|Timeout)\b.*(?:\n\nExpected .*)?", re.MULTILINE)
MOST = 300
"""Characters of an error that are reported."""

SUITE = "torch.testing._internal.distributed.distributed_test"


class Outcome(NamedTuple):
    """How a test ended; `reason` is the error's last line, or why it was skipped."""

    test: str
    status: Literal["passed", "failed", "skipped"]
    ranks: int
    seconds: float
    reason: str = ""


class Settings(NamedTuple):
    """`deadline`: seconds for each test; `jobs`: tests at a time; `logs`: a file for each test."""

    backend: str
    deadline: float
    jobs: int
    logs: Path


class TakenForGloo(str):
    """A backend's name that is gloo's where the suite compares.

    Some tests go on only under names they know: "if BACKEND == 'mpi' or BACKEND == 'gloo'".
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "gloo" or super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class ForkedRanks:
    """How ranks start and end: goes before torch's TestDistBackend, whose other methods it uses."""

    suite: Any
    deadline: float
    processes: list[Any]

    def setUp(self) -> None:
        super().setUp()  # type: ignore[misc]
        # The module reads it once, but every test has a file of its own.
        self.suite.INIT_METHOD = os.environ["INIT_METHOD"]
        self._start_processes(fork.Process)  # type: ignore[attr-defined]

    def _join_processes(self, test: Any) -> None:
        """Wait until all ranks have ended, one has failed or the deadline is over; then judge."""
        began = time.monotonic()
        while (alive := self._alive()) and not self._failed():
            left = began + self.deadline - time.monotonic()
            if left <= 0 or not connection.wait([each.sentinel for each in alive], left):
                break
        hung = [] if self._failed() else [each.name for each in self._alive()]
        if hung:
            self._get_timedout_process_traceback()  # type: ignore[attr-defined]
        for each in self.processes:
            each.kill()
            each.join()
        if hung:
            raise AssertionError(f"{', '.join(hung)}: no end within {self.deadline:g} s")
        self._check_return_codes(test, time.monotonic() - began)

    def _alive(self) -> list[Any]:
        return [each for each in self.processes if each.is_alive()]

    def _failed(self) -> bool:
        code = self.TEST_ERROR_EXIT_CODE  # type: ignore[attr-defined]
        return any(each.exitcode == code for each in self.processes)

    def _check_return_codes(self, test: Any, seconds: float) -> None:
        """Judge as torch does, which looks at the first rank's code only; then at the others'."""
        super()._check_return_codes(test, seconds)  # type: ignore[misc]
        codes = [each.exitcode for each in self.processes]
        if len(set(codes)) > 1 and test not in self.skip_return_code_checks:  # type: ignore[attr-defined]
            raise AssertionError(f"the ranks' exit codes are {codes}")


def load() -> type[unittest.TestCase]:
    """Import the suite, which reads the environment as it is then: as for gloo and four ranks."""
    given = {"BACKEND": "gloo", "WORLD_SIZE": str(RANKS), "INIT_METHOD": "file://later"}
    os.environ.update(given, OMP_NUM_THREADS="1", TEMP_DIR="")
    suite = importlib.import_module(SUITE)
    importlib.import_module("torch._dynamo")  # what every test would import first
    bases = (ForkedRanks, suite.TestDistBackend, suite.DistributedTest._DistTestBase)
    return type("TorchSuite", bases, {"suite": suite})


def names(cases: type[unittest.TestCase], pattern: str) -> list[str]:
    """Return the names of all tests in which `pattern` occurs."""
    return [name for name in unittest.TestLoader().getTestCaseNames(cases) if pattern in name]


def run(
    cases: type[unittest.TestCase], tests: Sequence[str], settings: Settings
) -> Iterator[Outcome]:
    """Run the tests with a backend; outcomes in the order of `tests`, as they come."""
    given = (cases, settings)
    with ProcessPoolExecutor(settings.jobs, fork, _become, given) as pool:
        yield from pool.map(_run, tests)


_cases: Any = None
_logs = Path()


def _become(cases: Any, settings: Settings) -> None:
    """Let this process be one that runs tests with that backend."""
    global _cases, _logs
    _cases, _logs = cases, settings.logs
    cases.deadline = settings.deadline
    os.environ["BACKEND"] = settings.backend
    if settings.backend != "gloo":
        cases.suite.BACKEND = TakenForGloo(settings.backend)
        cases.suite.PROFILING_SUPPORTED_BACKENDS.append(settings.backend)
        cases.suite.SEND_RECV_PROFILING_SUPPORTED_BACKENDS.append(settings.backend)


def _run(test: str) -> Outcome:
    """Run one test; whatever it and its ranks print goes to its log."""
    log = os.open(_logs / f"{test}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.close(log)
    outcome = _run_with(test, RANKS)
    return _run_with(test, MORE_RANKS) if "small world size" in outcome.reason else outcome


def _run_with(test: str, ranks: int) -> Outcome:
    os.environ["WORLD_SIZE"] = str(ranks)
    result = unittest.TestResult()
    began = time.monotonic()
    _cases(test).run(result)
    seconds = round(time.monotonic() - began, 2)
    if result.skipped:
        return Outcome(test, "skipped", ranks, seconds, result.skipped[0][1])
    if found := result.errors + result.failures:
        print(*(text for _, text in found), flush=True)
        return Outcome(test, "failed", ranks, seconds, reason(found[0][1]))
    return Outcome(test, "passed", ranks, seconds)


def reason(text: str) -> str:
    """Return the error that a traceback ends with; of several ranks' tracebacks, the first's."""
    errors = [found for found in ERROR.finditer(text) if "exited with error code" not in found[0]]
    return " ".join(errors[0][0].split())[:MOST] if errors else text[-MOST:]
