"""The torch.distributed backend: every operation against torch on the stacked tensors.

Most tests hold all ranks of a job in this process, each with its thread; what torch's global
state has a part in runs in processes (at the end).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import DistBackendError, ReduceOp

from fmi_client.background import Background
from fmi_client.errors import Aborted, CollectiveMismatch, CollectiveTimeout, RankFailed
from fmi_client.torch_backend import FmiProcessGroup
from fmi_client.torch_work import Work

SIZE = 3
Group = FmiProcessGroup
_numbers = itertools.count()


@contextmanager
def joined(address: str, size: int, timeout: float = 15.0) -> Iterator[list[Background]]:
    """All ranks of a job, each on a thread of its own."""
    job = f"torch-{next(_numbers)}"

    def join(rank: int) -> Background:
        return Background(address, job=job, rank=rank, size=size, timeout=timeout)

    with ThreadPoolExecutor(size) as pool:
        members = list(pool.map(join, range(size)))
        try:
            yield members
        finally:
            list(pool.map(Background.close, members))


def group_of(member: Background, ranks: list[int] | None = None, context: int = 7) -> Group:
    comm = member.part(ranks or list(range(member.comm.size)), context)
    return FmiProcessGroup(member, comm, dist.HashStore(), whole=False)


@pytest.fixture(scope="module")
def members(address: str) -> Iterator[list[Background]]:
    with joined(address, SIZE) as ranks:
        yield ranks


@pytest.fixture
def groups(members: list[Background]) -> list[Group]:
    context = 1000 + next(_numbers)
    return [group_of(member, context=context) for member in members]


def everywhere(groups: list[Group], begin: Callable[[Group, int], Work]) -> None:
    """Begin on all ranks, then wait on all."""
    works = [begin(group, rank) for rank, group in enumerate(groups)]
    for work in works:
        assert work.wait()


def values(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (4, 3)) -> list[Tensor]:
    """A small tensor of whole numbers for each rank, of which no two are alike."""
    count = torch.Size(shape).numel()
    return [(torch.arange(count) % 5 + rank).reshape(shape).to(dtype) for rank in range(SIZE)]


def options(kind: Any, **fields: Any) -> Any:
    made = kind()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def folded(inputs: list[Tensor], operation: Any) -> Tensor:
    """What a reduction gives, made by torch alone."""
    stacked = torch.stack(inputs)
    results: dict[Any, Callable[[], Tensor]] = {
        ReduceOp.SUM: lambda: stacked.sum(0),
        ReduceOp.AVG: lambda: stacked.sum(0) / SIZE,
        ReduceOp.PRODUCT: lambda: stacked.prod(0),
        ReduceOp.MIN: lambda: stacked.amin(0),
        ReduceOp.MAX: lambda: stacked.amax(0),
        ReduceOp.BAND: lambda: stacked[0] & stacked[1] & stacked[2],
        ReduceOp.BOR: lambda: stacked[0] | stacked[1] | stacked[2],
        ReduceOp.BXOR: lambda: stacked[0] ^ stacked[1] ^ stacked[2],
    }
    return results[operation]().to(inputs[0].dtype)


OPERATIONS = [ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX]
BITWISE = [ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
]


# ------------------------------------------------------------------------------ reductions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_allreduce(groups: list[Group], operation: Any, dtype: torch.dtype) -> None:
    tensors = values(dtype)
    want = folded(tensors, operation)
    opts = options(dist.AllreduceOptions, reduceOp=operation)
    everywhere(groups, lambda group, rank: group.allreduce([tensors[rank]], opts))
    for tensor in tensors:
        assert torch.equal(tensor, want)


@pytest.mark.parametrize("operation", BITWISE, ids=str)
def test_allreduce_of_bits(groups: list[Group], operation: Any) -> None:
    tensors = values(torch.int32)
    want = folded(tensors, operation)
    opts = options(dist.AllreduceOptions, reduceOp=operation)
    everywhere(groups, lambda group, rank: group.allreduce([tensors[rank]], opts))
    assert all(torch.equal(tensor, want) for tensor in tensors)


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_a_sum_of_what_was_multiplied_before(groups: list[Group], factor: Any) -> None:
    tensors = values()
    want = folded(tensors, ReduceOp.SUM) / 2
    operation = dist._make_nccl_premul_sum(factor)
    opts = options(dist.AllreduceOptions, reduceOp=operation)
    everywhere(groups, lambda group, rank: group.allreduce([tensors[rank]], opts))
    assert all(torch.equal(tensor, want) for tensor in tensors)


def test_a_mean_of_whole_numbers_is_rounded_towards_zero(groups: list[Group]) -> None:
    tensors = [torch.tensor([-4, 4]) for _ in range(SIZE)]
    tensors[0] -= torch.tensor([1, -1])  # -13 and 13 thirds
    opts = options(dist.AllreduceOptions, reduceOp=ReduceOp.AVG)
    everywhere(groups, lambda group, rank: group.allreduce([tensors[rank]], opts))
    assert all(tensor.tolist() == [-4, 4] for tensor in tensors)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex32], ids=str)
def test_complex_numbers_are_added_as_such(groups: list[Group], dtype: torch.dtype) -> None:
    tensors = [torch.full((3,), complex(rank, 1), dtype=dtype) for rank in range(SIZE)]
    everywhere(groups, lambda group, rank: group.allreduce([tensors[rank]]))
    assert all(tensor.tolist() == [3 + 3j] * 3 for tensor in tensors)


def strided(tensor: Tensor) -> Tensor:
    """The same values, as every second column of a larger tensor's transpose."""
    room = torch.full((2 * tensor.shape[1], tensor.shape[0]), -1).to(tensor.dtype).t()
    view = room[:, ::2]
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view


