"""The rows of docs/from-mpi4py.md, and their left column as a program for mpiexec.

``mpiexec -n 2 python -m tests.fmi.mpi_rows FOLDER CELL …`` runs those cells under MPI, and writes
what each gave on each rank to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.two_columns import blocks, plain, run_cell

PAGE = "from-mpi4py.md"
ARRAYS = ("a", "b", "c")


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it never became true")


def names(rank: int, size: int, **more: Any) -> dict[str, Any]:
    """Return what a cell may use."""
    here: dict[str, Any] = {"np": np, "time": time, "wait_until": wait_until, "r": rank, "n": size}
    exec(blocks(PAGE)[1], here)
    start = np.arange(3.0 * size).reshape(size, 3) + 1
    here["a"] = start + 10.5 * rank
    here["b"] = np.zeros((size, 3))
    here["c"] = np.stack([start + 100 * (k + rank) for k in range(size)])
    return here | more


def outcome(cell: str, here: dict[str, Any]) -> dict[str, Any]:
    """Run a cell; returns its value and what the arrays are afterwards."""
    value = run_cell(cell, here)
    return {"value": plain(value), **{name: plain(here[name]) for name in ARRAYS}}


def main(folder: Path, cells: list[str]) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    place = (comm.Get_rank(), comm.Get_size())
    found = [outcome(cell, names(*place, comm=comm, MPI=MPI)) for cell in cells]
    (folder / f"{place[0]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
