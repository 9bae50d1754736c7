"""Estimate pi from random points: how many of the unit square lie within the quarter circle?

The ranks need to talk only once, at the end: an allreduce adds their counts.
"""

from __future__ import annotations

import math

import numpy as np

from examples.ranks import main
from fmi_client import sync

BLOCKS, POINTS = 64, 100_000


def work(comm: sync.Communicator) -> bool:
    """Return whether the estimate is within five standard errors of pi."""
    # Points come in blocks, each with random numbers of its own, and block b belongs to rank
    # b % size. So the estimate is the same for any number of ranks; with one seed for each rank it
    # would not be, and with the same seed for all of them every rank would draw the same points.
    seeds = np.random.SeedSequence(2026).spawn(BLOCKS)
    inside = sum(count(seeds[block]) for block in range(comm.rank, BLOCKS, comm.size))

    # Every rank gets the sum. Only rank 0 would: comm.reduce(inside, root=0).
    total = comm.allreduce(inside)

    points = BLOCKS * POINTS
    estimate = 4 * total / points
    # Each point is in or out, so the count is binomial: its variance is n p (1 - p).
    p = math.pi / 4
    error = 4 * math.sqrt(p * (1 - p) / points)
    right = bool(abs(estimate - math.pi) < 5 * error)
    if comm.rank == 0:
        print(f"{points:,} points on {comm.size} rank(s), {total:,} inside")
        print(f"pi is about {estimate:.6f}, off by {estimate - math.pi:+.6f}", end="; ")
        print(f"the standard error is {error:.6f}: {'right' if right else 'WRONG'}")
    return right


def count(seed: np.random.SeedSequence) -> int:
    """Draw one block; returns how many of its points lie inside."""
    x, y = np.random.default_rng(seed).random((2, POINTS))
    return int(np.count_nonzero(x * x + y * y < 1))


if __name__ == "__main__":
    main(work)