def test_allreduce_of_tensors_in_any_layout(groups: list[Group]) -> None:
    tensors = values()
    want = folded(tensors, ReduceOp.SUM)
    places = [strided(tensors[0]), tensors[1].t().contiguous().t(), tensors[2]]
    everywhere(groups, lambda group, rank: group.allreduce([places[rank]]))
    assert all(torch.equal(place, want) for place in places)


@pytest.mark.parametrize("operation", [ReduceOp.SUM, ReduceOp.AVG], ids=str)
def test_allreduce_of_sparse_tensors(groups: list[Group], operation: Any) -> None:
    tensors = [torch.diag(torch.tensor([1.0 + rank, 0.0, rank])).to_sparse() for rank in range(3)]
    want = folded([tensor.to_dense() for tensor in tensors], operation)
    opts = options(dist.AllreduceOptions, reduceOp=operation)
    everywhere(groups, lambda group, rank: group.allreduce([tensors[rank]], opts))
    assert all(torch.equal(tensor.to_dense(), want) for tensor in tensors)


def test_several_tensors_in_one_allreduce(groups: list[Group]) -> None:
    tensors = [[torch.full((2,), rank), torch.full((3, 3), 10 * rank)] for rank in range(SIZE)]
    opts = dist.AllreduceCoalescedOptions()
    everywhere(groups, lambda group, rank: group.allreduce_coalesced(tensors[rank], opts))
    assert all(a.tolist() == [3, 3] and b.tolist() == [[30] * 3] * 3 for a, b in tensors)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("root", range(SIZE))
def test_reduce(groups: list[Group], operation: Any, root: int) -> None:
    tensors = values()
    inputs = [tensor.clone() for tensor in tensors]
    opts = options(dist.ReduceOptions, reduceOp=operation, rootRank=root)
    everywhere(groups, lambda group, rank: group.reduce([tensors[rank]], opts))
    assert torch.equal(tensors[root], folded(inputs, operation))


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_reduce_scatter(groups: list[Group], operation: Any, contiguous: bool) -> None:
    inputs = [list(tensor.reshape(3, 2, 2)) for tensor in values()]
    outputs = [torch.empty(2, 2) if contiguous else torch.empty(2, 4)[:, ::2] for _ in range(SIZE)]
    opts = options(dist.ReduceScatterOptions, reduceOp=operation)
    everywhere(groups, lambda g, rank: g.reduce_scatter([outputs[rank]], [inputs[rank]], opts))
    for rank, output in enumerate(outputs):
        assert torch.equal(output, folded([each[rank] for each in inputs], operation))


