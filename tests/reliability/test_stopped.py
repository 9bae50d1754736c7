"""Ranks stop without dying: at the deadline all others say which, and in what."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, NamedTuple

import numpy as np
import pytest

from fmi_client import sync
from fmi_client.errors import CollectiveTimeout
from tests.processes import running
from tests.reliability.collectives import AGREEING, COLLECTIVES, LARGE, SMALL
from tests.reliability.conftest import Measured

SIZE = 8
TIMEOUT = 0.4
LIMIT = 0.1

GROUPS = [(5,), (6, 7), (0, 4), (1, 3), (2, 3), (4, 6, 7), (1, 2, 3), (0, 3, 7)]
"""Who stops: alone, or with others of whom only one is waited for by anybody who lives."""


class Ended(NamedTuple):
    """How a rank learned of it; times are monotonic."""

    error: CollectiveTimeout
    deadline: float
    heard: float


def stop_after(comm: sync.Communicator, steps: int) -> None:
    """Stop this process when it has begun that many more steps of collectives."""
    post, left = comm._post, [steps]

    def posting(*step: Any) -> Any:
        under_way = post(*step)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return under_way

    comm._post = posting  # type: ignore[method-assign]


def stop(
    address: str, name: str, victims: tuple[int, ...], steps: int, array: np.ndarray[Any, Any]
) -> list[Ended]:
    """Let these ranks stop in the midst of a collective; returns what the others raised."""

    def rank(comm: sync.Communicator) -> Ended:
        comm.barrier()
        if comm.rank in victims:
            stop_after(comm, steps)
        while True:
            for call in (name, "barrier") if name not in AGREEING else (name,):
                deadline = time.monotonic() + TIMEOUT
                try:
                    COLLECTIVES[call](comm, array)
                except CollectiveTimeout as error:
                    return Ended(error, deadline, time.monotonic())

    job = f"{name} {victims} {steps} {array.nbytes}"
    with running(address, SIZE, rank, job=job, timeout=TIMEOUT) as ranks:
        return [ranks[r].result() for r in range(SIZE) if r not in victims]


def check(ends: list[Ended], name: str, victims: tuple[int, ...]) -> float:
    """All raised the same; returns how long after the first deadline the last one did."""
    (first, *_), errors = ends, [end.error for end in ends]
    assert all(isinstance(error, CollectiveTimeout) for error in errors), errors
    for error in errors:
        assert error.missing == sorted(victims), [str(error) for error in errors]
        assert (error.op, error.seq) == (first.error.op, first.error.seq)
    assert first.error.op in (name, "barrier" if name not in AGREEING else name)
    deadline = min(end.deadline for end in ends)
    assert min(end.heard for end in ends) >= deadline
    return max(end.heard for end in ends) - deadline
