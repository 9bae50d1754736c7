"""A rank is killed in the middle of a collective: all others say which, within a second."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from fmi_client import sync
from fmi_client.errors import FmiError, RankFailed
from tests.processes import fork, run_processes
from tests.reliability.collectives import COLLECTIVES, LARGE, SMALL, act_after
from tests.reliability.conftest import Measured

pytestmark = pytest.mark.alone

SIZE = 8
NIGHTLY = 100


def die_after(comm: sync.Communicator, steps: int, died: Any) -> None:
    """Let this process be killed when it has begun that many more steps of collectives."""

    def act() -> None:
        died.value = time.monotonic()
        os.kill(os.getpid(), signal.SIGKILL)

    act_after(comm, steps, act)


def seconds_until_all_know(address: str, name: str, number: int) -> list[float]:
    """Kill another rank, in another step, with more or less data each time."""
    victim, steps, array = number % SIZE, 1 + number % 5, (SMALL, LARGE)[number // 5 % 2]
    died = fork.Value("d", 0.0)

    def rank(comm: sync.Communicator) -> tuple[FmiError, float]:
        try:
            comm.barrier()
            if comm.rank == victim:
                die_after(comm, steps, died)
            while True:
                COLLECTIVES[name](comm, array)
        except FmiError as error:
            return error, time.monotonic()

    results = run_processes(address, SIZE, rank, job=f"{name} {number}")
    assert results.pop(victim) == "died"
    for error, _ in results:
        assert isinstance(error, RankFailed), error
        assert error.rank == victim, error
    return [heard - died.value for _, heard in results]


@pytest.mark.row(10)
@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("tries", [2, pytest.param(NIGHTLY, marks=pytest.mark.nightly)])
def test_all_name_the_rank_that_was_killed(
    address: str, name: str, tries: int, measured: Measured
) -> None:
    first = 7 * list(COLLECTIVES).index(name)
    longest = [max(seconds_until_all_know(address, name, first + i)) for i in range(tries)]
    measured(
        f"{name}: the last of {SIZE - 1} learns who died, {tries} times", max(longest), "s", "< 1"
    )
    assert max(longest) < 1
