"""Every collective against what numpy says, for many sizes, dtypes, shapes, ops and roots."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fmi_client
from fmi_client import collectives
from fmi_client.communicator import Communicator
from tests.support import run_ranks

sizes = st.integers(1, 17)
shapes = st.one_of(
    st.just(()),
    st.just((0,)),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 5), st.integers(0, 7)),
)
dtypes = st.sampled_from(["f4", "f8", "i1", "i8", "u2", "c16", "?", ">f8", "f2"])
arithmetic = st.sampled_from([fmi_client.SUM, fmi_client.PROD, fmi_client.MIN, fmi_client.MAX])
quick = settings(max_examples=40)


def make(rank: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Return an array of small integers: sums of them are exact in every dtype."""
    return np.random.default_rng(rank).integers(0, 3, shape).astype(dtype)


def run(size: int, function: Any) -> list[Any]:
    return asyncio.run(run_ranks(size, function))


def same_bits(left: Any, right: Any) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.tobytes() == right.tobytes()
    )


def expected(op: fmi_client.Op, arrays: list[Any]) -> Any:
    def combine(a: Any, b: Any) -> Any:
        out = np.empty_like(a)
        op.array(a, b, out)
        return out

    return functools.reduce(combine, arrays)


@quick
@given(sizes)
def test_barrier_waits_for_the_last(size: int) -> None:
    arrived = 0

    async def rank(comm: Communicator) -> int:
        nonlocal arrived
        if comm.rank == size - 1:  # everybody else gets as far as it can first
            for _ in range(20):
                await asyncio.sleep(0)
        arrived += 1
        await comm.barrier()
        return arrived

    assert run(size, rank) == [size] * size


@quick
@given(sizes, shapes, dtypes, st.data())
def test_bcast(size: int, shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, size - 1))
    results = run(size, lambda comm: comm.bcast(make(comm.rank, shape, dtype), root))
    assert all(same_bits(got, make(root, shape, dtype)) for got in results)


@quick
@given(sizes, shapes, dtypes, st.data())
def test_gather(size: int, shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, size - 1))
    results = run(size, lambda comm: comm.gather(make(comm.rank, shape, dtype), root))
    assert all(same_bits(got, make(r, shape, dtype)) for r, got in enumerate(results[root]))
    assert len(results[root]) == size
    assert results[:root] + results[root + 1 :] == [None] * (size - 1)


@quick
@given(sizes, shapes, dtypes)
def test_allgather(size: int, shape: tuple[int, ...], dtype: str) -> None:
    for got in run(size, lambda comm: comm.allgather(make(comm.rank, shape, dtype))):
        assert len(got) == size
        assert all(same_bits(each, make(r, shape, dtype)) for r, each in enumerate(got))


@quick
@given(sizes, shapes, dtypes, st.data())
def test_scatter(size: int, shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, size - 1))

    async def rank(comm: Communicator) -> Any:
        items = [make(r, shape, dtype) for r in range(size)] if comm.rank == root else None
        return await comm.scatter(items, root)

    assert all(same_bits(got, make(r, shape, dtype)) for r, got in enumerate(run(size, rank)))


@quick
@given(sizes, shapes, dtypes)
def test_alltoall(size: int, shape: tuple[int, ...], dtype: str) -> None:
    def item(source: int, dest: int) -> Any:
        return make(1000 * source + dest, shape, dtype)

    results = run(size, lambda comm: comm.alltoall([item(comm.rank, d) for d in range(size)]))
    for dest, got in enumerate(results):
        assert all(same_bits(each, item(source, dest)) for source, each in enumerate(got))


@quick
@given(sizes, shapes, dtypes, arithmetic)
def test_allreduce(size: int, shape: tuple[int, ...], dtype: str, op: fmi_client.Op) -> None:
    want = expected(op, [make(r, shape, dtype) for r in range(size)])
    results = run(size, lambda comm: comm.allreduce(make(comm.rank, shape, dtype), op))
    assert all(same_bits(got, want) for got in results)


