"""When ranks disagree, are late, abort, raise or die, everybody learns who and where."""

from __future__ import annotations

import asyncio
import pickle
import re
from typing import Any

import msgpack
import numpy as np
import pytest

import fmi_client
from fmi_client import movement
from fmi_client.communicator import Communicator, memory_world
from fmi_client.errors import (
    Aborted,
    CollectiveMismatch,
    CollectiveTimeout,
    FmiError,
    JoinTimeout,
    RankFailed,
)
from fmi_client.protocol.peer import Payload
from tests.support import run_ranks

LINKS = ["memory", "tcp"]

COLLECTIVES: dict[str, Any] = {
    "barrier": lambda comm: comm.barrier(),
    "bcast": lambda comm: comm.bcast(np.zeros(5)),
    "gather": lambda comm: comm.gather(np.zeros(5)),
    "allgather": lambda comm: comm.allgather(np.zeros(5)),
    "scatter": lambda comm: comm.scatter([1] * comm.size),
    "reduce": lambda comm: comm.reduce(np.zeros(5)),
    "allreduce": lambda comm: comm.allreduce(np.zeros(5)),
    "large allreduce": lambda comm: comm.allreduce(np.zeros(100_000)),
    "reduce_scatter": lambda comm: comm.reduce_scatter(np.zeros(5)),
    "alltoall": lambda comm: comm.alltoall([1] * comm.size),
    "scan": lambda comm: comm.scan(np.zeros(5)),
    "exscan": lambda comm: comm.exscan(np.zeros(5)),
    "split": lambda comm: comm.split(0),
}
AGREEING = [name for name in COLLECTIVES if name not in ("bcast", "gather", "scatter", "split")]


async def outcome(awaitable: Any) -> Any:
    try:
        return await awaitable
    except FmiError as error:
        return error


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(
    ("usual", "odd", "said"),
    [
        (
            lambda comm: comm.allreduce(np.zeros(3)),
            lambda comm: comm.allreduce(np.zeros(4)),
            ("allreduce(sum, float64 [3])", "rank 2 called allreduce(sum, float64 [4])"),
        ),
        (
            lambda comm: comm.allreduce(np.zeros(3)),
            lambda comm: comm.allreduce(np.zeros(3, "f4")),
            ("allreduce(sum, float64 [3])", "rank 2 called allreduce(sum, float32 [3])"),
        ),
        (
            lambda comm: comm.allreduce(1),
            lambda comm: comm.allreduce(1, fmi_client.MAX),
            ("allreduce(sum, object)", "rank 2 called allreduce(max, object)"),
        ),
        (
            lambda comm: comm.scan(np.zeros(3)),
            lambda comm: comm.scan(np.zeros(2)),
            ("scan(sum, float64 [3])", "rank 2 called scan(sum, float64 [2])"),
        ),
        (
            lambda comm: comm.reduce(np.zeros(3), root=1),
            lambda comm: comm.reduce(np.zeros(3), root=3),
            ("reduce(sum, root=1, float64 [3])", "rank 2 called reduce(sum, root=3, float64 [3])"),
        ),
        (
            lambda comm: comm.barrier(),
            lambda comm: comm.allgather(1),
            ("barrier()", "rank 2 called allgather()"),
        ),
    ],
)
async def test_a_mismatch_is_raised_on_all_ranks_and_says_who_called_what(
    link: Any, usual: Any, odd: Any, said: tuple[str, str]
) -> None:
    results = await run_ranks(
        4, lambda comm: outcome(odd(comm) if comm.rank == 2 else usual(comm)), link
    )
    for error in results:
        assert isinstance(error, CollectiveMismatch), error
        assert error.seq == 0
        # Whoever noticed told the others; both sides of a pair may have.
        assert all(part.removeprefix("rank 2 called ") in error.details for part in said)
        assert "rank 2 called" in error.details


async def test_different_order_of_calls_is_found_even_where_messages_do_not_meet() -> None:
    async def rank(comm: Communicator) -> Any:
        if comm.rank == 0:
            return await outcome(comm.gather(1, root=0))
        await outcome(comm.bcast(1, root=1))
        return await outcome(comm.barrier())

    for error in await run_ranks(3, rank):
        assert isinstance(error, CollectiveMismatch)


