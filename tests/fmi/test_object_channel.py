"""Ranks that meet in a store: the same operations and errors, without any server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fmi_client
from fmi_client import sync
from fmi_client.communicator import Communicator
from fmi_client.errors import (
    Aborted,
    AuthenticationFailed,
    CollectiveMismatch,
    CollectiveTimeout,
    JoinTimeout,
    ProtocolError,
    RankFailed,
)
from fmi_client.payloads import allocate
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.objects import Scheme
from fmi_client.protocol.peer import POINT_TO_POINT, Buffer
from fmi_client.protocol.transfers import Receive
from fmi_client.transport import objects
from fmi_client.transport.objects import ObjectLink
from fmi_client.transport.store import FolderStore
from tests.fmi import everything
from tests.fmi.test_collectives import same_bits
from tests.fmi.test_failures import outcome
from tests.processes import run_processes
from tests.support import KEY, RankFunction, until


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return f"s3://bucket/{tmp_path.name}"
    return str(tmp_path / "store")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def the_run(folder: Path) -> Path:
    """Return where the one run's messages are."""
    (go,) = folder.rglob("go")
    return go.parent


async def join(store: Any, rank: int, size: int, **more: Any) -> Communicator:
    arguments: dict[str, Any] = {"job": "job", "key": KEY, "timeout": 10} | more
    return await fmi_client.connect(
        None, rank=rank, size=size, channel="object", store=str(store), **arguments
    )


async def run(store: Any, size: int, function: RankFunction, **more: Any) -> list[Any]:
    """Run `function(comm)` as each rank; returns results or errors."""

    async def rank(r: int) -> Any:
        async with await join(store, r, size, **more) as comm:
            return await function(comm)

    return await asyncio.gather(*map(rank, range(size)), return_exceptions=True)


async def crash(comm: Communicator) -> None:
    """Vanish without a word."""
    comm._endpoint._depot.close()  # type: ignore[attr-defined]


# --------------------------------------------------------------------------- what works
# S3 is slow, and ranks of other numbers ask it for nothing else.
@pytest.mark.parametrize(
    ("store", "size"), [("folder", 2), ("folder", 3), ("folder", 4), ("s3", 3)], indirect=["store"]
)
async def test_every_collective_awaited(store: str, size: int) -> None:
    results = await run(store, size, everything.awaited)
    assert results == [everything.expected(rank, size, "object") for rank in range(size)]


@pytest.mark.parametrize(
    ("store", "size"), [("folder", 3), ("folder", 4), ("s3", 3)], indirect=["store"]
)
def test_every_collective_blocking(store: str, size: int) -> None:
    results = run_processes(None, size, everything.blocking, channel="object", store=store)
    assert results == [everything.expected(rank, size, "object") for rank in range(size)]


def test_nothing_is_left_in_the_store(tmp_path: Path) -> None:
    results = asyncio.run(run(tmp_path, 3, everything.awaited))
    assert results == [everything.expected(rank, 3, "object") for rank in range(3)]
    assert list(tmp_path.iterdir()) == []
    with sync.connect(
        None, job="one", rank=0, size=1, channel="object", store=str(tmp_path)
    ) as comm:
        assert comm.allreduce(3) == comm.sendrecv(3, 0) == 3
    assert list(tmp_path.iterdir()) == []


async def test_large_messages_are_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(objects, "OBJECT_BYTES", 1000)
    array = np.random.default_rng(0).normal(size=(7, 311))
    largest = 0
    put = FolderStore.put

    def measured(self: FolderStore, name: str, parts: Sequence[Buffer]) -> None:
        nonlocal largest
        largest = max(largest, sum(map(len, parts)))
        put(self, name, parts)

    monkeypatch.setattr(FolderStore, "put", measured)
    results = await run(tmp_path, 2, lambda comm: comm.bcast(array if comm.rank == 0 else None))
    assert all(same_bits(got, array) for got in results)
    assert largest == 1000 + objects.SEAL_BYTES


async def test_many_operations_at_once_and_messages_that_wait(tmp_path: Path) -> None:
    async def rank(comm: Communicator) -> Any:
        if comm.rank == 0:
            for i in range(3):
                await comm.send(i, 1, tag=7)
                await comm.send(f"other {i}", 1, tag=8)
        else:
            assert [await comm.recv(0, tag=8) for _ in range(3)] == [
                "other 0",
                "other 1",
                "other 2",
            ]
            assert [await comm.recv(0, tag=7) for _ in range(3)] == [0, 1, 2]
        return await asyncio.gather(*(comm.allreduce(i) for i in range(20)))

    assert await run(tmp_path, 2, rank) == [[2 * i for i in range(20)]] * 2


