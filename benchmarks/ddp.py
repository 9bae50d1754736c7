"""Steps of DistributedDataParallel by our backend and by gloo: ``python -m benchmarks.ddp``.

All ranks are processes of this machine, one thread each. The same processes train the same network
by one backend after the other, and in between without any, each on its own: what is left is what
the network's own arithmetic takes when all ranks are at it. A step is forward, backward and SGD on
a batch of 64 rows; its time is rank 0's, as no rank can go ahead of the others.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Annotated

import typer

from benchmarks.start import ROOT, serve

WIDTHS = {1000: "1 M", 3160: "10 M"}
"""Of the two hidden layers, and how many parameters that makes, of 4 bytes."""

KEY = bytes(range(32)).hex()
BATCH, WARM_UP, STEPS = 64, 3, 10
KINDS = ("alone", "gloo", "fmi")


def main(
    worlds: Annotated[str, typer.Option(help="World sizes, separated by commas.")] = "2,4",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each backend has its turn.")] = 5,
) -> None:
    """Compare the time of a step; prints a table."""
    print("| ranks | parameters | " + " | ".join(f"{kind}, ms" for kind in KINDS) + " | load |")
    print("|---|---|" + "---|" * len(KINDS) + "---|")
    for size in map(int, worlds.split(",")):
        with serve() as server, tempfile.TemporaryDirectory() as folder:
            _compare(server, folder, size, rounds)


def _compare(server: str, folder: str, size: int, rounds: int) -> None:
    words = [sys.executable, "-m", "benchmarks.ddp", "rank", server, folder, str(rounds)]
    ranks = []
    for rank in range(size):
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(words, cwd=ROOT, env=os.environ | place))
    try:
        if any([rank.wait(900) for rank in ranks]):
            raise SystemExit("a rank failed; its traceback is above")
    finally:
        for process in ranks:
            process.kill()


def _be_rank(server: str, folder: str, rounds: int) -> None:
    for width, parameters in WIDTHS.items():
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            places = {
                "gloo": f"file://{folder}/{width}-{number}",
                "fmi": f"fmi://{server}/{width}-{number}?key={KEY}",
            }
            for backend in sorted(places, reverse=number % 2 == 0):
                _take_turn(backend, places[backend], width, times)
        if os.environ["RANK"] == "0":
            cells = " | ".join(_cell(each) for each in times.values())
            size, load = os.environ["WORLD_SIZE"], os.getloadavg()[0]
            print(f"| {size} | {parameters} | {cells} | {load:.1f} |", flush=True)


def _take_turn(backend: str, place: str, width: int, times: dict[str, list[float]]) -> None:
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=size)
    times[backend] += _steps(width, by_ddp=True)
    dist.barrier()
    if backend == "gloo":
        times["alone"] += _steps(width, by_ddp=False)
        dist.barrier()
    dist.destroy_process_group()


def _cell(seconds: list[float]) -> str:
    """Return median and quartiles, in milliseconds."""
    low, median, high = statistics.quantiles([1e3 * each for each in seconds], n=4)
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def _steps(width: int, by_ddp: bool) -> list[float]:
    """Return how many seconds each step took."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    layers = nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    model: nn.Module = nn.Sequential(*layers, nn.Linear(width, 1))
    model = DistributedDataParallel(model) if by_ddp else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(BATCH, 5)
    times = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = (model(inputs) ** 2).mean()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        _be_rank(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        typer.run(main)
