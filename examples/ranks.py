"""What each example ends in, ``main(work)``; a rank needs the client only.

A rank finds its place in the environment, on this machine as on any other:

    FMI_SERVER  host:port of the server       FMI_RANK  which of the ranks this is, from 0
    FMI_JOB     the job's name                FMI_SIZE  how many there are
    FMI_KEY     what only the ranks know, with which they prove to each other who they are
    FMI_TOKEN   what admits the job to the server, if that has a secret
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from fmi_client import sync
from fmi_client.errors import FmiError

PLACE = ("FMI_SERVER", "FMI_JOB", "FMI_RANK", "FMI_SIZE")

TIMEOUT = 60.0
"""Seconds to join, and for each operation."""


def join() -> sync.Communicator:
    """Join the job that the environment names, as the rank that it names: our COMM_WORLD.

    Raises:
        SystemExit: this process was not started as a rank; the text names what is missing.
        FmiError: the others did not come within `TIMEOUT`, or the server cannot be reached.
    """
    if missing := [name for name in PLACE if not os.environ.get(name)]:
        sys.exit(f"Error: a rank needs {', '.join(missing)} in its environment")
    server, job, rank, size = (os.environ[name] for name in PLACE)
    return sync.connect(server, job=job, rank=int(rank), size=int(size), timeout=TIMEOUT)


def main(work: Callable[[sync.Communicator], bool]) -> None:
    """Be a rank of the program that this is, or start its ranks here; exits with a code.

    Args:
        work: what each rank does; returns whether the result is right.
    """
    if "FMI_RANK" in os.environ:
        sys.exit(_be_rank(work))
    from workflow.launch import run_self

    run_self()


def _be_rank(work: Callable[[sync.Communicator], bool]) -> int:
    try:
        with join() as comm:
            return 0 if work(comm) else 1
    except FmiError as error:  # says what failed, and which rank: a traceback would add nothing
        print(f"rank {os.environ['FMI_RANK']}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