async def test_jobs_and_epochs_in_one_place_do_not_hear_each_other(tmp_path: Path) -> None:
    jobs = [("a", 0), ("b", 0), ("a", 1), ("a/../b", 0), ("\N{GREEK SMALL LETTER PHI}" * 256, 0)]
    results = await asyncio.gather(
        *(
            run(tmp_path, 2, lambda comm, i=i: comm.allreduce(10**i), job=job, epoch=epoch)
            for i, (job, epoch) in enumerate(jobs)
        )
    )
    assert results == [[2 * 10**i] * 2 for i in range(5)]


async def test_who_leaves_is_still_heard_and_then_named(tmp_path: Path) -> None:
    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 0:
            await comm.send(np.arange(5), 1)
            return None
        await until(lambda: any(name.endswith("0-left") for name in files(tmp_path)))
        got = await comm.recv(0)
        return got.tolist(), await outcome(comm.recv(0))

    [_, (got, error)] = await run(tmp_path, 2, rank)
    assert got == list(range(5))
    assert isinstance(error, RankFailed)
    assert (error.rank, error.op) == (0, "recv")


async def test_who_has_left_is_named_also_by_who_never_spoke_with_it(tmp_path: Path) -> None:
    over = asyncio.Event()

    async def rank(comm: Communicator) -> Any:
        if comm.rank == 1:
            await until(lambda: any(name.endswith("0-left") for name in files(tmp_path)))
            await outcome(comm.recv(2, timeout=0.6))  # hears of it here
            error = await outcome(comm.recv(0, timeout=3))
            over.set()
            return error
        return await over.wait() if comm.rank == 2 else None

    error = (await run(tmp_path, 3, rank))[1]
    assert isinstance(error, RankFailed)
    assert error.rank == 0


async def test_what_was_put_before_a_goodbye_is_looked_for_after_it() -> None:
    """A look that began before the goodbye proves nothing: the message may have come since."""

    class Depot:
        asked: list[Any] = []  # noqa: RUF012

        def get(self, name: str, then: Any) -> None:
            self.asked.append(then)

        def later(self, seconds: float, call: Any) -> None:
            call()

    link = ObjectLink(0, Depot(), "1-0", "0-1", Inbox(allocate), lambda: None)  # type: ignore[arg-type]
    receive = Receive((POINT_TO_POINT, 0, 0), b"", None)
    link.post(receive)
    link.gone = RankFailed("rank 0 has left", rank=0)
    Depot.asked.pop()(None, None)
    assert not receive.done
    Depot.asked.pop()(None, None)
    assert receive.error is link.gone


async def test_what_was_read_is_deleted(tmp_path: Path) -> None:
    async def rank(comm: Communicator) -> None:
        await comm.allreduce(1)
        await until(lambda: not any(name[-5:] in ("0-1/0", "1-0/0") for name in files(tmp_path)))
        await comm.barrier()

    assert await run(tmp_path, 2, rank) == [None, None]


# -------------------------------------------------------------------------- who is missing
@pytest.mark.parametrize(
    ("store", "missing"), [("folder", 0), ("folder", 2), ("s3", 2)], indirect=["store"]
)
async def test_who_does_not_join_is_named_by_all_others(store: str, missing: int) -> None:
    others = [rank for rank in range(4) if rank != missing]
    # Rank 0 tidies up when it gives up, and a busy machine may have started it a second earlier;
    # the first to use S3 loads boto3 meanwhile.
    limits = [(8 if store.startswith("s3") else 2) + 2 * (rank == 0) for rank in range(4)]
    errors = await asyncio.gather(
        *(join(store, rank, 4, timeout=limits[rank]) for rank in others), return_exceptions=True
    )
    for rank, error in zip(others, errors, strict=True):
        assert isinstance(error, JoinTimeout), error
        assert (error.missing, error.rank, error.op) == ([missing], rank, "connect")
        assert f"1 of 4 ranks did not join within {limits[rank]} s: {missing}" in str(error)


