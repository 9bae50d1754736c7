"""One rank calls something else: all ranks say so within a second, and who called what."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

import fmi_client
from fmi_client import sync
from fmi_client.communicator import Communicator
from fmi_client.errors import CollectiveMismatch, FmiError
from tests.processes import run_processes
from tests.reliability.conftest import Measured
from tests.support import run_ranks

pytestmark = pytest.mark.alone

SIZE = 6

Calls = list[Callable[[Any], Any]]


def made(*calls: Callable[[Any], Any]) -> Calls:
    """Return these calls, and two that nobody can get past who has not been told."""
    return [*calls, lambda comm: comm.barrier(), lambda comm: comm.allgather(comm.rank)]


ODD: dict[str, tuple[Calls, Calls, str, str]] = {
    "operation": (
        made(lambda comm: comm.allreduce(np.ones(4))),
        made(lambda comm: comm.allreduce(np.ones(4), fmi_client.MAX)),
        "allreduce(sum, float64 [4])",
        "allreduce(max, float64 [4])",
    ),
    "collective": (
        made(lambda comm: comm.allgather(1)),
        made(lambda comm: comm.alltoall([1] * comm.size)),
        "allgather()",
        "alltoall()",
    ),
    "dtype": (
        made(lambda comm: comm.reduce(np.ones(4))),
        made(lambda comm: comm.reduce(np.ones(4, "i4"))),
        "reduce(sum, root=0, float64 [4])",
        "reduce(sum, root=0, int32 [4])",
    ),
    "shape": (
        made(lambda comm: comm.scan(np.ones(4))),
        made(lambda comm: comm.scan(np.ones((2, 2)))),
        "scan(sum, float64 [4])",
        "scan(sum, float64 [2, 2])",
    ),
    "large shape": (
        made(lambda comm: comm.allreduce(np.ones(300_000))),
        made(lambda comm: comm.allreduce(np.ones(300_001))),
        "allreduce(sum, float64 [300000])",
        "allreduce(sum, float64 [300001])",
    ),
    "order": (
        made(lambda comm: comm.barrier(), lambda comm: comm.allreduce(1)),
        made(lambda comm: comm.allreduce(1), lambda comm: comm.barrier()),
        "barrier()",
        "allreduce(sum, object)",
    ),
    "one too few": (
        made(lambda comm: comm.allreduce(1), lambda comm: comm.bcast(1)),
        made(lambda comm: comm.bcast(1)),
        "allreduce(sum, object)",
        "bcast(root=0)",
    ),
}


def rooted(name: str, root: int) -> Callable[[Any], Any]:
    return lambda comm: getattr(comm, name)([1] * comm.size, root=root)


for name, text in {
    "bcast": "bcast(root={})",
    "gather": "gather(root={})",
    "scatter": "scatter(root={})",
    "reduce": "reduce(sum, root={}, object)",
}.items():
    for root in range(1, SIZE):
        calls = made(rooted(name, 0)), made(rooted(name, root))
        ODD[f"root of {name}: {root}"] = (*calls, text.format(0), text.format(root))

KINDS = list(dict.fromkeys(name.split(":")[0] for name in ODD))


def check(case: str, odd: int, errors: list[Any]) -> None:
    """All raised, and each says what two ranks called, of which one is the odd one."""
    usual, other = ODD[case][2:]
    for error in errors:
        assert isinstance(error, CollectiveMismatch), error
        assert usual in error.details, error
        assert f"rank {odd} called {other}" in error.details, error
        assert error.seq == 0, error


async def awaited(comm: Communicator, calls: Calls) -> tuple[Any, float]:
    try:
        for call in calls:
            await call(comm)
    except FmiError as error:
        return error, time.monotonic()
    return None, 0.0


async def seconds_until_all_know(case: str, odd: int, link: Literal["memory", "tcp"]) -> float:
    usual, other = ODD[case][:2]
    begun = []

    async def rank(comm: Communicator) -> tuple[Any, float]:
        begun.append(time.monotonic())
        return await awaited(comm, other if comm.rank == odd else usual)

    results = await run_ranks(SIZE, rank, link)
    check(case, odd, [error for error, _ in results])
    return max(heard for _, heard in results) - max(begun)


@pytest.mark.row(12)
@pytest.mark.parametrize("link", ["memory", "tcp"])
@pytest.mark.parametrize("kind", KINDS)
async def test_all_ranks_of_a_loop_say_who_called_what(
    kind: str, link: Literal["memory", "tcp"], measured: Measured
) -> None:
    odd_ones = range(SIZE) if link == "memory" else (2,)
    seconds = [
        await seconds_until_all_know(case, odd, link)
        for case in ODD
        if case.split(":")[0] == kind
        for odd in odd_ones
    ]
    measured(f"one rank's {kind} is another, {link} links: all know", max(seconds), "s", "< 1")
    assert max(seconds) < 1


@pytest.mark.row(12)
@pytest.mark.parametrize("case", ["large shape", "order", "one too few", "root of gather: 5"])
def test_all_processes_say_who_called_what(address: str, case: str, measured: Measured) -> None:
    usual, other = ODD[case][:2]

    def rank(comm: sync.Communicator) -> tuple[Any, float, float]:
        begun = time.monotonic()
        try:
            for call in other if comm.rank == 2 else usual:
                call(comm)
        except FmiError as error:
            return error, begun, time.monotonic()
        return None, begun, 0.0

    results = run_processes(address, SIZE, rank, job=case)
    check(case, 2, [error for error, _, _ in results])
    seconds = max(heard for *_, heard in results) - max(begun for _, begun, _ in results)
    measured(f"one rank's {case} is another, processes: all know", seconds, "s", "< 1")
    assert seconds < 1
