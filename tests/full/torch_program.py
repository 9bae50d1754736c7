"""A rank of several: what torch builds on a process group, each part against one process alone."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

SIZE = int(os.environ["WORLD_SIZE"])
ROWS, STEPS = 8, 3


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def batch(step: int) -> Tensor:
    return torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(step))


def trained(net: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(STEPS):
        net(batch(step)[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alone() -> list[Tensor]:
    """The weights as one process gets them from all rows."""
    net = model()
    trained(net, slice(None))
    return [parameter.detach() for parameter in net.parameters()]


def mine(rank: int) -> slice:
    share = ROWS // SIZE
    return slice(rank * share, (rank + 1) * share)


def check_fully_sharded(rank: int) -> None:
    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (SIZE,)))
    trained(net, mine(rank))
    for got, want in zip(net.parameters(), alone(), strict=True):
        torch.testing.assert_close(got.full_tensor().detach(), want)


def check_data_parallel(rank: int) -> None:
    net = model()
    trained(DistributedDataParallel(net, bucket_cap_mb=1), mine(rank))
    for got, want in zip(net.parameters(), alone(), strict=True):
        torch.testing.assert_close(got.detach(), want)


def check_hook_that_waits_in_a_callback() -> None:
    net = nn.Linear(64, 64)
    parallel = DistributedDataParallel(net)
    state = power_sgd.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    parallel.register_comm_hook(state, power_sgd.powerSGD_hook)
    for step in range(4):
        parallel(torch.randn(4, 64, generator=torch.Generator().manual_seed(step))).sum().backward()
    grads = [torch.empty(64, 64) for _ in range(SIZE)]
    dist.all_gather(grads, net.weight.grad)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def check_mesh(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    ones = torch.ones(3)
    assert functional.all_reduce(ones * rank, "sum", mesh["rows"])[0] == rank + (rank + 2) % 4
    pair = functional.all_gather_tensor(ones[:1] * rank, 0, mesh["columns"])
    assert pair.tolist() == [rank // 2 * 2, rank // 2 * 2 + 1]


def check_distributed_tensors() -> None:
    mesh = init_device_mesh("cpu", (SIZE,))
    whole = torch.arange(16.0).reshape(4, 4)
    shards = distribute_tensor(whole, mesh, [Shard(0)])
    product = shards @ shards.redistribute(mesh, [Replicate()])
    assert torch.equal(product.full_tensor(), whole @ whole)


def check_batches(rank: int) -> None:
    one, two = torch.ones(2), torch.ones(3)
    with dist._coalescing_manager():
        dist.all_reduce(one)
        dist.all_reduce(two)
    assert one.tolist() == [SIZE] * 2
    assert two.tolist() == [SIZE] * 3
    got = torch.zeros(2)
    send = dist.P2POp(dist.isend, torch.full((2,), float(rank)), (rank + 1) % SIZE)
    receive = dist.P2POp(dist.irecv, got, (rank - 1) % SIZE)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    assert got.tolist() == [(rank - 1) % SIZE] * 2


def main(address: str, rank: int) -> None:
    place = f"fmi://{address}/programs"
    dist.init_process_group("fmi", init_method=place, rank=rank, world_size=SIZE)
    check_fully_sharded(rank)
    check_data_parallel(rank)
    check_hook_that_waits_in_a_callback()
    check_mesh(rank)
    check_distributed_tensors()
    check_batches(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