@pytest.mark.parametrize("name", COLLECTIVES)
async def test_who_is_late_is_named_with_operation_and_number(name: str) -> None:
    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 0:
            return None
        comm.timeout = 0.05
        return await outcome(COLLECTIVES[name](comm))

    late = [e for e in await run_ranks(3, rank) if isinstance(e, CollectiveTimeout)]
    assert any(error.missing == [0] for error in late) or name == "gather"
    assert all(error.op == name.split()[-1] and error.seq == 1 for error in late)
    assert "within 0.05 s" in str(late[0]) if late else name == "gather"


async def test_a_late_receive_does_no_harm() -> None:
    async def rank(comm: Communicator) -> Any:
        if comm.rank == 0:
            with pytest.raises(CollectiveTimeout, match="recv"):
                await comm.recv(1, timeout=0.01)
        await comm.barrier()
        return await (comm.recv(1) if comm.rank == 0 else comm.send("late", 0))

    assert await run_ranks(2, rank) == ["late", None]


@pytest.mark.parametrize("link", LINKS)
async def test_abort_ends_all_that_waits_and_all_that_follows(link: Any) -> None:
    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 1:
            comm.abort("out of luck")
        first = await outcome(comm.allreduce(1))
        second = await outcome(comm.barrier())
        return first, second

    for first, second in await run_ranks(4, rank, link):
        for error in (first, second):
            assert isinstance(error, Aborted)
            assert (error.by, error.reason) == (1, "out of luck")


@pytest.mark.parametrize("link", LINKS)
async def test_an_exception_between_operations_reaches_the_others(link: Any) -> None:
    async def rank(comm: Communicator) -> Any:
        async with comm:
            await comm.barrier()
            if comm.rank == 2:
                raise KeyError("no such galaxy")
            return await outcome(comm.barrier())

    results = await run_ranks(3, rank, link, return_exceptions=True)
    assert isinstance(results[2], KeyError)
    for error in results[:2]:
        assert isinstance(error, Aborted)
        assert error.by == 2
        assert "KeyError: 'no such galaxy'" in error.reason


async def test_an_operation_that_raises_or_is_cancelled_does_not_leave_the_others_waiting() -> None:
    def ratio(left: int, right: int) -> int:
        return left // right

    async def dividing(comm: Communicator) -> Any:
        return await comm.reduce(0 if comm.rank == 3 else 1, ratio)

    results = await run_ranks(4, dividing, return_exceptions=True)
    assert isinstance(results[2], ZeroDivisionError)
    assert all(
        isinstance(error, Aborted) and error.by == 2 for error in results if error is not results[2]
    )

    over = asyncio.Event()

    async def cancelled(comm: Communicator) -> Any:
        if comm.rank == 0:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(comm.barrier(), 0.01)
            over.set()
            return None
        if comm.rank == 1:
            await over.wait()  # the barrier must not end before it is cancelled
        return await outcome(comm.barrier())

    assert all(isinstance(e, Aborted) and e.by == 0 for e in (await run_ranks(3, cancelled))[1:])


@pytest.mark.parametrize("name", COLLECTIVES)
async def test_every_collective_survives_the_death_of_a_rank(name: str) -> None:
    """In memory: rank 2 of 5 vanishes; whoever still waits learns that it was rank 2."""
    worlds = memory_world(5, timeout=5)
    tasks = [
        asyncio.ensure_future(outcome(COLLECTIVES[name](comm))) for comm in worlds if comm.rank != 2
    ]
    await asyncio.sleep(0)
    worlds[2]._endpoint.die()  # type: ignore[attr-defined]
    results = await asyncio.gather(*tasks)
    failed = [error for error in results if isinstance(error, RankFailed)]
    assert all(error.rank == 2 for error in failed)
    assert len(failed) == 4 if name in AGREEING else failed
    for comm in worlds:
        if comm.rank != 2:
            assert isinstance(await outcome(comm.barrier()), RankFailed)


