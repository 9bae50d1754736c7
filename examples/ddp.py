"""Train by DistributedDataParallel, as any such program does; it knows of no backend but its name.

A small network predicts the redshift of a galaxy from its brightness in five colours. Each rank
has its share of each epoch's rows, and DDP averages the gradients. On one machine, with torchrun::

    torchrun --nproc-per-node 3 -m examples.ddp
    FMI_SERVER=host:10000 torchrun --nproc-per-node 3 -m examples.ddp --backend fmi

On machines none of which accepts connections, with RANK and WORLD_SIZE in each one's environment::

    python -m examples.ddp --backend fmi --init-method "fmi://host:10000/job?key=…"
"""

from __future__ import annotations

import argparse
import hashlib

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from workflow.demo.catalogue import load_catalogue

SEED = 2026


def main() -> None:
    args = arguments()
    dist.init_process_group(args.backend, init_method=args.init_method)
    try:
        model = train(galaxies(), args)
        print(f"rank {dist.get_rank()}: weights {digest(model)}", flush=True)
        if args.save and dist.get_rank() == 0:
            torch.save(model.state_dict(), args.save)
    finally:
        dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--backend", default="gloo", help="that of torch.distributed")
    parser.add_argument("--init-method", default="env://", help="where the ranks meet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="rows of each rank in a step")
    parser.add_argument("--hidden", type=int, default=64, help="width of the two hidden layers")
    parser.add_argument("--save", metavar="FILE.pt", help="where rank 0 writes the weights")
    return parser.parse_args()


def train(rows: TensorDataset, args: argparse.Namespace) -> nn.Module:
    """Return the trained network, the same on all ranks."""
    torch.manual_seed(SEED)
    model = DistributedDataParallel(network(args.hidden))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(rows, seed=SEED)
    loader = DataLoader(rows, args.batch, sampler=sampler)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)  # another order of the rows
        total = torch.zeros(2)
        for inputs, target in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), target)
            loss.backward()  # type: ignore[no-untyped-call]  # averages over the ranks meanwhile
            optimizer.step()
            total += torch.tensor([loss.item(), 1.0])
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {total[0] / total[1]:.6f}", flush=True)
    unwrapped: nn.Module = model.module
    return unwrapped


def network(hidden: int) -> nn.Module:
    """Return an untrained one: 5 inputs, 1 output."""
    layers = nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(hidden, 1))


def galaxies() -> TensorDataset:
    """Return inputs (N, 5) and redshift (N, 1), float32: 11,873 galaxies of the SDSS."""
    catalogue = load_catalogue()
    rows = catalogue.split == "train"
    magnitudes = catalogue.magnitudes[rows]
    # Colours and one magnitude: five magnitudes of a galaxy are nearly the same number.
    inputs = np.column_stack([-np.diff(magnitudes), magnitudes[:, 2]])
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    target = catalogue.redshift[rows, None]
    return TensorDataset(*(torch.tensor(each, dtype=torch.float32) for each in (inputs, target)))


def digest(model: nn.Module) -> str:
    """Return a hash of all bits of the weights."""
    hashed = hashlib.sha256()
    for weights in model.parameters():
        hashed.update(weights.detach().numpy().tobytes())
    return hashed.hexdigest()[:16]


if __name__ == "__main__":
    main()