async def test_who_outwaits_rank_0_is_told_that_it_gave_up(tmp_path: Path) -> None:
    """It has removed what the others could count by: nobody is to be named for that."""
    first, other = await asyncio.gather(
        join(tmp_path, 0, 3, timeout=1), join(tmp_path, 1, 3, timeout=3), return_exceptions=True
    )
    assert isinstance(first, JoinTimeout)
    assert first.missing == [2]
    assert isinstance(other, JoinTimeout)
    assert (other.missing, other.rank, other.op) == ([], 1, "connect")
    assert "rank 0 gave up before the 3 s of this rank were over; its error names" in str(other)
    assert files(tmp_path) == []


def test_the_same_of_blocking_ranks(tmp_path: Path) -> None:
    with pytest.raises(JoinTimeout, match=r"1 of 2 ranks did not join within 0\.1 s: 1"):
        sync.connect(
            None, job="a", rank=0, size=2, timeout=0.1, channel="object", store=str(tmp_path)
        )
    assert files(tmp_path) == []


async def test_what_a_crashed_run_left_is_not_read(tmp_path: Path) -> None:
    """Its ranks' tickets, their answers, and a message of the same place."""
    old = await asyncio.gather(*(join(tmp_path, rank, 3) for rank in range(3)))
    sent = [old[1].send("old", 0), old[2].sendrecv("old", 1)]
    await sent[0]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(sent[1], 0.1)
    for comm in old:
        await crash(comm)
    stale = tmp_path / Scheme("job", 0, 3, KEY).root
    for rank in range(3):  # as if they had crashed while joining
        (stale / Scheme("job", 0, 3, KEY).ticket("", rank, f"{rank:032x}")).touch()

    before = files(tmp_path)
    errors = await asyncio.gather(
        *(join(tmp_path, rank, 3, timeout=0.8) for rank in (0, 1)), return_exceptions=True
    )
    assert [getattr(error, "missing", error) for error in errors] == [[2], [2]]

    async def rank(comm: Communicator) -> Any:
        partner = (comm.rank + 1) % 3
        return await comm.sendrecv(f"from {comm.rank}", partner, (comm.rank - 1) % 3)

    assert await run(tmp_path, 3, rank) == ["from 2", "from 0", "from 1"]
    # The new run's host removes old tickets; old runs' folders are for the bucket's rules.
    assert set(files(tmp_path)) < set(before)
    assert not [name for name in files(tmp_path) if name.count("/") < 3]


@pytest.mark.parametrize(
    "keys", [(KEY, bytes(32)), (KEY, None)], ids=["another key", "keyed against unkeyed"]
)
async def test_ranks_with_another_key_do_not_meet(tmp_path: Path, keys: tuple[Any, Any]) -> None:
    errors = await asyncio.gather(
        *(join(tmp_path, rank, 2, key=keys[rank], timeout=0.5) for rank in range(2)),
        return_exceptions=True,
    )
    for rank, error in enumerate(errors):
        assert isinstance(error, AuthenticationFailed)
        assert (error.rank, error.peer, error.op) == (rank, 1 - rank, "connect")
        assert "same key" in str(error)
        assert KEY.hex() not in str(error)


async def test_an_answer_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    scheme, folder = Scheme("job", 0, 2, KEY), FolderStore(tmp_path)
    joining = asyncio.create_task(outcome(join(tmp_path, 1, 2)))
    await until(lambda: bool(scheme.tickets("", folder.names(scheme.root))))
    (ticket,) = scheme.tickets("", folder.names(scheme.root))
    name, answer = f"{ticket.nonce}.answer", b"../../elsewhere"
    folder.put(f"{scheme.root}/{name}", [scheme.seal(name, [answer]), answer])
    error = await joining
    assert isinstance(error, ProtocolError)
    assert (error.rank, error.op) == (1, "connect")


async def test_nobody_can_show_up_in_anothers_place(tmp_path: Path) -> None:
    """With an old ticket, and the name of the new run's folder: what a stranger can read."""
    scheme, folder = Scheme("job", 0, 2, KEY), FolderStore(tmp_path)
    folder.put(f"{scheme.root}/{scheme.ticket('', 1, '0' * 32)}", [])
    joining = asyncio.create_task(outcome(join(tmp_path, 0, 2, timeout=0.5)))
    answer = f"{scheme.root}/{'0' * 32}.answer"
    await until(lambda: folder.get(answer, 1000) is not None)
    run_folder = (folder.get(answer, 1000) or b"")[-32:].decode()
    folder.put(f"{scheme.root}/{run_folder}/here/1-{'0' * 32}-{'0' * 64}", [])
    error = await joining
    assert isinstance(error, JoinTimeout)
    assert error.missing == [1]


