"""Which algorithm combines what, and that all of them give every rank the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fmi_client import reductions
from fmi_client.communicator import Communicator
from fmi_client.errors import CollectiveMismatch
from fmi_client.ops import MAX, PROD, SUM, Op
from tests.support import run_ranks


@pytest.mark.parametrize(
    ("size", "algorithm"),
    [
        *((size, None) for size in (2, 3, 4, 5, 8)),
        *((size, name) for size in (2, 4, 7, 8) for name in ("doubling", "ring")),
        *((size, "halving") for size in (2, 4, 8, 16)),
    ],
)
async def test_large_arrays_are_added_to_equal_bits(size: int, algorithm: Any) -> None:
    count = reductions.LARGE_BYTES_OF_TWO // 4 + 13
    arrays = [np.random.default_rng(r).normal(size=count).astype("f4") for r in range(size)]
    results = await run_ranks(
        size, lambda comm: comm.allreduce(arrays[comm.rank], algorithm=algorithm)
    )
    exact = np.sum(arrays, axis=0, dtype="f8")
    assert all(got.tobytes() == results[0].tobytes() for got in results)
    np.testing.assert_allclose(results[0], exact, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 8])
async def test_large_arrays_are_added_and_scattered(size: int) -> None:
    arrays = [np.random.default_rng(r).normal(size=100_003).astype("f4") for r in range(size)]
    results = await run_ranks(size, lambda comm: comm.reduce_scatter(arrays[comm.rank]))
    exact = np.sum(arrays, axis=0, dtype="f8")
    for got, part in zip(results, np.array_split(exact, size), strict=True):
        np.testing.assert_allclose(got, part, atol=1e-5)


def halves(size: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(count, generator=generator).to(dtype) for _ in range(size)]


@pytest.mark.parametrize("op", [SUM, PROD, MAX])
@pytest.mark.parametrize(
    ("size", "count"), [(2, 1001), (3, 1001), (7, 1001), (3, 70_001), (8, 70_001)]
)
async def test_halves_have_the_same_bits_by_numpy_and_torch(size: int, count: int, op: Op) -> None:
    tensors = halves(size, count, torch.float16)
    torched = await run_ranks(size, lambda comm: comm.allreduce(tensors[comm.rank], op))
    numpied = await run_ranks(size, lambda comm: comm.allreduce(tensors[comm.rank].numpy(), op))
    assert {got.numpy().tobytes() for got in torched} == {got.tobytes() for got in numpied}
    assert len({got.tobytes() for got in numpied}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
async def test_halves_are_rounded_after_each_combination(dtype: torch.dtype) -> None:
    a, b, c, d = halves(4, 1001, dtype)
    results = await run_ranks(4, lambda comm: comm.allreduce((a, b, c, d)[comm.rank]))

    def add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left.float() + right.float()).to(dtype)

    assert all(torch.equal(got, add(add(a, b), add(c, d))) for got in results)
    once = (a.float() + b.float() + c.float() + d.float()).to(dtype)
    assert not torch.equal(results[0], once)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(
    ("size", "count", "roundings"), [(8, 1001, 3), (7, 1001, 3), (8, 70_001, 3), (7, 70_001, 6)]
)
async def test_halves_are_rounded_as_often_as_documented(
    size: int, count: int, roundings: int, dtype: torch.dtype, unit: float
) -> None:
    tensors = [tensor.abs() for tensor in halves(size, count, dtype)]
    total = (await run_ranks(size, lambda comm: comm.allreduce(tensors[comm.rank])))[0].double()
    exact = torch.stack(tensors).double().sum(0)
    error = ((total - exact).abs() / exact).max()
    assert unit / 2 < error <= (1 + unit) ** roundings - 1


def test_which_algorithm_when() -> None:
    small, large = reductions.LARGE_BYTES, reductions.LARGE_BYTES_OF_TWO
    names = [reductions.choose(small - 1, size) for size in (2, 3, 8)]
    assert names == ["doubling"] * 3
    assert [reductions.choose(small, size) for size in (2, 3, 8)] == ["doubling", "ring", "halving"]
    assert reductions.choose(large, 2) == "halving"


async def test_an_algorithm_that_cannot_do_it_is_refused() -> None:
    array = np.zeros(4)
    with pytest.raises(ValueError, match="halving needs 2, 4, 8"):
        await run_ranks(3, lambda comm: comm.allreduce(array, algorithm="halving"))
    with pytest.raises(ValueError, match="commutative"):
        await run_ranks(2, lambda comm: comm.allreduce(1, algorithm="ring"))


async def test_ranks_that_want_different_algorithms_find_out() -> None:
    async def rank(comm: Communicator) -> None:
        name: Any = "ring" if comm.rank else "doubling"
        with pytest.raises(CollectiveMismatch, match="ring"):
            await comm.allreduce(np.zeros(4), algorithm=name)

    await run_ranks(2, rank)


async def test_the_environment_names_an_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = reductions.allreduce

    def allreduce(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return plain(*arguments)

    monkeypatch.setattr(reductions, "allreduce", allreduce)
    for name in ("ring", "rign"):
        monkeypatch.setenv("FMI_ALLREDUCE", name)
        reductions.preferred.cache_clear()
        if name == "ring":
            await run_ranks(2, lambda comm: comm.allreduce(np.zeros(4)))
        else:
            with pytest.raises(ValueError, match="none of doubling, halving, ring"):
                await run_ranks(1, lambda comm: comm.allreduce(np.zeros(4)))
    reductions.preferred.cache_clear()
    assert asked == ["ring", "ring"]