def test_reduce_scatter_of_one_tensor_and_of_several(groups: list[Group]) -> None:
    inputs = values(shape=(6, 2))
    want = folded(inputs, ReduceOp.SUM).chunk(SIZE)
    outputs = [[torch.empty(2, 2) for _ in range(3)] for _ in range(SIZE)]
    everywhere(groups, lambda g, r: g.reduce_scatter_single(outputs[r][0], inputs[r]))
    everywhere(
        groups,
        lambda g, r: g.reduce_scatter_single_coalesced(outputs[r][1:], [inputs[r], -inputs[r]]),
    )
    for rank, (one, same, negative) in enumerate(outputs):
        assert torch.equal(one, want[rank])
        assert torch.equal(same, one)
        assert torch.equal(negative, -one)


# -------------------------------------------------------------------------- moving tensors
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.complex128], ids=str)
@pytest.mark.parametrize("root", [0, 2])
def test_broadcast(groups: list[Group], dtype: torch.dtype, root: int) -> None:
    tensors = [
        strided(tensor) if rank == 1 else tensor for rank, tensor in enumerate(values(dtype))
    ]
    want = tensors[root].clone()
    opts = options(dist.BroadcastOptions, rootRank=root)
    everywhere(groups, lambda group, rank: group.broadcast([tensors[rank]], opts))
    assert all(torch.equal(tensor, want) for tensor in tensors)


def test_tensors_of_inference_mode_are_filled(groups: list[Group]) -> None:
    with torch.inference_mode():
        tensors = [strided(tensor) for tensor in values()]
        contiguous = [tensor.clone() for tensor in tensors]
        opts = options(dist.AllreduceOptions, reduceOp=ReduceOp.AVG)
        everywhere(groups, lambda group, rank: group.broadcast([tensors[rank]]))
        everywhere(groups, lambda group, rank: group.allreduce([contiguous[rank]], opts))
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    assert all(torch.equal(tensor, folded(values(), ReduceOp.AVG)) for tensor in contiguous)


def test_views_that_are_only_marked_as_conjugate_or_negative_are_filled(
    groups: list[Group],
) -> None:
    tensors = [torch.tensor([complex(rank, 1)]) for rank in range(SIZE)]
    tensors[1] = torch.zeros(1, dtype=torch.complex64).conj()
    everywhere(groups, lambda group, rank: group.broadcast([tensors[rank]]))
    assert all(tensor.tolist() == [1j] for tensor in tensors)
    parts = [
        torch.full((1,), 5.0),
        torch.zeros(1, dtype=torch.complex64).conj().imag,
        torch.zeros(1),
    ]
    assert parts[1].is_neg()
    everywhere(groups, lambda group, rank: group.broadcast([parts[rank]]))
    assert all(part.tolist() == [5] for part in parts)


def test_allgather(groups: list[Group]) -> None:
    inputs = values()
    outputs = [
        [strided(torch.zeros(4, 3)) if rank else torch.zeros(4, 3) for _ in range(SIZE)]
        for rank in range(SIZE)
    ]
    everywhere(groups, lambda group, rank: group.allgather([outputs[rank]], [inputs[rank]]))
    for each in outputs:
        assert torch.equal(torch.stack(each), torch.stack(inputs))


@pytest.mark.parametrize("shape", [(12, 3), (3, 4, 3), (36,)], ids=str)
def test_allgather_into_a_tensor(groups: list[Group], shape: tuple[int, ...]) -> None:
    inputs = values()
    outputs = [torch.empty(shape) for _ in range(SIZE)]
    everywhere(groups, lambda group, rank: group.all_gather_single(outputs[rank], inputs[rank]))
    assert all(torch.equal(each, torch.stack(inputs).reshape(shape)) for each in outputs)