@pytest.mark.parametrize("link", LINKS)
async def test_a_rank_that_left_is_named_when_it_is_needed(link: Any) -> None:
    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 1:
            await comm.close()
            return None
        return await outcome(comm.allreduce(1, timeout=5))

    results = await run_ranks(3, rank, link)
    for error in (results[0], results[2]):
        assert isinstance(error, RankFailed)
        assert "left" in str(error)


@pytest.mark.parametrize("link", LINKS)
async def test_all_name_the_same_missing_ranks(link: Any) -> None:
    """Not only those that waited for them directly, and whatever their own deadline is."""

    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank in (2, 5):
            return None
        return await outcome(comm.allreduce(np.ones(4), timeout=0.2 + 5 * (comm.rank == 0)))

    results = await run_ranks(7, rank, link)
    for error in results[:2] + results[3:5] + results[6:]:
        assert isinstance(error, CollectiveTimeout)
        assert error.missing == [2, 5]
        assert (error.op, error.seq) == ("allreduce", 1)


@pytest.mark.parametrize("link", LINKS)
async def test_all_name_the_same_rank_that_left(link: Any) -> None:
    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 7:
            await comm.close()
            return None
        return await outcome(comm.allreduce(1))

    errors = (await run_ranks(8, rank, link))[:7]
    assert [(type(error), error.rank) for error in errors] == [(RankFailed, 7)] * 7


@pytest.mark.parametrize("cancel", [False, True], ids=["timeout", "cancelled"])
async def test_a_send_that_was_given_up_is_not_delivered_later(cancel: bool) -> None:
    """The system took part of it: the job ends, rather than that the peer gets a mixture."""

    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 1:
            await asyncio.wait([given_up], timeout=10)
            return await outcome(comm.recv(0))
        data = np.ones(30_000_000, "u1")
        if cancel:
            sending = asyncio.wait_for(comm.send(data, 1), 0.05)
        else:
            sending = comm.send(data, 1, timeout=0.05)
        with pytest.raises(TimeoutError if cancel else CollectiveTimeout):
            await sending
        data[:] = 7
        given_up.set_result(None)
        return await outcome(comm.send(data, 1))

    given_up = asyncio.get_running_loop().create_future()
    results = await run_ranks(2, rank, "tcp")
    assert all(isinstance(error, Aborted) and error.by == 0 for error in results) or not cancel
    assert all(isinstance(error, FmiError) for error in results)


async def test_a_send_that_has_not_begun_is_taken_back_without_harm() -> None:
    async def rank(comm: Communicator) -> Any:
        if comm.rank == 0:
            big = np.ones(30_000_000, "u1")
            first = asyncio.ensure_future(comm.send(big, 1))
            await asyncio.sleep(0)
            with pytest.raises(CollectiveTimeout):
                await comm.send("never", 1, tag=1, timeout=0.05)
            given_up.set_result(None)
            await first
            return await comm.send("later", 1, tag=1)
        await asyncio.wait([given_up], timeout=10)
        return len(await comm.recv(0)), await comm.recv(0, tag=1)

    given_up = asyncio.get_running_loop().create_future()
    assert (await run_ranks(2, rank, "tcp"))[1] == (30_000_000, "later")


async def test_a_receive_that_was_given_up_loses_nothing() -> None:
    """Also when its message had begun to arrive: it is there for the next receive."""

    async def rank(comm: Communicator) -> Any:
        if comm.rank == 0:
            await comm.send(np.arange(5_000_000), 1)
            return await comm.send("second", 1)
        out = np.zeros(5_000_000, int)
        tries = 0
        while True:
            tries += 1
            try:
                first = await comm.recv(0, out=out, timeout=0.0002)
                break
            except CollectiveTimeout:
                seen = out.copy()
                await asyncio.sleep(0)
                assert (out == seen).all()  # nobody writes there any more
        return tries > 1 and (first == np.arange(5_000_000)).all() and await comm.recv(0)

    assert (await run_ranks(2, rank, "tcp"))[1] == "second"


