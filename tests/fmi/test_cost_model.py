"""The cost model: its counts against what really is sent, its times against the clock."""

from __future__ import annotations

import math
import statistics
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import fmi_client
from fmi_client import sync
from fmi_client.communicator import Communicator
from fmi_client.cost_model import OPERATIONS, Model, predict
from tests.processes import run_processes
from tests.support import run_ranks

MODEL = Model(latency=1e-3, bandwidth=1e8, reduction=1e9)
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17]
BYTES = [8, 8192, 65_536, 100_000, 3_000_000]


def call(comm: Any, op: str, nbytes: int) -> Any:
    array = np.zeros(nbytes // 8)
    if op == "barrier":
        return comm.barrier()
    if op in ("scatter", "alltoall"):
        return getattr(comm, op)([array] * comm.size)
    return getattr(comm, op)(array)


@pytest.mark.parametrize("nbytes", BYTES)
@pytest.mark.parametrize("op", OPERATIONS)
async def test_messages_and_bytes_are_those_of_the_algorithms(op: str, nbytes: int) -> None:
    for size in SIZES if nbytes < 1_000_000 else SIZES[:6]:

        async def rank(comm: Communicator) -> Any:
            await call(comm, op, nbytes)
            return comm

        links = [comm.stats()["links"] for comm in await run_ranks(size, rank)]

        def counted(what: str, by: int, to: int, links: list[Any] = links) -> int:
            return int(links[to][by][what]) if by in links[to] else 0

        def busiest(what: str, size: int = size, counted: Any = counted) -> int:
            ranks = range(size)
            sent = [sum(counted(what, r, other) for other in ranks) for r in ranks]
            received = [sum(counted(what, other, r) for other in ranks) for r in ranks]
            return max(*sent, *received)

        work = predict(op, nbytes, size)
        received = [link["messages_received"] for each in links for link in each.values()]
        assert work.total == sum(received), size
        assert work.messages == busiest("messages_received"), size
        # Blocks of a ring differ by an element.
        counted_bytes = busiest("bytes_received")
        assert work.nbytes == pytest.approx(counted_bytes, abs=16 * size), size


@pytest.mark.parametrize("op", OPERATIONS)
def test_more_takes_longer_and_costs_more(op: str) -> None:
    for measure in (
        lambda n, p: MODEL.seconds(op, n, p),
        lambda n, p: MODEL.price(op, n, p, rank_second=1e-5, message=1e-6),
    ):
        # Steps of 8: a ring is chosen where it is faster, so time may drop just there.
        by_bytes = [measure(8**e, 6) for e in range(1, 10)]
        by_ranks = [measure(100_000, p) for p in (1, 2, 4, 8, 16, 32, 64, 1024)]
        assert all(a <= b for a, b in pairwise(by_bytes))
        assert all(a < b for a, b in pairwise(by_ranks))
        assert by_ranks[0] == 0


def test_times_and_prices_by_hand() -> None:
    assert MODEL.seconds("barrier", 0, 5) == pytest.approx(3e-3)
    # Halving and doubling among 4: four rounds; three quarters are sent, added up, and sent again.
    halving = 4e-3 + 1.5e6 / 1e8 + 75e4 / 1e9
    assert MODEL.seconds("allreduce", 1_000_000, 4) == pytest.approx(halving)
    price = MODEL.price("allreduce", 1_000_000, 4, rank_second=2.0, message=0.5)
    assert price == pytest.approx(4 * halving * 2 + 16 * 0.5)
    with pytest.raises(ValueError, match="'sort' is none of barrier"):
        MODEL.seconds("sort", 1, 2)


@pytest.mark.parametrize("size", [1, 2, 5])
async def test_calibration_gives_all_ranks_the_same(size: int) -> None:
    async def rank(comm: Communicator) -> Any:
        assert comm.model is None
        model = await comm.calibrate()
        assert comm.model is model
        assert await comm.allreduce(1) == size
        return model

    models = await run_ranks(size, rank)
    assert models == [models[0]] * size
    model = models[0]
    assert isinstance(model, fmi_client.Model)
    assert model.reduction > 1e6
    if size == 1:
        assert (model.latency, model.bandwidth) == (0, math.inf)
    else:
        assert 0 < model.latency < 1
        assert 1e6 < model.bandwidth < 1e12


@pytest.mark.alone
def test_predictions_on_loopback_are_of_the_right_size(address: str) -> None:
    """Within a factor of three, on a machine where other things happen: the best of some runs."""
    cases = [("barrier", 0), ("allreduce", 8), ("allreduce", 4_000_000), ("scan", 4_000_000)]

    def rank(comm: sync.Communicator) -> Any:
        model = comm.calibrate()
        ratios = []
        for op, nbytes in cases:
            seconds = []
            for _ in range(15):
                comm.barrier()
                start = time.perf_counter()
                call(comm, op, nbytes)
                seconds.append(time.perf_counter() - start)
            ratios.append(statistics.median(seconds) / model.seconds(op, nbytes, comm.size))
        return ratios

    off: list[float] = []
    for _ in range(5):
        worst = np.array(run_processes(address, 2, rank)).max(0)
        off.append(float(np.exp(np.abs(np.log(worst))).max()))
        if off[-1] < 3:
            return
    pytest.fail(f"measured and predicted differ by factors of {off}")