def test_allgather_into_a_tensor_that_is_not_contiguous_or_empty(groups: list[Group]) -> None:
    inputs = values()
    outputs = [[strided(torch.zeros(12, 3)), torch.empty(0, 2)] for _ in range(SIZE)]
    everywhere(
        groups,
        lambda g, r: g.all_gather_single_coalesced(outputs[r], [inputs[r], torch.empty(0, 2)]),
    )
    assert all(torch.equal(each[0], torch.cat(inputs)) for each in outputs)


def test_allgather_of_several(groups: list[Group]) -> None:
    inputs = [[torch.tensor([rank]), torch.tensor([10.0 * rank])] for rank in range(SIZE)]
    outputs = [
        [[torch.zeros(1, dtype=torch.int64), torch.zeros(1)] for _ in range(SIZE)]
        for _ in range(SIZE)
    ]
    everywhere(groups, lambda group, rank: group.allgather_coalesced(outputs[rank], inputs[rank]))
    assert all(each == inputs for each in outputs)


@pytest.mark.parametrize("root", range(SIZE))
def test_gather_and_scatter(groups: list[Group], root: int) -> None:
    inputs = values()
    outputs = [[[torch.zeros(4, 3) for _ in range(SIZE)]] if r == root else [] for r in range(SIZE)]
    opts = options(dist.GatherOptions, rootRank=root)
    everywhere(groups, lambda group, rank: group.gather(outputs[rank], [inputs[rank]], opts))
    gathered = outputs[root][0]
    assert torch.equal(torch.stack(gathered), torch.stack(inputs))

    parts = [torch.zeros(4, 3) for _ in range(SIZE)]
    opts = options(dist.ScatterOptions, rootRank=root)
    everywhere(groups, lambda g, r: g.scatter([parts[r]], [gathered] if r == root else [], opts))
    assert torch.equal(torch.stack(parts), torch.stack(inputs))


def test_alltoall(groups: list[Group]) -> None:
    inputs = [[torch.tensor([10 * rank + to]) for to in range(SIZE)] for rank in range(SIZE)]
    outputs = [[torch.zeros(1, dtype=torch.int64) for _ in range(SIZE)] for _ in range(SIZE)]
    everywhere(groups, lambda group, rank: group.alltoall(outputs[rank], inputs[rank]))
    assert [torch.cat(each).tolist() for each in outputs] == [[0, 10, 20], [1, 11, 21], [2, 12, 22]]


def test_alltoall_of_one_tensor(groups: list[Group]) -> None:
    inputs = [torch.arange(6).reshape(3, 2) + 10 * rank for rank in range(SIZE)]
    outputs = [torch.zeros(3, 2, dtype=torch.int64) for _ in range(SIZE)]
    everywhere(groups, lambda g, rank: g.all_to_all_single(outputs[rank], inputs[rank], [], []))
    for rank, output in enumerate(outputs):
        assert torch.equal(output, torch.stack([each[rank] for each in inputs]))


def test_alltoall_of_parts_of_unequal_size(groups: list[Group]) -> None:
    """Rank r sends r + to rows of its number to rank `to`."""
    sizes = [[rank + to for to in range(SIZE)] for rank in range(SIZE)]
    inputs = [torch.full((sum(sizes[rank]), 2), rank) for rank in range(SIZE)]
    outputs = [torch.zeros(sum(sizes[rank]), 2, dtype=torch.int64) for rank in range(SIZE)]
    everywhere(
        groups,
        lambda g, rank: g.all_to_all_single(outputs[rank], inputs[rank], sizes[rank], sizes[rank]),
    )
    for rank, output in enumerate(outputs):
        assert output[:, 0].tolist() == [r for r in range(SIZE) for _ in range(sizes[rank][r])]


# -------------------------------------------------------------------------- point to point
def test_send_and_receive(groups: list[Group]) -> None:
    first, second = torch.zeros(2, 3), strided(torch.zeros(2, 3))
    sends = [groups[0].send([torch.ones(2, 3) * tag], 1, tag) for tag in (1, 2)]
    receives = [groups[1].recv([second], 0, 2), groups[1].recv([first], 0, 1)]
    for work in sends + receives:
        work.wait()
    assert first.unique().tolist() == [1]
    assert second.unique().tolist() == [2]
    assert receives[0].source_rank() == 0


