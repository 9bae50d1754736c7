"""The blocking communicator in real processes, on the same algorithms."""

from __future__ import annotations

import os
import resource
import signal
import time
from typing import Any

import numpy as np
import pytest

from fmi_client import sync
from fmi_client.errors import (
    Aborted,
    CollectiveMismatch,
    CollectiveTimeout,
    JoinTimeout,
    RankFailed,
    RendezvousError,
)
from tests.fmi import everything
from tests.processes import RankFunction, fork, run_processes


@pytest.mark.parametrize("size", [2, 4, 5])
def test_every_collective(address: str, size: int) -> None:
    results = run_processes(address, size, everything.blocking)
    assert results == [everything.expected(rank, size, "direct") for rank in range(size)]


def test_a_job_of_one(address: str) -> None:
    with sync.connect(address, job="one", rank=0, size=1) as comm:
        assert comm.allreduce(3) == 3
        assert comm.sendrecv("self", 0) == "self"


def test_seconds_in_collectives_are_counted_with_the_waiting(address: str) -> None:
    def rank(comm: sync.Communicator) -> list[float]:
        seen = []
        for operation in (comm.barrier, lambda: comm.sendrecv(1, 1 - comm.rank)):
            time.sleep(0.2 * comm.rank)  # rank 0 waits
            operation()
            seen.append(comm.stats()["collective_seconds"])
        return seen

    (waited, after), (brief, _) = run_processes(address, 2, rank, job="seconds")
    assert waited >= 0.15
    assert brief > 0
    assert after == waited, "sendrecv is no collective"


@pytest.mark.alone
def test_a_killed_rank_is_named_by_all_others_within_a_second(address: str) -> None:
    def rank(comm: sync.Communicator) -> Any:
        start = time.monotonic()
        try:
            comm.barrier()
            if comm.rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                comm.allreduce(np.ones(100_000))
        except RankFailed as error:
            return error.rank, time.monotonic() - start

    results = run_processes(address, 4, rank, job="killed")
    assert results.pop(2) == "died"
    assert [rank for rank, _ in results] == [2, 2, 2]
    assert all(seconds < 1 for _, seconds in results)


@pytest.mark.parametrize(
    ("function", "kind", "text"),
    [
        (
            lambda comm: comm.allreduce(np.zeros(3 + comm.rank // 2)),
            CollectiveMismatch,
            "allreduce(sum, float64 [4])",
        ),
        (
            lambda comm: comm.abort("enough") if comm.rank == 1 else comm.barrier(),
            Aborted,
            "enough",
        ),
        (lambda comm: 1 // comm.rank and comm.barrier(), Aborted, "ZeroDivisionError"),
        (
            lambda comm: comm.barrier() if comm.rank else comm.recv(1, timeout=0.05),
            CollectiveTimeout,
            "no answer from rank 1",
        ),
    ],
    ids=["mismatch", "abort", "exception", "timeout"],
)
def test_errors(address: str, function: RankFunction, kind: type[Exception], text: str) -> None:
    results = run_processes(address, 3, function, job=f"errors {text}")
    errors = [got for got in results if isinstance(got, kind)]
    assert errors
    assert all(text in str(error) for error in errors)


def test_who_does_not_come_is_named(address: str) -> None:
    with pytest.raises(JoinTimeout, match=r"2 of 3 ranks did not join within 0.1 s: 0, 2"):
        sync.connect(address, job="alone", rank=1, size=3, timeout=0.1)
    with pytest.raises(RendezvousError, match="Connection refused"):
        sync.connect("127.0.0.1:1", job="alone", rank=1, size=3, timeout=0.1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 3},
        {"rank": -1},
        {"size": 0},
        {"job": ""},
        {"epoch": -1},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"key": b"x"},
    ],
)
def test_wrong_arguments_never_reach_the_server(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sync.connect("127.0.0.1:1", **({"job": "j", "rank": 0, "size": 3} | arguments))


def test_key_and_token_come_from_the_environment(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMI_KEY", "not hexadecimal")
    with pytest.raises(ValueError, match="FMI_KEY"):
        sync.connect(address, job="j", rank=0, size=1)
    monkeypatch.setenv("FMI_KEY", "ab" * 32)
    sync.connect(address, job="j", rank=0, size=1).close()
    monkeypatch.setenv("FMI_TOKEN", "fmi3.1.x")
    with pytest.raises(ValueError, match="make_token"):
        sync.connect(address, job="j", rank=0, size=1)


@pytest.mark.parametrize("size", [3, 4])
def test_a_large_reduction_takes_next_to_no_memory(address: str, size: int) -> None:
    """What comes is combined in pieces: no second copy, not even of a part."""
    nbytes = 64 * 1024 * 1024

    def rank(comm: sync.Communicator) -> int:
        array = np.ones(nbytes // 4, "f4")
        comm.allreduce(array[:100_000])  # links and code paths are warm
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        comm.allreduce(array, out=array)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    for grown in run_processes(address, size, rank, job="memory"):
        assert grown < 4 * 1024 * 1024


@pytest.mark.alone
def test_who_waits_does_not_work(address: str) -> None:
    """A spin, then sleep: 1 % of a core at most."""
    seconds = 1.5
    over = fork.Event()

    def rank(comm: sync.Communicator) -> float:
        comm.barrier()
        if comm.rank == 1:
            over.wait(seconds)
        before = time.process_time()
        comm.barrier()
        return time.process_time() - before

    waiting, _ = run_processes(address, 2, rank, job="waiting")
    assert waiting < 0.01 * seconds


def test_an_abort_right_after_joining_reaches_all_with_its_reason(address: str) -> None:
    """The goodbye must not overtake it, whatever the server is sending at that moment."""

    def rank(comm: sync.Communicator) -> None:
        if comm.rank == 2:
            raise ValueError("boom")
        comm.barrier()

    for i in range(10):
        results = run_processes(address, 3, rank, job=f"quick abort {i}")
        assert [type(error) for error in results] == [Aborted, Aborted, ValueError]
        assert "boom" in results[0].reason


def test_descriptors_are_given_back(address: str) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(5):
        with sync.connect(address, job="fds", rank=0, size=1) as comm:
            comm.barrier()
        with pytest.raises(JoinTimeout):
            sync.connect(address, job="fds", rank=0, size=2, timeout=0.05)
    deadline = time.monotonic() + 5  # the server, in its thread, closes its ends, too
    while count() != before and time.monotonic() < deadline:
        os.sched_yield()
    assert count() == before
