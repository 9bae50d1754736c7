"""Ranks stop without dying: at the deadline all others say which, and in what."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import time
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import pytest

import fmi_client
from fmi_client import sync
from fmi_client.communicator import Communicator, memory_world
from fmi_client.endpoint import ANSWER_SECONDS
from fmi_client.errors import CollectiveTimeout, FmiError
from tests.processes import fork, running
from tests.reliability.collectives import AGREEING, COLLECTIVES, LARGE, SMALL, act_after
from tests.reliability.conftest import Measured
from tests.support import KEY, run_ranks, serving

pytestmark = pytest.mark.alone

SIZE = 8
TIMEOUT, LOOP_TIMEOUT = 0.5, 0.25
LIMIT = 0.1

GROUPS = [(5,), (6, 7), (0, 4), (1, 3), (2, 3), (4, 6, 7), (1, 2, 3), (0, 3, 7)]
"""Who stops: alone, or with others of whom only one is waited for by anybody who lives."""


class Ended(NamedTuple):
    """How a rank learned of it; times are monotonic."""

    error: FmiError
    deadline: float
    heard: float


def calls(name: str) -> tuple[str, ...]:
    """Where a rank may be done before the others have begun, it waits for them in the next call."""
    return (name,) if name in AGREEING else (name, "barrier")


def check(ends: list[Ended], name: str, missing: list[int]) -> float:
    """All raised the same; returns how long after the first deadline the last one did."""
    first = ends[0].error
    for end in ends:
        error = end.error
        assert isinstance(error, CollectiveTimeout), error
        assert error.missing == missing, error
        assert (error.op, error.seq) == (first.op, first.seq)
        assert re.search(f"within ({TIMEOUT:g}|{LOOP_TIMEOUT:g}) s", str(error))
    assert first.op in calls(name)
    deadline = min(end.deadline for end in ends)
    assert min(end.heard for end in ends) >= deadline
    return max(end.heard for end in ends) - deadline


# ------------------------------------------------------------------------- processes


def stop_after(comm: sync.Communicator, steps: int, stopped: Any) -> None:
    """Stop this process when it has begun that many more steps of collectives."""

    def act() -> None:
        stopped[comm.rank] = 1
        os.kill(os.getpid(), signal.SIGSTOP)

    act_after(comm, steps, act)


def stop(address: str, name: str, number: int) -> float:
    """Let ranks stop in the midst of a collective; another group, step and size each time.

    Returns:
        How long after the first deadline all knew.
    """
    group, steps = GROUPS[number % len(GROUPS)], 1 + number // len(GROUPS) % 3
    array = (SMALL, LARGE)[number % 2]
    stopped = fork.Array("b", SIZE)

    def rank(comm: sync.Communicator) -> Ended:
        comm.barrier()
        comm.timeout = TIMEOUT
        if comm.rank in group:
            stop_after(comm, steps, stopped)
        while True:
            for call in calls(name):
                deadline = time.monotonic() + TIMEOUT
                try:
                    COLLECTIVES[call](comm, array)
                except FmiError as error:
                    return Ended(error, deadline, time.monotonic())

    with running(address, SIZE, rank, job=f"{name} {number}") as ranks:
        ends = [ranks[r].result() for r in range(SIZE) if r not in group]
        missing = [r for r in range(SIZE) if stopped[r]]
        # One of the group may come to wait for the others, and not get as far as its last step.
        ends += [ranks[r].result() for r in group if r not in missing]
    return check(ends, name, missing)


SOME = [("barrier", 5), ("gather", 1), ("scatter", 9)]
ALL = {name: [(name, n) for n in range(3 * len(GROUPS))] for name in COLLECTIVES}


@pytest.mark.row(11)
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SOME, id="some"),
        *(pytest.param(ALL[name], id=name, marks=pytest.mark.nightly) for name in ALL),
    ],
)
def test_all_processes_name_those_that_were_stopped(
    address: str, cases: list[tuple[str, int]], measured: Measured
) -> None:
    # The median: something else on the machine may take 20 ms now and then.
    median = statistics.median([stop(address, *case) for case in cases])
    names = ", ".join(dict.fromkeys(name for name, _ in cases))
    measured(f"{names}: after the deadline all know who stopped", 1e3 * median, "ms", "< 100")
    assert median < LIMIT


# ------------------------------------------------------------------------ in one loop


def numb(comm: Communicator) -> None:
    """Let a rank hear nothing any more of what others say."""
    comm._endpoint.told = lambda event: None  # type: ignore[method-assign]


def stick_after(comm: Communicator, steps: int, stuck: set[int]) -> None:
    """Let a rank go no further when it has begun that many more steps."""
    perform, left = comm._perform, [steps]

    async def performing(step: Any, call: Any, deadline: float, loop: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            comm._post(step, call)
            numb(comm)
            stuck.add(comm.rank)
            await asyncio.Event().wait()
        return await perform(step, call, deadline, loop)

    comm._perform = performing  # type: ignore[method-assign]


async def stick(name: str, group: Sequence[int], steps: int) -> None:
    """As `stop`, with ranks that live in this loop."""
    worlds, stuck = memory_world(SIZE, LOOP_TIMEOUT), set[int]()

    async def rank(comm: Communicator) -> Ended:
        await comm.barrier()
        if comm.rank in group:
            stick_after(comm, steps, stuck)
        while True:
            for call in calls(name):
                deadline = time.monotonic() + LOOP_TIMEOUT
                try:
                    await COLLECTIVES[call](comm, SMALL)
                except FmiError as error:
                    return Ended(error, deadline, time.monotonic())

    tasks = [asyncio.create_task(rank(comm)) for comm in worlds]
    ends = await asyncio.gather(*(tasks[r] for r in range(SIZE) if r not in group))
    ends += await asyncio.gather(*(tasks[r] for r in group if r not in stuck))
    for r in stuck:
        tasks[r].cancel()
    check(ends, name, sorted(stuck))


@pytest.mark.row(11)
@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("steps", [(1,), pytest.param((2, 3), marks=pytest.mark.nightly)])
async def test_all_ranks_of_a_loop_name_those_that_stick(name: str, steps: Sequence[int]) -> None:
    await asyncio.gather(*(stick(name, group, step) for group in GROUPS for step in steps))


@pytest.mark.row(11)
async def test_a_large_job_has_the_patience_to_hear_all_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody names anybody before who called the roll has heard all: here in 10,000 ranks' time."""
    monkeypatch.setattr("fmi_client.endpoint.ANSWER_SECONDS", 10_000 * ANSWER_SECONDS / SIZE)
    await asyncio.gather(*(stick("barrier", group, 1) for group in GROUPS))