@quick
@given(sizes, shapes, dtypes, arithmetic, st.data())
def test_reduce(
    size: int, shape: tuple[int, ...], dtype: str, op: fmi_client.Op, data: st.DataObject
) -> None:
    root = data.draw(st.integers(0, size - 1))
    want = expected(op, [make(r, shape, dtype) for r in range(size)])
    results = run(size, lambda comm: comm.reduce(make(comm.rank, shape, dtype), op, root))
    assert same_bits(results.pop(root), want)
    assert results == [None] * (size - 1)


@quick
@given(sizes, st.integers(0, 40), st.integers(0, 3), dtypes, arithmetic)
def test_reduce_scatter(size: int, rows: int, columns: int, dtype: str, op: fmi_client.Op) -> None:
    shape = (rows, columns)
    want = np.array_split(expected(op, [make(r, shape, dtype) for r in range(size)]), size)
    results = run(size, lambda comm: comm.reduce_scatter(make(comm.rank, shape, dtype), op))
    assert all(same_bits(got, part) for got, part in zip(results, want, strict=True))


@quick
@given(sizes, shapes, dtypes, arithmetic)
def test_scan_and_exscan(size: int, shape: tuple[int, ...], dtype: str, op: fmi_client.Op) -> None:
    arrays = [make(r, shape, dtype) for r in range(size)]
    inclusive = run(size, lambda comm: comm.scan(arrays[comm.rank], op))
    exclusive = run(size, lambda comm: comm.exscan(arrays[comm.rank], op))
    assert all(same_bits(got, expected(op, arrays[: r + 1])) for r, got in enumerate(inclusive))
    assert exclusive[0] is None
    assert all(same_bits(exclusive[r], expected(op, arrays[:r])) for r in range(1, size))


@quick
@given(sizes, st.sampled_from(["allreduce", "reduce", "scan", "exscan"]), st.data())
def test_order_of_ranks_is_kept_for_operations_that_do_not_commute(
    size: int, method: str, data: st.DataObject
) -> None:
    root = data.draw(st.integers(0, size - 1))
    words = [chr(97 + r) for r in range(size)]
    arguments = {"root": root} if method == "reduce" else {}
    joined = fmi_client.custom(lambda a, b: a + b)
    results = run(size, lambda comm: getattr(comm, method)(words[comm.rank], joined, **arguments))
    for r, got in enumerate(results):
        want = {
            "allreduce": "".join(words),
            "reduce": "".join(words) if r == root else None,
            "scan": "".join(words[: r + 1]),
            "exscan": "".join(words[:r]) or None,
        }[method]
        assert got == want


@quick
@given(sizes, st.integers(0, 3))
def test_order_is_kept_for_matrices(size: int, extra: int) -> None:
    rng = np.random.default_rng(size)
    matrices = [rng.integers(-2, 3, (2, 2)) for _ in range(size)]
    want = functools.reduce(np.matmul, matrices)
    product = fmi_client.custom(np.matmul)
    for got in run(size, lambda comm: comm.allreduce(matrices[comm.rank], product)):
        assert (got == want).all()


@pytest.mark.parametrize("link", ["memory", "tcp"])
@pytest.mark.parametrize("length", [10, collectives.DIRECT_BYTES + 1])
async def test_gathered_items_land_in_their_places(link: Any, length: int) -> None:
    size = 5

    async def rank(comm: Communicator) -> Any:
        mine = np.full(length, comm.rank, "u1")
        out = np.zeros((size, length), "u1")
        got = await comm.gather(mine, root=1, out=out)
        assert (got is None) is (comm.rank != 1)
        return out

    for r, out in enumerate(await run_ranks(size, rank, link)):
        assert (out == (np.arange(size)[:, None] if r == 1 else 0)).all()


async def test_a_place_that_does_not_fit_is_said() -> None:
    async def rank(comm: Communicator) -> None:
        out = [np.zeros(100_000, "u1"), np.zeros(7, "u1")] if comm.rank == 0 else None
        await comm.gather(np.zeros(100_000, "u1"), out=out)

    with pytest.raises(ValueError, match="7"):
        await run_ranks(2, rank)


