"""Collectives of the torch.distributed backend, against torch on the stacked tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import ReduceOp

from tests.fmi.torch_ranks import (
    BITWISE,
    DTYPES,
    OPERATIONS,
    SIZE,
    Group,
    everywhere,
    folded,
    options,
    strided,
    values,
)


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