def test_receive_from_any_source(groups: list[Group]) -> None:
    places = [torch.zeros(3) for _ in range(4)]
    receives = [groups[0].recv_anysource([place], 5) for place in places]
    for rank in (2, 1, 2, 1):
        groups[rank].send([torch.full((3,), float(rank))], 0, 5).wait()
    sources = [work.source_rank() for work in receives]
    assert sorted(sources) == [1, 1, 2, 2]
    assert [place.unique().tolist() for place in places] == [[source] for source in sources]


def test_large_messages_to_a_receive_from_any_source(groups: list[Group]) -> None:
    """Both come in pieces, at the same time; each is whole and ends in one receive."""
    count = 1_000_000
    places = [torch.zeros(count) for _ in range(2)]
    receives = [groups[0].recv_anysource([place], 6) for place in places]
    sends = [groups[rank].send([torch.full((count,), float(rank))], 0, 6) for rank in (1, 2)]
    assert sorted(work.source_rank() for work in receives) == [1, 2]
    for work, place in zip(receives, places, strict=True):
        assert place.unique().tolist() == [work.source_rank()]
    assert all(work.wait() for work in sends)


def test_a_receive_of_another_size_says_so(groups: list[Group]) -> None:
    groups[1].send([torch.zeros(3)], 0).wait()
    with pytest.raises(ValueError, match=r"rank 0, recv.*shape \(2,\)"):
        groups[0].recv([torch.zeros(2)], 1).wait()
    groups[1].send([torch.zeros(3)], 0).wait()
    with pytest.raises(ValueError, match=r"any source.*expected 2 elements .*, got 3"):
        groups[0].recv_anysource([torch.zeros(2)]).wait()


# ------------------------------------------------------------------------------- groups
def test_groups_do_not_meet(members: list[Background]) -> None:
    whole = [group_of(member, context=51) for member in members]
    pair = [group_of(members[rank], [2, 0], context=52) for rank in (2, 0)]
    assert [(group.rank(), group.size()) for group in pair] == [(0, 2), (1, 2)]
    tensors = [torch.tensor(float(rank)) for rank in range(SIZE)]
    others = [torch.tensor(10.0), torch.tensor(20.0)]
    # In another order on each rank.
    works = [pair[0].allreduce([others[0]]), whole[2].allreduce([tensors[2]])]
    works += [whole[0].allreduce([tensors[0]]), pair[1].allreduce([others[1]])]
    works += [whole[1].allreduce([tensors[1]])]
    for work in works:
        work.wait()
    assert [tensor.item() for tensor in tensors + others] == [3, 3, 3, 30, 30]


def test_names(groups: list[Group]) -> None:
    group = groups[0]
    group._set_group_name("mine")
    group._set_group_desc("for a test")
    assert (group.name(), group.group_name, group.group_desc) == ("fmi", "mine", "for a test")
    assert group._get_backend(torch.device("cpu")) is group
    with pytest.raises(RuntimeError, match="CPU only, not of cuda"):
        group._get_backend(torch.device("cuda"))


# -------------------------------------------------------------------------------- waiting
def test_futures_and_their_callbacks(groups: list[Group]) -> None:
    tensors = [torch.ones(2) for _ in range(SIZE)]
    works = [group.allreduce([tensor]) for group, tensor in zip(groups, tensors, strict=True)]
    doubled = [work.get_future().then(lambda f: f.value()[0] * 2) for work in works]
    assert [future.wait().tolist() for future in doubled] == [[6, 6]] * SIZE
    assert all(work.is_completed() and work.is_success() for work in works)
    assert all(work.exception() is None for work in works)
    assert works[0].result()[0] is tensors[0]


def test_a_callback_may_wait_for_an_operation(groups: list[Group]) -> None:
    """As PowerSGD's hook does."""

    def more(group: Group) -> Callable[[Any], Tensor]:
        def callback(future: Any) -> Tensor:
            tensor: Tensor = future.value()[0]
            return group.allreduce([tensor]).get_future().wait()[0]

        return callback

    futures = [group.allreduce([torch.ones(1)]).get_future().then(more(group)) for group in groups]
    assert [future.wait().item() for future in futures] == [9] * SIZE