@pytest.mark.parametrize("link", ["memory", "tcp"])
async def test_large_items_of_uneven_sizes(link: Any) -> None:
    """Items above and below the thresholds for trees, bundles and segments, mixed."""
    size = 5
    lengths = [0, 3_000_000, 10, collectives.DIRECT_BYTES, 70_001]
    items = [np.arange(n, dtype="u1") for n in lengths]

    async def rank(comm: Communicator) -> list[Any]:
        got = [await comm.gather(items[comm.rank], root) for root in range(size)][comm.rank]
        got += [await comm.scatter(items, root) for root in range(size)]
        got += await comm.allgather(items[comm.rank])
        got += await comm.alltoall(items)
        got += [await comm.bcast(items[root], root) for root in range(size)]
        return got

    for r, got in enumerate(await run_ranks(size, rank, link)):
        want = [*items, *[items[r]] * size, *items, *[items[r]] * size, *items]
        assert [len(each) for each in got] == [len(each) for each in want]
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("op", "want"),
    [
        (fmi_client.LAND, [0, 0, 1]),
        (fmi_client.LOR, [0, 1, 1]),
        (fmi_client.BAND, [0, 0, 5]),
        (fmi_client.BOR, [0, 4, 7]),
    ],
)
async def test_logical_and_bitwise(op: fmi_client.Op, want: list[int]) -> None:
    values = [np.array([0, 4, 5]), np.array([0, 0, 7])]
    for got in await run_ranks(2, lambda comm: comm.allreduce(values[comm.rank], op)):
        assert got.tolist() == want


PAIR = np.dtype([("value", "f8"), ("rank", "i8")])


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("length", [3, 20_000], ids=["doubling", "ring"])
async def test_where_the_lowest_and_the_highest_are(size: int, length: int) -> None:
    values = np.random.default_rng(size).integers(0, 4, (size, length)).astype("f8")
    values[size - 1, 1] = np.nan

    async def rank(comm: Communicator) -> tuple[Any, Any]:
        mine = np.zeros(length, PAIR)
        mine["value"], mine["rank"] = values[comm.rank], comm.rank
        lowest = await comm.allreduce(mine, fmi_client.MINLOC)
        await comm.allreduce(mine, fmi_client.MAXLOC, out=mine)
        return lowest, mine

    for lowest, highest in await run_ranks(size, rank):
        assert (lowest["rank"] == values.argmin(0)).all()
        assert (highest["rank"] == values.argmax(0)).all()
        assert np.isnan([lowest["value"][1], highest["value"][1]]).all()
        assert (lowest["value"][2:] == values.min(0)[2:]).all()
        assert (highest["value"][2:] == values.max(0)[2:]).all()


async def test_where_the_lowest_is_among_tuples() -> None:
    async def rank(comm: Communicator) -> list[Any]:
        pair = (abs(comm.rank - 2), comm.rank)
        return [await comm.allreduce(pair, op) for op in (fmi_client.MINLOC, fmi_client.MAXLOC)]

    assert await run_ranks(5, rank) == [[(0, 2), (2, 0)]] * 5
    with pytest.raises(TypeError, match="two fields"):
        await run_ranks(1, lambda comm: comm.allreduce(np.zeros(3), fmi_client.MINLOC))


async def test_python_values_are_reduced_by_pythons_operators() -> None:
    big = 2**80

    async def rank(comm: Communicator) -> list[Any]:
        return [
            await comm.allreduce(big + comm.rank),
            await comm.allreduce(0.5),
            await comm.allreduce([comm.rank]),
            await comm.allreduce(comm.rank, fmi_client.MAX),
            await comm.allreduce(comm.rank == 1, fmi_client.LOR),
            await comm.allreduce(1j),
            await comm.allreduce(comm.rank, lambda a, b: 10 * a + b),
        ]

    for got in await run_ranks(3, rank):
        assert got == [3 * big + 3, 1.5, [0, 1, 2], 2, True, 3j, 12]


