"""Events of torch's profiler: one for each operation, from its call to its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd

from fmi_client.background import Begin
from fmi_client.torch_anysource import OP
from fmi_client.torch_register import NAME

TITLES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
    "alltoall": "all_to_all",
    OP: "recvAnySource",
}
"""What other backends call them; the rest go by their own names."""


def recorded(name: str, inputs: Sequence[Tensor], begin: Begin) -> Begin:
    """Return `begin` with an event around what it begins: ``fmi:all_reduce``, with inputs' shapes.

    The event starts here, in the caller's thread, and ends in the one that runs the operation.
    Where this thread has no profiler at work, `begin` itself is returned.
    """
    if not _autograd._profiler_enabled():
        return begin
    title = f"{NAME}:{TITLES.get(name, name)}"
    event = _autograd._record_function_with_args_enter(title, *inputs)
    ended: torch.futures.Future[None] = torch.futures.Future()
    # The profiler belongs to this thread; what torch itself hangs on a future takes it along.
    torch.ops.profiler._call_end_callbacks_on_jit_fut(event, ended)

    def begin_recorded() -> Awaitable[Any]:
        try:
            return _until(begin(), lambda: ended.set_result(None))
        except BaseException:
            ended.set_result(None)
            raise

    return begin_recorded


async def _until(begun: Awaitable[Any], end: Callable[[], None]) -> Any:
    try:
        return await begun
    finally:
        end()