def test_many_callbacks_may_wait_at_once(groups: list[Group]) -> None:
    """As in a model of many buckets: each callback is done when another one's future is."""
    count = 100
    entered = threading.Barrier(count * SIZE, timeout=30)

    def more(group: Group) -> Callable[[Any], Tensor]:
        def callback(_: Any) -> Tensor:
            entered.wait()
            reduced: Tensor = group.allreduce([torch.ones(1)]).get_future().wait()[0]
            return reduced

        return callback

    futures = [
        group.allreduce([torch.ones(1)]).get_future().then(more(group))
        for _ in range(count)
        for group in groups
    ]
    assert [future.wait().item() for future in futures] == [SIZE] * len(futures)


def test_coalesced_calls_end_as_one(groups: list[Group]) -> None:
    tensors = [[torch.ones(1), torch.ones(2)] for _ in groups]
    works = []
    for group, pair in zip(groups, tensors, strict=True):
        group._start_coalescing(torch.device("cpu"))
        for tensor in pair:
            group.allreduce([tensor])
        works.append(group._end_coalescing(torch.device("cpu")))
    for work in works:
        work.wait()
    assert all(a.tolist() == [3] and b.tolist() == [3, 3] for a, b in tensors)


def test_a_wait_with_a_limit_of_its_own(groups: list[Group]) -> None:
    work = groups[0].recv([torch.zeros(1)], 1)
    with pytest.raises(DistBackendError, match=r"rank 0, recv\] no end within the 0.01 s of wait"):
        work.wait(timedelta(milliseconds=10))
    assert not work.is_completed()
    groups[1].send([torch.ones(1)], 0).wait()
    assert work.wait()


def test_monitored_barrier(groups: list[Group]) -> None:
    with ThreadPoolExecutor(SIZE) as pool:
        list(pool.map(Group.monitored_barrier, groups))
        limit = timedelta(milliseconds=100)

        def late(wait_all_ranks: bool) -> list[str]:
            def enter(group: Group) -> None:
                with pytest.raises(DistBackendError) as raised:
                    group.monitored_barrier(limit, wait_all_ranks)
                assert isinstance(raised.value.__cause__, CollectiveTimeout)
                texts.append(str(raised.value))

            texts: list[str] = []
            enter(groups[0])
            return texts

        assert "Rank 1 failed to pass monitoredBarrier in 100 ms" in late(False)[0]
        assert "Ranks 1, 2 failed to pass" in late(True)[0]


def test_a_monitored_barrier_does_not_take_messages(groups: list[Group]) -> None:
    groups[1].send([torch.ones(1)], 0, 1).wait()  # under the tag that the first barrier has
    with pytest.raises(DistBackendError, match="Rank 1"):
        groups[0].monitored_barrier(timedelta(milliseconds=50))
    got = torch.zeros(1)
    groups[0].recv([got], 1, 1).wait()
    assert got.item() == 1


def test_the_group_lives_on_after_a_monitored_barrier_that_failed(groups: list[Group]) -> None:
    with pytest.raises(DistBackendError, match="Rank 1"):
        groups[0].monitored_barrier(timedelta(milliseconds=10))
    tensors = values()
    want = folded(tensors, ReduceOp.SUM)
    everywhere(groups, lambda group, rank: group.allreduce([tensors[rank]]))
    assert torch.equal(tensors[0], want)


