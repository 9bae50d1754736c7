"""Mean and variance of data that no rank has all of, without the loss of digits of sums of squares.

Each rank makes a summary of its rows: how many, their mean, and the sum of squared distances from
that mean. A reduction merges two summaries into that of both, by the formula of Chan, Golub and
LeVeque (1979, "Updating formulae and a pairwise algorithm for computing sample variances").
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import fmi_client
from examples.ranks import main
from fmi_client import sync
from workflow.demo.catalogue import load_catalogue

Floats = NDArray[np.float64]
NAMES = ("u", "g", "r", "i", "z", "redshift")


def work(comm: sync.Communicator) -> bool:
    """Return whether mean and variance are those of one process that has all rows."""
    # Rank 0 reads, and hands the rows out. Parts need not be equal: there is no Scatterv.
    rows = parts = None
    if comm.rank == 0:
        catalogue = load_catalogue()  # real magnitudes and redshifts of 14,906 galaxies
        rows = np.column_stack([catalogue.magnitudes, catalogue.redshift])
        parts = np.array_split(rows, comm.size)
    mine = comm.scatter(parts)

    # A function of one's own combines in rank order, unless it says that order does not matter.
    summary = comm.allreduce(summarize(mine), fmi_client.custom(merge))
    count, mean, squares = summary
    variance = squares / count

    right = True
    if rows is not None:
        right = bool(
            np.allclose(mean, rows.mean(axis=0), rtol=1e-12)
            and np.allclose(variance, rows.var(axis=0), rtol=1e-12)
        )
        for name, *values in zip(NAMES, mean, variance, strict=True):
            print(f"{name:8}  mean {values[0]:9.6f}  variance {values[1]:9.6f}")
        verdict = "right to 12 digits, beside numpy's two passes" if right else "WRONG"
        print(f"{count[0]:,.0f} galaxies on {comm.size} rank(s): {verdict}")
    return right


def summarize(rows: Floats) -> Floats:
    """Return count, mean and sum of squared distances from it of each column: (3, columns)."""
    if not len(rows):
        return np.zeros((3, rows.shape[1]))
    mean = rows.mean(axis=0)
    return np.stack([np.full_like(mean, len(rows)), mean, ((rows - mean) ** 2).sum(axis=0)])


def merge(left: Any, right: Any) -> Floats:
    """Merge two summaries; neither is changed."""
    (n, mean, squares), (m, other, more) = left, right
    total = np.maximum(n + m, 1)  # two without rows make one without rows
    distance = other - mean
    return np.stack(
        [n + m, mean + distance * (m / total), squares + more + distance**2 * (n * m / total)]
    )


if __name__ == "__main__":
    main(work)