@quick
@given(sizes, st.integers(0, 2))
def test_input_is_never_modified_and_out_may_be_the_input(size: int, layout: int) -> None:
    def view(rank: int) -> Any:
        base = make(rank, (6, 8), "i8")
        return [base, base.T, base[::2, ::3]][layout]

    want = expected(fmi_client.SUM, [view(r) for r in range(size)])

    async def rank(comm: Communicator) -> None:
        mine, other = view(comm.rank), np.empty_like(view(comm.rank))
        for method in ("allreduce", "scan", "exscan", "reduce", "reduce_scatter"):
            await getattr(comm, method)(mine)
            assert (mine == view(comm.rank)).all(), method
        assert await comm.allreduce(mine, out=other) is other
        assert (other == want).all()
        before = await comm.exscan(mine)
        kept = mine.copy()
        got = await comm.exscan(kept, out=kept)
        assert comm.rank == 0 or (got is kept and (kept == before).all())
        assert await comm.allreduce(mine, out=mine) is mine
        assert (mine == want).all()

    run(size, rank)


async def test_split_makes_groups_that_do_not_hear_each_other() -> None:
    async def rank(comm: Communicator) -> Any:
        half = await comm.split(comm.rank % 2, key=-comm.rank)
        none = await comm.split(None if comm.rank else 1)
        assert (none is None) == (comm.rank > 0)
        members = await half.allgather(comm.rank)
        assert list(half.group) == members
        both = await asyncio.gather(half.allreduce(comm.rank), comm.allreduce(comm.rank))
        quarter = await half.split(half.rank // 2)
        return [half.rank, half.size, members, both, await quarter.allgather(comm.rank)]

    results = await run_ranks(7, rank)
    assert results[0] == [3, 4, [6, 4, 2, 0], [12, 21], [2, 0]]
    assert results[5] == [0, 3, [5, 3, 1], [9, 21], [5, 3]]


async def test_point_to_point_keeps_order_within_a_tag_and_matches_by_tag() -> None:
    async def rank(comm: Communicator) -> Any:
        if comm.rank == 0:
            for i in range(3):
                await comm.send(i, 1, tag=7)
                await comm.send(f"other {i}", 1, tag=8)
            await comm.send(np.arange(4), 0)
            return (await comm.recv(0)).tolist()
        late = [await comm.recv(0, tag=8) for _ in range(3)]
        return late + [await comm.recv(0, tag=7) for _ in range(3)]

    assert await run_ranks(2, rank) == [
        [0, 1, 2, 3],
        ["other 0", "other 1", "other 2", 0, 1, 2],
    ]


async def test_many_collectives_may_be_under_way_at_once() -> None:
    async def rank(comm: Communicator) -> list[int]:
        return list(await asyncio.gather(*(comm.allreduce(i * comm.rank) for i in range(50))))

    assert await run_ranks(5, rank) == [[10 * i for i in range(50)]] * 5


async def test_messages_per_rank_grow_with_the_logarithm() -> None:
    counts = {}
    for size in (8, 64):

        async def rank(comm: Communicator) -> int:
            await comm.barrier()
            await comm.allreduce(1.0)
            return sum(each["messages_received"] for each in comm.stats()["links"].values())

        counts[size] = max(await run_ranks(size, rank))
    assert counts == {8: 2 * 3, 64: 2 * 6}


async def test_seconds_in_collectives_are_counted_with_the_waiting() -> None:
    async def rank(comm: Communicator) -> list[float]:
        seen = []
        for operation in (comm.barrier, lambda: comm.sendrecv(1, 1 - comm.rank)):
            await asyncio.sleep(0.2 * comm.rank)  # rank 0 waits
            await operation()
            seen.append(comm.stats()["collective_seconds"])
        return seen

    (waited, after), (brief, _) = await run_ranks(2, rank)
    assert waited >= 0.15
    assert brief > 0
    assert after == waited, "sendrecv is no collective"