# -------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda g: g.allreduce([torch.ones(1), torch.ones(1)]), "one item, got 2"),
        (lambda g: g.all_gather_single(torch.ones(5), torch.ones(2)), "5 elements"),
        (lambda g: g.all_gather_single(torch.ones(6), torch.ones(2).int()), "torch.int32"),
        (lambda g: g.reduce_scatter_single(torch.ones(2), torch.ones(7)), "7 elements"),
        (lambda g: g.all_to_all_single(torch.ones(3), torch.ones(4), [], []), "axis of 4"),
        (lambda g: g.all_to_all_single(torch.ones(3), torch.ones(3), [], [1, 1, 2]), "add up to 3"),
    ],
)
def test_wrong_sizes_are_told_before_anything_is_sent(
    groups: list[Group], call: Callable[[Group], Work], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        call(groups[0])
    everywhere(groups, lambda group, _: group.barrier())


def test_what_has_no_sum(groups: list[Group]) -> None:
    opts = options(dist.AllreduceOptions, reduceOp=ReduceOp.BAND)
    with pytest.raises(TypeError, match="rank 0, allreduce"):
        groups[0].allreduce([torch.ones(1)], opts).wait()


def test_ranks_that_differ_hear_so_together(address: str) -> None:
    with joined(address, 2) as members:
        one, two = (group_of(member) for member in members)
        works = [one.allreduce([torch.ones(2)]), two.allreduce([torch.ones(3)])]
        for work in works:
            with pytest.raises(DistBackendError, match=r"float32 \[2\]") as raised:
                work.wait()
            assert "float32 [3]" in str(raised.value)
            assert isinstance(raised.value.__cause__, CollectiveMismatch)
            with pytest.raises(RuntimeError, match=r"float32"):
                work.get_future().wait()


def test_who_is_late_is_named(address: str) -> None:
    with joined(address, 3) as members:
        groups = [group_of(member) for member in members]
        opts = options(dist.AllreduceOptions, timeout=timedelta(seconds=0.2))
        works = [group.allreduce([torch.ones(1)], opts) for group in groups[:2]]
        for work in works:
            with pytest.raises(DistBackendError, match="rank 2"):
                work.wait()
            assert isinstance(work.done.exception(), CollectiveTimeout)


def test_abort_ends_what_waits_on_all_ranks(address: str) -> None:
    with joined(address, 2) as members:
        one, two = (group_of(member) for member in members)
        waiting = one.allreduce([torch.ones(1)])
        two.abort()
        with pytest.raises(DistBackendError, match="abort"):
            waiting.wait()
        assert isinstance(waiting.done.exception(), Aborted)


def test_who_left_is_named_and_may_not_call(address: str) -> None:
    with joined(address, 2) as members:
        one, two = (group_of(member) for member in members)
        members[1].close()
        with pytest.raises(DistBackendError, match="left the job"):
            two.allreduce([torch.ones(1)]).wait()
        work = one.allreduce([torch.ones(1)])
        with pytest.raises(DistBackendError, match=r"rank 1|peer 1"):
            work.wait()
        assert isinstance(work.done.exception(), RankFailed)


def test_who_has_left_does_not_keep_others_from_sending(address: str) -> None:
    """Also where the first rank that is asked has left before."""
    with joined(address, 3) as members:
        groups = [group_of(member) for member in members]
        everywhere(groups, lambda group, _: group.barrier())
        members[0].close()
        with pytest.raises(DistBackendError, match="rank 0"):
            groups[2].recv([torch.zeros(1)], 0).wait()
        place = torch.zeros(1)
        receive = groups[2].recv_anysource([place])
        groups[1].send([torch.ones(1)], 2).wait()
        assert receive.wait(timedelta(seconds=10))
        assert (receive.source_rank(), place.item()) == (1, 1)

        members[1].close()
        with pytest.raises(DistBackendError, match=r"rank [01] has left"):
            groups[2].recv_anysource([place]).wait(timedelta(seconds=10))


def test_a_handler_of_a_signal_may_leave(address: str) -> None:
    """Also while the thread that it interrupts is beginning an operation."""
    with joined(address, 1) as (member,), member._lock:
        member.close()
        with pytest.raises(Aborted, match="left the job"):
            member.submit(member.comm.barrier).result(1)


def test_leaving_gives_up_what_is_under_way(address: str) -> None:
    with joined(address, 2) as members:
        work = group_of(members[0]).recv([torch.ones(1)], 1)
        begun = time.monotonic()
        members[0].close()
        with pytest.raises(DistBackendError, match="left the job"):
            work.wait()
        assert time.monotonic() - begun < 5
