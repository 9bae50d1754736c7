"""Tensors as the communicator takes them: flat where they travel, combined in place."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from fmi_client.communicator import Communicator
from fmi_client.ops import BAND, BOR, BXOR, MAX, MIN, PROD, SUM, Op

OPS: dict[Any, Op] = {
    ReduceOp.SUM: SUM,
    ReduceOp.AVG: SUM,
    ReduceOp.PREMUL_SUM: SUM,
    ReduceOp.PRODUCT: PROD,
    ReduceOp.MIN: MIN,
    ReduceOp.MAX: MAX,
    ReduceOp.BAND: BAND,
    ReduceOp.BOR: BOR,
    ReduceOp.BXOR: BXOR,
}


def only(items: Any) -> Any:
    """Return the one item of a list: torch once had one for each device of a process."""
    if isinstance(items, Tensor):
        return items
    if len(items) != 1:
        raise ValueError(f"expected a list of one item, got {len(items)}")
    return items[0]


def seconds(options: Any) -> float | None:
    """Return the time limit of torch's options; None: the group's."""
    timeout: timedelta | None = getattr(options, "timeout", None)
    limit = timeout.total_seconds() if timeout is not None else 0.0
    return limit if limit > 0 else None


def flat(tensor: Tensor) -> Tensor:
    """Return the elements in order, as a view where the memory allows it."""
    if tensor.layout != torch.strided:
        raise TypeError(f"a tensor of layout {tensor.layout} can only be summed; use to_dense()")
    return tensor.detach().reshape(-1)


def split(tensor: Tensor, sizes: Sequence[int], parts: int) -> list[Tensor]:
    """Cut the first axis into `parts`: of the given sizes, or equal ones where none are given."""
    length = tensor.shape[0] if tensor.ndim else 1
    if not sizes:
        if length % parts:
            raise ValueError(f"an axis of {length} does not divide into {parts} equal parts")
        sizes = [length // parts] * parts
    if len(sizes) != parts or sum(sizes) != length:
        raise ValueError(f"split sizes {list(sizes)} are not {parts} that add up to {length}")
    return list(torch.split(tensor.detach(), list(sizes)))


def check_parts(whole: Tensor, part: Tensor, parts: int) -> None:
    """Raise ValueError if `whole` has not the size of so many parts, or is of another dtype."""
    if whole.numel() != parts * part.numel() or whole.dtype != part.dtype:
        raise ValueError(
            f"{whole.numel()} elements of {whole.dtype} are not {parts} times "
            f"{part.numel()} of {part.dtype}"
        )


class Rooms:
    """Where flat tensors are received: the memory of those asked for, if it is in order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.flat = [_room(tensor) for tensor in self.tensors]

    def fill(self, got: Any) -> None:
        """Copy what came without its place being known."""
        room = self.flat[0]
        if not isinstance(got, Tensor) or got.shape != room.shape or got.dtype != room.dtype:
            came = (
                f"{got.numel()} of {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
            )
            raise ValueError(f"expected {room.numel()} elements of {room.dtype}, got {came}")
        room.copy_(got)

    def put_back(self) -> None:
        """Copy from the rooms that are memory of their own into their tensors."""
        for tensor, room in zip(self.tensors, self.flat, strict=True):
            if not tensor.is_contiguous():
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(room.view(tensor.shape))


def _room(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor.new_empty(tensor.numel())


class Reduction:
    """One of torch's reduce operations, among `size` ranks."""

    def __init__(self, operation: Any, size: int) -> None:
        kind, self._factor = operation.__getstate__()
        self._op = OPS[kind]
        self._average = kind == ReduceOp.AVG
        self._size = size

    def allreduce(self, comm: Communicator, tensor: Tensor, limit: float | None) -> Awaitable[None]:
        if tensor.layout != torch.strided:
            return self._allreduce_sparse(comm, tensor, limit)
        tensor = tensor.detach()
        reduced = comm.allreduce(self._before(tensor), self._op, out=tensor, timeout=limit)
        return self._after(reduced, tensor)

    def reduce(
        self, comm: Communicator, tensor: Tensor, root: int, limit: float | None
    ) -> Awaitable[None]:
        tensor = tensor.detach()
        out = tensor if comm.rank == root else None
        reduced = comm.reduce(self._before(tensor), self._op, root, out=out, timeout=limit)
        return self._after(reduced, out)

    def scatter(
        self, comm: Communicator, output: Tensor, whole: Tensor, limit: float | None
    ) -> Awaitable[None]:
        rooms = Rooms([output])
        rows = self._before(flat(whole)).view(self._size, output.numel())
        row = rooms.flat[0].view(1, output.numel())
        reduced = comm.reduce_scatter(rows, self._op, out=row, timeout=limit)
        return self._after(reduced, row, rooms)

    def _before(self, tensor: Tensor) -> Tensor:
        return tensor if self._factor is None else tensor * self._factor

    async def _after(
        self, reduced: Awaitable[Any], tensor: Tensor | None, rooms: Rooms | None = None
    ) -> None:
        await reduced
        if self._average and tensor is not None:
            tensor.div_(self._size, rounding_mode=_rounding(tensor))
        if rooms is not None:
            rooms.put_back()

    def _allreduce_sparse(
        self, comm: Communicator, tensor: Tensor, limit: float | None
    ) -> Awaitable[None]:
        if tensor.layout != torch.sparse_coo or self._op is not SUM:
            raise TypeError(
                f"{self._op.name} of tensors of layout {tensor.layout}: only sum of COO"
            )
        mine = self._before(tensor.detach().coalesce())
        gathered = comm.allgather([mine.indices(), mine.values()], timeout=limit)
        return _add_sparse(gathered, tensor, self._size if self._average else 1)


async def _add_sparse(gathered: Awaitable[Any], tensor: Tensor, divisor: int) -> None:
    pieces = await gathered
    indices = torch.cat([each[0] for each in pieces], dim=1)
    values = torch.cat([each[1] for each in pieces])
    # Indices that are out of bounds would write anywhere, and these come from others.
    summed = torch.sparse_coo_tensor(indices, values, tensor.shape, check_invariants=True)
    with torch.no_grad():  # detach() would not share what copy_ replaces
        tensor.copy_(summed.coalesce().div(divisor, rounding_mode=_rounding(values)))


def _rounding(tensor: Tensor) -> str | None:
    """Return how a mean is rounded: whole numbers towards zero, as NCCL does."""
    return None if tensor.is_floating_point() or tensor.is_complex() else "trunc"