# -------------------------------------------------------------------------- what goes wrong
async def test_abort_and_exceptions_reach_all_that_wait(store: str) -> None:
    async def abort(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 1:
            comm.abort("out of luck")
        return await outcome(comm.allreduce(1)), await outcome(comm.barrier())

    for errors in await run(store, 4, abort):
        for error in errors:
            assert isinstance(error, Aborted)
            assert (error.by, error.reason) == (1, "out of luck")

    async def divide(comm: Communicator) -> Any:
        return 1 // comm.rank + await comm.recv(0)

    zero, *others = await run(store, 3, divide)
    assert isinstance(zero, ZeroDivisionError)
    for error in others:
        assert isinstance(error, Aborted)
        assert (error.by, error.op) == (0, "recv")
        assert "ZeroDivisionError" in error.reason


async def test_a_mismatch_is_raised_on_all_ranks(tmp_path: Path) -> None:
    results = await run(
        tmp_path, 4, lambda comm: outcome(comm.allreduce(np.zeros(3 + comm.rank // 3)))
    )
    for error in results:
        assert isinstance(error, CollectiveMismatch), error
        assert "rank 3 called allreduce(sum, float64 [4])" in error.details


async def test_who_is_silent_is_named_by_all_that_wait(store: str) -> None:
    silent = asyncio.Event()

    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 2:
            await silent.wait()
            return None
        error = await outcome(comm.barrier(timeout=0.3))
        if comm.rank == 0:
            silent.set()
        return error

    results = await run(store, 4, rank)
    assert results.pop(2) is None
    for error in results:
        assert isinstance(error, CollectiveTimeout), error
        assert (error.missing, error.op, error.seq) == ([2], "barrier", 1)


async def test_a_late_receive_does_no_harm(tmp_path: Path) -> None:
    async def rank(comm: Communicator) -> Any:
        if comm.rank == 0:
            with pytest.raises(CollectiveTimeout, match=r"rank 1 within 0\.01 s"):
                await comm.recv(1, timeout=0.01)
        await comm.barrier()
        return await (comm.recv(1) if comm.rank == 0 else comm.send("late", 0))

    assert await run(tmp_path, 2, rank) == ["late", None]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda first, second: first[:-1] + b"x", "is damaged"),
        (lambda first, second: first[:20], "is damaged"),
        (lambda first, second: second, "is damaged"),
        (lambda first, second: bytes(objects.OBJECT_BYTES + 33), "at most"),
    ],
    ids=["changed", "cut", "in another's place", "too large"],
)
async def test_damaged_objects_are_refused(tmp_path: Path, damage: Any, text: str) -> None:
    async def rank(comm: Communicator) -> Any:
        if comm.rank == 1:
            await comm.send("first", 0)
            await comm.send("second", 0)
            return await outcome(comm.barrier())
        await until(lambda: any(name.endswith("1-0/1") for name in files(tmp_path)))
        folder = the_run(tmp_path) / "1-0"
        parts = [(folder / number).read_bytes() for number in "01"]
        (folder / "0").write_bytes(damage(*parts))
        error = await outcome(comm.recv(1))
        await outcome(comm.barrier())
        return error

    error, told = await run(tmp_path, 2, rank)
    assert isinstance(error, ProtocolError)
    assert (error.rank, error.peer, error.op) == (0, 1, "recv")
    assert text in str(error)
    assert isinstance(told, Aborted)
    assert told.by == 0


async def test_forged_and_damaged_events_are_not_heard(tmp_path: Path) -> None:
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))

    async def rank(comm: Communicator) -> Any:
        await comm.barrier()
        if comm.rank == 1:
            run_folder = the_run(tmp_path)
            (run_folder / "events").mkdir()
            for name in ("1-0", "7-0", "0-0", "x", "1-left"):
                (run_folder / "events" / name).write_bytes(bytes(80))
            depot = comm._endpoint._depot  # type: ignore[attr-defined]
            depot.put(f"{run_folder.name}/events/1-5", [b"no event"], lambda *_: None)
            depot.put(f"{run_folder.name}/over", [], lambda *_: None)
            await asyncio.sleep(0.4)  # no event tells that something was not heard
        return await comm.allreduce(1)

    assert await run(tmp_path, 2, rank) == [2, 2]
    assert problems == []
