"""What torch's profiler shows of operations of the backend "fmi"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile

import fmi_client.torch_backend  # noqa: F401  (makes the backend known)
from fmi_client.torch_profile import recorded
from tests.processes import serve_rendezvous


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A default group of this process only."""
    with serve_rendezvous() as server:
        url = f"fmi://{server}/profile?key={'00' * 32}"
        distributed.init_process_group("fmi", init_method=url, rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


def profiled(call: Callable[..., Any], *args: Any) -> list[Any]:
    """Call, compute something, and return our events and those of what was computed."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call(*args)
        torch.mm(torch.ones(9, 9), torch.ones(9, 9))
    return [each for each in profiler.events() if each.name.startswith(("fmi:", "aten::mm"))]


@pytest.mark.parametrize(
    ("operation", "args", "name", "shapes"),
    [
        (distributed.all_reduce, (torch.ones(2, 3),), "fmi:all_reduce", [[2, 3]]),
        (distributed.all_gather, ([torch.ones(4)], torch.ones(4)), "fmi:all_gather", [[4]]),
        (distributed.broadcast, (torch.ones(5), 0), "fmi:broadcast", [[5]]),
        (distributed.barrier, (), "fmi:barrier", []),
    ],
)
def test_an_operation_is_one_event_from_its_call_to_its_end(
    operation: Callable[..., Any], args: tuple[Any, ...], name: str, shapes: list[list[int]]
) -> None:
    ours, computed = profiled(operation, *args)
    assert ours.name == name
    assert ours.is_async  # it ends in the thread that does it
    assert ours.input_shapes == shapes
    assert ours.time_range.end <= computed.time_range.start


def test_an_operation_that_fails_ends_its_event() -> None:
    def refused() -> None:
        with pytest.raises(TypeError, match="layout"):
            distributed.broadcast(torch.ones(3).to_sparse(), 0)

    ours, computed = profiled(refused)
    assert ours.name == "fmi:broadcast"
    assert ours.time_range.end <= computed.time_range.start


def test_without_a_profiler_nothing_is_added() -> None:
    async def begin() -> None: ...

    assert recorded("allreduce", [torch.ones(1)], begin) is begin
