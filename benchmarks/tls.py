"""What TLS costs: the same ranks with plain and with encrypted links, in turns.

::

    python -m benchmarks.tls                # 2 ranks, 15 rounds
    python -m benchmarks.tls --rounds 30

Each rank is a process that is in two jobs at once, one of them with tls://. In each round both
do the same, in random order, so that what else the machine does hits both alike: what counts is the
ratio of their times in one round. Servers and ranks run on loopback, whose bandwidth no network
has; there TLS costs more than anywhere else. Needs the program openssl, for a certificate.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NamedTuple

import numpy as np
import typer

from benchmarks.start import run_ranks, serve
from fmi_client.sync import Communicator, connect
from fmi_client.transport.tls import CA_VARIABLE

SIZES = tuple(1024 * 4**power for power in range(9))
"""Bytes: 1 KiB to 64 MiB."""

OPERATIONS = ("sendrecv", "allreduce")
ROUND_BYTES = 64 * 1024 * 1024
"""An operation is repeated within a round until so much has gone one way, or `MOST` times."""

MOST = 100

Operation = Callable[[Communicator], object]


class Cell(NamedTuple):
    """One operation at one size: seconds of each round, without and with TLS."""

    operation: str
    size: int
    plain: list[float]
    encrypted: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as long it took with TLS, in each round."""
        pairs = zip(self.encrypted, self.plain, strict=True)
        return [encrypted / plain for encrypted, plain in pairs]


def be_rank(
    rank: int, size: int, plain: str, encrypted: str, sizes: tuple[int, ...], rounds: int
) -> list[Cell]:
    """Be a rank of both jobs; returns what was measured."""
    with (
        connect(plain, job="bench", rank=rank, size=size) as one,
        connect(encrypted, job="bench", rank=rank, size=size) as other,
    ):
        order = random.Random(0)  # the same for all ranks
        cells = [compare(one, other, op, n, rounds, order) for op in OPERATIONS for n in sizes]
        assert not any(link["tls"] for link in one.stats()["links"].values())
        assert all(link["tls"] for link in other.stats()["links"].values())
    return cells


def compare(
    one: Communicator,
    other: Communicator,
    operation: str,
    nbytes: int,
    rounds: int,
    order: random.Random,
) -> Cell:
    """Do an operation in turn over both communicators; returns how long it took."""
    run = _operation(operation, one, nbytes)
    times: dict[Communicator, list[float]] = {one: [], other: []}
    for comm in (one, other):  # links are made, memory is touched
        _seconds(comm, run, 1)
    for _ in range(rounds):
        for comm in order.sample((one, other), 2):
            times[comm].append(_seconds(comm, run, max(1, min(MOST, ROUND_BYTES // nbytes))))
    return Cell(operation, nbytes, times[one], times[other])


def _operation(name: str, comm: Communicator, nbytes: int) -> Operation:
    data, room = np.ones(nbytes // 8), np.empty(nbytes // 8)
    if name == "allreduce":
        return lambda comm: comm.allreduce(data, out=room)
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    return lambda comm: comm.sendrecv(data, after, before, out=room)


def _seconds(comm: Communicator, run: Operation, times: int) -> float:
    """Return the mean seconds of one of so many repetitions."""
    comm.barrier()
    start = time.perf_counter()
    for _ in range(times):
        run(comm)
    return (time.perf_counter() - start) / times


@contextmanager
def servers() -> Iterator[tuple[str, str]]:
    """Run two servers, and trust the second one's certificate; gives "host:port" and "tls://…"."""
    with tempfile.TemporaryDirectory() as folder:
        cert, key = f"{folder}/cert.pem", f"{folder}/key.pem"
        made = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        whose = ["-subj", "/CN=benchmark", "-addext", "subjectAltName=IP:127.0.0.1"]
        command = ["openssl", "req", *made, *whose, "-keyout", key, "-out", cert]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        os.environ[CA_VARIABLE] = cert
        with serve() as plain, serve("--tls-cert", cert, "--tls-key", key) as encrypted:
            yield plain, f"tls://{encrypted}"


def table(cells: list[Cell]) -> str:
    """Return medians, and the ratio's quartiles."""
    lines = [
        "| operation | bytes | plain | TLS | TLS : plain, median (quartiles) |",
        "|---|---|---|---|---|",
    ]
    for cell in cells:
        plain, encrypted = map(statistics.median, (cell.plain, cell.encrypted))
        low, middle, high = statistics.quantiles(cell.ratios, n=4)
        lines.append(
            f"| {cell.operation} | {_bytes(cell.size)} | {_rate(cell.size, plain)} "
            f"| {_rate(cell.size, encrypted)} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def _bytes(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"


def _rate(size: int, seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} µs, {size / seconds / 1e6:,.0f} MB/s"


def main(
    ranks: Annotated[int, typer.Option(min=2, help="Processes.")] = 2,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of each operation and size.")] = 15,
) -> None:
    """Compare plain with encrypted links; some two minutes."""
    with servers() as (plain, encrypted):
        print(table(run_ranks(ranks, be_rank, plain, encrypted, SIZES, rounds)[0]))


if __name__ == "__main__":
    typer.run(main)
