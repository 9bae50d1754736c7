"""A histogram of data that no rank has all of: the redshifts of 14,906 galaxies.

All bins must have the same edges, and those follow from the lowest and the highest value of all:
so there are three allreduces, of a minimum, a maximum and a sum.
"""

from __future__ import annotations

import numpy as np

import fmi_client
from examples.ranks import main
from fmi_client import sync
from workflow.demo.catalogue import load_catalogue

BINS = 12


def work(comm: sync.Communicator) -> bool:
    """Return whether the counts are those of one process that has all values."""
    everything = load_catalogue().redshift  # real ones, from the Sloan Digital Sky Survey
    mine = everything[comm.rank :: comm.size]

    # A rank without values, if there are more ranks than galaxies, must not change the result:
    # infinity is the neutral element of a minimum.
    low = comm.allreduce(mine.min(initial=np.inf), fmi_client.MIN)
    high = comm.allreduce(mine.max(initial=-np.inf), fmi_client.MAX)

    counts, edges = np.histogram(mine, BINS, range=(low, high))
    comm.allreduce(counts, out=counts)  # in place, as with MPI.IN_PLACE

    exact, exact_edges = np.histogram(everything, BINS)
    right = np.array_equal(counts, exact) and np.array_equal(edges, exact_edges)
    if comm.rank == 0:
        for start, count in zip(edges, counts, strict=False):
            bar = "#" * round(50 * count / counts.max())
            print(f"z from {start:.3f} {count:6,} {bar}".rstrip())
        verdict = "right, each bin as numpy.histogram has it" if right else "WRONG"
        print(f"{counts.sum():,} galaxies on {comm.size} rank(s): {verdict}")
    return right


if __name__ == "__main__":
    main(work)
