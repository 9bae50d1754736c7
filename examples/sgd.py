"""Train on data that is split between ranks: stochastic gradient descent, data-parallel.

A straight line predicts the redshift of a galaxy from its brightness in five colours. Every rank
holds the same weights, computes the gradient on its part of each batch, and an allreduce adds
those up. Sums are the same bits on all ranks, so the weights stay the same without being sent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from examples.ranks import main
from fmi_client import sync
from workflow.demo.catalogue import load_catalogue

Floats = NDArray[np.float64]
EPOCHS, BATCH, RATE = 20, 256, 0.05


def work(comm: sync.Communicator) -> bool:
    """Return whether all ranks have the weights that one process finds on all data."""
    inputs, redshift = training_data()
    weights = train(inputs, redshift, comm)

    everybodys = comm.allgather(weights)
    same = all(np.array_equal(weights, other) for other in everybodys)
    alone = train(inputs, redshift, None)
    right = same and np.allclose(weights, alone, rtol=1e-9, atol=1e-12)
    if comm.rank == 0:
        print(f"{len(redshift):,} galaxies, {EPOCHS} epochs of batches of {BATCH}")
        before, after = error(inputs, redshift, 0 * weights), error(inputs, redshift, weights)
        print(f"root mean square error: {before:.5f} before, {after:.5f} after")
        print("weights: " + " ".join(f"{weight:+.5f}" for weight in weights))
        off = np.abs(weights - alone).max()
        print(f"{comm.size} rank(s) with {'the same' if same else 'DIFFERENT'} bits,", end=" ")
        print(f"{off:.0e} from those of one process: {'right' if right else 'WRONG'}")
    return bool(right)


def train(inputs: Floats, target: Floats, comm: sync.Communicator | None) -> Floats:
    """Return the weights after `EPOCHS` epochs, of one process where there is no `comm`."""
    rank, size = (comm.rank, comm.size) if comm else (0, 1)
    weights = np.zeros(inputs.shape[1])
    random = np.random.default_rng(2026)  # the same order of rows on all ranks
    for _ in range(EPOCHS):
        order = random.permutation(len(target))
        for start in range(0, len(target), BATCH):
            batch = order[start : start + BATCH]
            mine = batch[rank::size]  # may be empty; the rank takes part in the sum all the same
            gradient = inputs[mine].T @ (inputs[mine] @ weights - target[mine])
            if comm:
                comm.allreduce(gradient, out=gradient)
            # Divide by the rows of all ranks: the mean of their means would be another number.
            weights -= RATE * gradient / len(batch)
    return weights


def training_data() -> tuple[Floats, Floats]:
    """Return inputs (N, 6), the last a constant 1, and redshifts (N,)."""
    catalogue = load_catalogue()
    rows = catalogue.split == "train"
    magnitudes = catalogue.magnitudes[rows]
    # Colours and one magnitude: five magnitudes of a galaxy are nearly the same number.
    inputs = np.column_stack([-np.diff(magnitudes), magnitudes[:, 2]])
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    return np.column_stack([inputs, np.ones(len(inputs))]), catalogue.redshift[rows]


def error(inputs: Floats, target: Floats, weights: Floats) -> float:
    """Return the root mean square of what the prediction is off by."""
    return float(np.sqrt(np.mean((inputs @ weights - target) ** 2)))


if __name__ == "__main__":
    main(work)