async def test_ranks_that_all_send_first_are_served() -> None:
    async def rank(comm: Communicator) -> Any:
        right, left = (comm.rank + 1) % 3, (comm.rank - 1) % 3
        await comm.send(np.full(20_000_000, comm.rank, "u1"), right)
        return int((await comm.recv(left)).max())

    assert await run_ranks(3, rank, "tcp") == [2, 0, 1]


@pytest.mark.parametrize("link", LINKS)
async def test_after_close_everything_says_so(link: Any) -> None:
    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        waiting = asyncio.ensure_future(outcome(comm.recv(1 - comm.rank)))
        await asyncio.sleep(0)
        await comm.close()
        await comm.close()
        return [await waiting, await outcome(comm.barrier()), await outcome(comm.send(1, 1))]

    for errors in await run_ranks(2, rank, link):
        assert all("closed" in str(e) or "left" in str(e) for e in errors)


async def test_closing_a_group_leaves_the_job_alone() -> None:
    async def rank(comm: Communicator) -> Any:
        async with await comm.split(comm.rank % 2) as half:
            await half.barrier()
        await half.close()
        return await comm.allreduce(1)

    assert await run_ranks(4, rank, "tcp") == [4] * 4


async def test_abort_may_be_awaited() -> None:
    comm = memory_world(2)[0]
    await comm.abort("x")
    assert isinstance(await outcome(comm.barrier()), Aborted)


async def test_out_that_does_not_fit_is_refused_and_harms_nothing() -> None:
    async def rank(comm: Communicator) -> Any:
        if comm.rank == 0:
            for _ in range(3):
                await comm.send(np.ones(4), 1)
            return None
        frozen = np.zeros(4)
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            await comm.recv(0, out=frozen)
        with pytest.raises(ValueError, match="shape"):
            await comm.recv(0, out=np.zeros(5))
        with pytest.raises(ValueError, match="dtype"):
            await comm.recv(0, out=np.zeros(8, "f4"))
        return (await comm.recv(0, out=np.zeros(4))).sum()

    assert (await run_ranks(2, rank))[1] == 4


@pytest.mark.parametrize("links", LINKS)
async def test_what_cannot_be_read_ends_a_collective_everywhere_and_says_where(
    links: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a rank with a newer torch, whose dtype is none here."""
    pack = movement.pack

    def pack_strangely(obj: object) -> Payload:
        meta = msgpack.packb(["t", "float3", [2]])
        return Payload(meta, [bytes(8)]) if obj == "strange" else pack(obj)

    monkeypatch.setattr(movement, "pack", pack_strangely)

    async def rank(comm: Communicator) -> list[Any]:
        if comm.rank:
            await comm.send("strange", 0)
            gathered = await outcome(comm.gather("strange"))
            return [gathered, await outcome(comm.barrier())]
        return [await outcome(comm.recv(1)), await outcome(comm.gather(0))]

    (lost, unread), (gone, told) = await run_ranks(2, rank, links)
    why = "cannot read the peer's object: torch .* has no dtype 'float3'"
    assert re.fullmatch(rf"\[rank 0, recv\] {why}.*", str(lost))
    assert re.fullmatch(rf"\[rank 0, gather, #0\] {why}.*", str(unread))
    assert gone is None or isinstance(gone, Aborted)
    assert isinstance(told, Aborted)
    assert "float3" in told.reason


def test_errors_can_be_pickled_and_copied_with_all_they_carry() -> None:
    for error in (
        RankFailed("gone", rank=3, op="barrier", seq=7),
        JoinTimeout("few", missing=[2, 1], rank=0),
        CollectiveMismatch(details="x", rank=0, peer=1),
        Aborted(by=2, reason="why"),
    ):
        for twin in (pickle.loads(pickle.dumps(error)), error.fresh()):
            assert type(twin) is type(error)
            assert vars(twin) == vars(error)
            assert str(twin) == str(error)
            assert twin.__traceback__ is None
    assert "rank 3, barrier, #7" in str(RankFailed("gone", rank=3, op="barrier", seq=7))
