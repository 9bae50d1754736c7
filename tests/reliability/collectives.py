"""Every collective, as a call on an awaited or a blocking communicator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fmi_client import sync

Collective = Callable[[Any, Any], Any]
"""Called with a communicator and an array."""

COLLECTIVES: dict[str, Collective] = {
    "barrier": lambda comm, array: comm.barrier(),
    "bcast": lambda comm, array: comm.bcast(array),
    "gather": lambda comm, array: comm.gather(array),
    "scatter": lambda comm, array: comm.scatter([array] * comm.size),
    "reduce": lambda comm, array: comm.reduce(array),
    "allreduce": lambda comm, array: comm.allreduce(array),
    "scan": lambda comm, array: comm.scan(array),
    "exscan": lambda comm, array: comm.exscan(array),
    "allgather": lambda comm, array: comm.allgather(array),
    "alltoall": lambda comm, array: comm.alltoall([array] * comm.size),
    "reduce_scatter": lambda comm, array: comm.reduce_scatter(array),
}

AGREEING = [name for name in COLLECTIVES if name not in ("bcast", "gather", "scatter")]
"""Those that no rank finishes before all have begun."""

SMALL, LARGE = np.ones(8), np.ones(200_000)


def act_after(comm: sync.Communicator, steps: int, act: Callable[[], None]) -> None:
    """Do something when a rank has begun that many more steps of collectives."""
    post, left = comm._post, [steps]

    def posting(*step: Any) -> Any:
        under_way = post(*step)
        left[0] -= 1
        if left[0] == 0:
            act()
        return under_way

    comm._post = posting  # type: ignore[method-assign]
