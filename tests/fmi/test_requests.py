"""Operations that were begun and are waited for later."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from fmi_client import sync
from fmi_client.errors import Aborted, CollectiveMismatch, CollectiveTimeout
from tests.processes import fork, run_processes


def results(address: str, size: int, function: Any) -> list[Any]:
    found = run_processes(address, size, function)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_returns_what_the_blocking_one_does(address: str, size: int) -> None:
    def rank(comm: sync.Communicator) -> Any:
        big = np.full(200_000, comm.rank + 1.0)
        right, left = (comm.rank + 1) % size, (comm.rank - 1) % size
        begun = [
            comm.iallreduce(big),
            comm.ibarrier(),
            comm.ibcast({"a": comm.rank}, root=1),
            comm.isend(bytes(2_000_000), right, tag=4),
            comm.irecv(left, tag=4),
            comm.iallreduce(comm.rank),
        ]
        got = [request.wait() for request in reversed(begun)][::-1]
        assert begun[0].wait() is got[0]
        return [float(got[0][7]), *got[1:4], len(got[4]), got[5], comm.allreduce(1)]

    total = size * (size + 1) / 2
    expected = [total, None, {"a": 1}, None, 2_000_000, size * (size - 1) // 2, size]
    assert results(address, size, rank) == [expected] * size


def test_they_go_on_inside_other_calls(address: str) -> None:
    """Rank 1 needs rank 0's part of the first operation before it comes to the second."""

    def rank(comm: sync.Communicator) -> Any:
        array = np.arange(300_000.0)
        request = comm.iallreduce(array) if comm.rank == 0 else None
        first = comm.allreduce(array) if comm.rank else None
        comm.barrier()
        first = request.wait() if request else first
        return float(first[5])

    assert results(address, 2, rank) == [10.0, 10.0]


def test_test_makes_progress_and_never_waits(address: str) -> None:
    def rank(comm: sync.Communicator) -> Any:
        comm.barrier()
        request = comm.irecv(0, tag=1) if comm.rank else comm.irecv(1, tag=2)
        if comm.rank == 0:
            before = request.test()  # rank 1 sends only after our message
            comm.send("go", 1, tag=1)
        else:
            before = False
            assert request.wait() == "go"
            comm.send("come", 0, tag=2)
        end = time.monotonic() + 10
        while not request.test() and time.monotonic() < end:
            pass
        return before, request.wait()

    assert results(address, 2, rank) == [(False, "come"), (False, "go")]


def test_out_is_filled(address: str) -> None:
    def rank(comm: sync.Communicator) -> Any:
        array = np.full(100_000, comm.rank + 1.0)
        request = comm.iallreduce(array, out=array)
        assert request.wait() is array
        return float(array[0])

    assert results(address, 3, rank) == [6.0] * 3


def test_time_runs_from_the_beginning(address: str) -> None:
    over = fork.Event()

    def rank(comm: sync.Communicator) -> Any:
        comm.barrier()
        if comm.rank:
            return over.wait(10)
        request = comm.iallreduce(1, timeout=0.1)
        while not request.test():
            pass
        with pytest.raises(CollectiveTimeout) as late:
            request.wait()
        over.set()
        with pytest.raises(CollectiveTimeout):
            request.wait()
        return late.value.op, late.value.missing

    assert run_processes(address, 2, rank) == [("allreduce", [1]), True]


def test_a_receive_that_is_late_can_be_repeated(address: str) -> None:
    def rank(comm: sync.Communicator) -> Any:
        comm.barrier()
        if comm.rank:
            comm.recv(0)
            comm.send("late", 0)
            return None
        with pytest.raises(CollectiveTimeout):
            comm.irecv(1, timeout=0.05).wait()
        comm.send("now", 1)
        return comm.recv(1)

    assert run_processes(address, 2, rank) == ["late", None]


def test_an_abort_and_a_mismatch_reach_who_waits(address: str) -> None:
    def aborted(comm: sync.Communicator) -> Any:
        comm.barrier()
        if comm.rank:
            comm.abort("enough")
            return None
        with pytest.raises(Aborted, match="enough"):
            comm.iallreduce(1).wait()
        return None

    def mismatch(comm: sync.Communicator) -> Any:
        request = comm.iallreduce(np.zeros(3 + comm.rank))
        with pytest.raises(CollectiveMismatch, match="float64"):
            request.wait()

    assert run_processes(address, 2, aborted) == [None, None]
    assert run_processes(address, 2, mismatch) == [None, None]


def test_an_operation_of_the_callers_that_raises_ends_the_job(address: str) -> None:
    def fails(left: Any, right: Any) -> Any:
        raise ZeroDivisionError("mine")

    def rank(comm: sync.Communicator) -> Any:
        request = comm.iallreduce(1, fails)
        with pytest.raises((ZeroDivisionError, Aborted)) as error:
            request.wait()
        return "mine" in str(error.value)

    assert run_processes(address, 2, rank) == [True, True]