async def outcome(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except FmiError as error:
        return error


LinkKind = Literal["memory", "tcp"]
LINKS: list[LinkKind] = ["memory", "tcp"]


@pytest.mark.row(11)
@pytest.mark.parametrize("link", LINKS)
async def test_who_is_done_or_waits_elsewhere_is_not_missing(
    link: LinkKind,
) -> None:
    """Rank 0 waits for 2. The others are done: 1 is idle, 3 in the next call, 4 has left."""

    async def rank(comm: Communicator) -> Any:
        await comm.alltoall([1] * comm.size)
        if comm.rank == 2:
            return None
        first = await outcome(comm.gather(1, timeout=0.2))
        if comm.rank == 4:
            await comm.close()
        return await outcome(comm.barrier(timeout=5)) if comm.rank == 3 else first

    results = await run_ranks(5, rank, link)
    for error in (results[0], results[3]):
        assert isinstance(error, CollectiveTimeout)
        assert (error.missing, error.op, error.seq) == ([2], "gather", 1)
        assert "nobody waits" not in str(error)
    assert results[1] is None


@pytest.mark.row(11)
async def test_of_one_that_is_done_and_deaf_the_error_says_that_nobody_waits_for_it() -> None:
    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 2:
            return None
        if comm.rank == 3:
            numb(comm)  # as a blocking rank is that computes
        return await outcome(comm.gather(1, root=1, timeout=0.2))

    results = await run_ranks(4, rank)
    assert results[1].missing == [2, 3]
    assert "nobody waits for rank 3 of these: stopped, too, or done" in str(results[1])


@pytest.mark.row(11)
@pytest.mark.parametrize("link", LINKS)
async def test_only_the_ranks_of_the_communicator_are_missing(
    link: LinkKind,
) -> None:
    """Of a part of the job: others are told, but nobody waits for an answer of theirs."""

    async def rank(comm: Communicator) -> Any:
        part = await comm.split(comm.rank % 2)
        if comm.rank == 5:
            return None
        if comm.rank % 2:
            return await outcome(part.barrier(timeout=0.2))
        return None if comm.rank == 0 else await outcome(comm.barrier(timeout=5))

    results = await run_ranks(6, rank, link)
    for error in (results[1], results[2], results[3], results[4]):
        assert (error.missing, error.op, error.seq) == ([5], "barrier", 0), error


@pytest.mark.row(11)
async def test_where_each_waits_for_another_all_are_named() -> None:
    async def rank(comm: Communicator) -> Any:
        parts = await comm.split(0), await comm.split(0)
        return await outcome(parts[comm.rank].barrier(timeout=0.2 + comm.rank))

    for error in await run_ranks(2, rank):
        assert error.missing == [0, 1] or error.missing == [1], error


@pytest.mark.row(11)
async def test_without_a_server_those_are_named_that_one_waits_for() -> None:
    async with serving() as (server, address):
        join = partial(fmi_client.connect, address, job="test", size=3, key=KEY, timeout=5)
        ranks = await asyncio.gather(*(join(rank=r) for r in range(3)))
        await asyncio.gather(*(comm.alltoall([1] * 3) for comm in ranks))
        await server.stop()
        begun = time.monotonic()
        errors = await asyncio.gather(*(outcome(c.barrier(timeout=0.2)) for c in ranks[1:]))
        assert time.monotonic() - begun < 1.5
        for error in errors:
            assert isinstance(error, CollectiveTimeout), error
            assert 0 in error.missing or error.missing == [1]
        for comm in ranks:
            await comm.close()
