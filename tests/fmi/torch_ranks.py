"""All ranks of a job in this process, each with its thread and its process group of torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ReduceOp

from fmi_client.background import Background
from fmi_client.torch_backend import FmiProcessGroup
from fmi_client.torch_work import Work

SIZE = 3
Group = FmiProcessGroup
numbers = itertools.count()


@contextmanager
def joined(address: str, size: int, timeout: float = 15.0) -> Iterator[list[Background]]:
    """All ranks of a job, each on a thread of its own."""
    job = f"torch-{next(numbers)}"

    def join(rank: int) -> Background:
        return Background(address, job=job, rank=rank, size=size, timeout=timeout)

    with ThreadPoolExecutor(size) as pool:
        members = list(pool.map(join, range(size)))
        try:
            yield members
        finally:
            list(pool.map(Background.close, members))


def group_of(member: Background, ranks: list[int] | None = None, context: int = 7) -> Group:
    comm = member.comm.part(ranks or list(range(member.comm.size)), context)
    return FmiProcessGroup(member, comm, dist.HashStore(), whole=False)


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


def strided(tensor: Tensor) -> Tensor:
    """The same values, as every second column of a larger tensor's transpose."""
    room = torch.full((2 * tensor.shape[1], tensor.shape[0]), -1).to(tensor.dtype).t()
    view = room[:, ::2]
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view
