"""What operations take: `out=`, which may be the input, and what is refused before it is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fmi_client
from fmi_client.communicator import Communicator, memory_world
from tests.support import run_ranks


async def test_out_of_every_array_taking_method() -> None:
    size = 3

    async def rank(comm: Communicator) -> None:
        r = comm.rank
        a = np.arange(6.0) + r
        out = np.zeros(6)
        assert await comm.bcast(a, 1, out=out) is out
        assert (out == np.arange(6.0) + 1).all()
        assert await comm.scatter([a] * 3 if r == 0 else None, out=out) is out
        assert (out == np.arange(6.0)).all()
        table = np.zeros((size, 6))
        await comm.allgather(a, out=table)
        assert (table == np.arange(6.0) + np.arange(3)[:, None]).all()
        table[:] = 0
        await comm.gather(a, out=table)
        assert table.any() == (r == 0)
        await comm.alltoall([a] * size, out=table)
        assert (table[2] == np.arange(6.0) + 2).all()
        part = np.zeros(2)
        assert await comm.reduce_scatter(a, out=part) is part
        assert (part == 3 * np.arange(6.0)[2 * r : 2 * r + 2] + 3).all()
        assert await comm.sendrecv(a, (r + 1) % 3, (r - 1) % 3, out=out) is out
        assert (out == np.arange(6.0) + (r - 1) % 3).all()
        with pytest.raises(ValueError, match="out= has dtype"):
            comm.allreduce(a, out=np.zeros(5))
        with pytest.raises(TypeError, match="out="):
            comm.allreduce(1.0, out=a)

    await run_ranks(size, rank)


IN_PLACE: dict[str, Any] = {
    "bcast": lambda comm, mine: comm.bcast(mine, 1, out=mine),
    "reduce": lambda comm, mine: comm.reduce(mine, root=1, out=mine),
    "allreduce": lambda comm, mine: comm.allreduce(mine, out=mine),
    "scan": lambda comm, mine: comm.scan(mine, out=mine),
    "exscan": lambda comm, mine: comm.exscan(mine, out=mine),
    "alltoall": lambda comm, mine: comm.alltoall(mine, out=mine),
    "allgather": lambda comm, mine: comm.allgather(mine[comm.rank], out=mine),
    "gather": lambda comm, mine: comm.gather(mine[comm.rank], 1, out=mine),
    "scatter": lambda comm, mine: comm.scatter(mine, 1, out=mine[comm.rank]),
    "sendrecv": lambda comm, mine: comm.sendrecv(
        mine, (comm.rank + 1) % 3, (comm.rank - 1) % 3, out=mine
    ),
}


def in_place(method: str, rank: int, inputs: Any) -> Any:
    """What `rank` of three has afterwards; `inputs` are three rows of each rank."""
    mine, diagonal = inputs[rank].copy(), [inputs[other][other] for other in range(3)]
    match method:
        case "bcast":
            return inputs[1]
        case "reduce":
            return inputs.sum(0) if rank == 1 else mine
        case "allreduce":
            return inputs.sum(0)
        case "scan":
            return inputs[: rank + 1].sum(0)
        case "exscan":
            return inputs[:rank].sum(0) if rank else mine
        case "alltoall":
            return inputs[:, rank]
        case "allgather":
            return diagonal
        case "gather":
            return diagonal if rank == 1 else mine
        case "scatter":
            mine[rank] = inputs[1][rank]
            return mine
    return inputs[rank - 1]


@pytest.mark.parametrize("links", ["memory", "tcp"])
@pytest.mark.parametrize("columns", [1, 60_000])
@pytest.mark.parametrize("method", IN_PLACE)
async def test_out_may_be_the_input(method: str, columns: int, links: str) -> None:
    inputs = np.random.default_rng(0).integers(0, 9, (3, 3, columns)).astype(float)

    async def work(comm: Communicator) -> None:
        mine = inputs[comm.rank].copy()
        await IN_PLACE[method](comm, mine)
        assert np.array_equal(mine, in_place(method, comm.rank, inputs))

    await run_ranks(3, work, links)


@pytest.mark.parametrize("count", [1, 1_000_000])
async def test_sendrecv_may_receive_into_what_it_sends(count: int) -> None:
    async def work(comm: Communicator) -> None:
        both = np.zeros(count + 1)
        mine = both[:count]
        mine[:] = comm.rank
        assert await comm.sendrecv(mine, 1 - comm.rank, out=mine) is mine
        assert (mine == 1 - comm.rank).all()
        await comm.sendrecv(mine, 1 - comm.rank, out=both[1:])  # a part of it, too
        assert (both[1:] == comm.rank).all()

    await run_ranks(2, work)


@pytest.mark.parametrize("method", ["allreduce", "reduce", "scan", "exscan"])
async def test_out_may_overlap_the_input(method: str) -> None:
    """Large enough to be reduced in parts, of which some are read after others are written."""

    async def work(comm: Communicator) -> Any:
        both = np.arange(200_000.0)
        wanted = await getattr(comm, method)(both[:-1].copy())
        await getattr(comm, method)(both[:-1], out=both[1:])
        return wanted is None or np.array_equal(both[1:], wanted)

    assert all(await run_ranks(3, work))


FROZEN = np.zeros(2)
FROZEN.flags.writeable = False


@pytest.mark.parametrize(
    ("operation", "arguments", "options", "text"),
    [
        ("gather", [FROZEN], {"out": np.zeros((3, 2))}, "room for 3 items, not .* of 2 ranks"),
        ("allgather", [FROZEN], {"out": [np.zeros(2)]}, "room for 1 items"),
        ("alltoall", [[FROZEN] * 2], {"out": np.zeros(())}, "room for 0 items"),
        ("allgather", [FROZEN], {"out": "room"}, "not str"),
        ("allgather", [FROZEN], {"out": ["room", "room"]}, "not str"),
        ("allgather", [FROZEN], {"out": [FROZEN, FROZEN]}, "read-only"),
        ("scatter", [[FROZEN] * 2], {"out": FROZEN}, "read-only"),
        ("bcast", [FROZEN], {"out": [0, 0]}, "not list"),
        ("scatter", [7], {}, "a list of 2 items, one a rank, not int"),
        ("alltoall", [None], {}, "not None"),
        ("recv", [1], {"out": [0, 0]}, "not list"),
        ("allreduce", [1], {"algorithm": "ring"}, "commutative operations only"),
        ("allreduce", [FROZEN], {"algorithm": "rign"}, "none of doubling, halving, ring"),
        ("barrier", [], {"timeout": -1}, "timeout=-1 is not a number of seconds"),
        ("barrier", [], {"timeout": "5"}, "timeout='5' is not a number of seconds"),
        ("split", ["red"], {}, "color='red', key=0: split needs integers"),
        ("allreduce", [np.zeros(2, "M8[s]")], {}, r"sum is not defined for arrays of datetime64"),
    ],
)
async def test_a_wrong_argument_is_said_before_anything_is_sent(
    operation: str, arguments: list[Any], options: dict[str, Any], text: str
) -> None:
    """The job goes on, as the call took no number."""

    async def work(comm: Communicator) -> Any:
        if comm.rank == 0:
            with pytest.raises((TypeError, ValueError), match=text):
                await getattr(comm, operation)(*arguments, **options)
        return await comm.allreduce(1)

    assert await run_ranks(2, work) == [2, 2]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("bcast", (1, 2)),
        ("gather", (1, -1)),
        ("send", (1, 9)),
        ("recv", (2,)),
        ("scatter", ([1],)),
        ("alltoall", ([1, 2, 3],)),
        ("send", (1, 0, -1)),
    ],
)
def test_wrong_arguments_are_refused_here(method: str, arguments: tuple[Any, ...]) -> None:
    comm = memory_world(2)[0]
    with pytest.raises(ValueError, match=r"rank|items|tag"):
        getattr(comm, method)(*arguments)


def test_undefined_operations_are_refused_before_anybody_waits() -> None:
    comm = memory_world(2)[0]
    for obj, op in [(np.zeros(3), fmi_client.BAND), (object(), fmi_client.SUM), (1, "sum")]:
        with pytest.raises(TypeError):
            comm.allreduce(obj, op)
    with pytest.raises(TypeError, match="pickle"):
        comm.send(np.array([object()]), 1)
    with pytest.raises(TypeError, match="at least one axis"):
        comm.reduce_scatter(3)
