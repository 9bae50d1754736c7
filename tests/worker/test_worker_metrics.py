"""Metrics: the same numbers for every split, and those of a direct computation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lambda_worker import metrics

Columns = tuple[NDArray[np.float32], NDArray[np.float64]]


def columns(rows: int, seed: int) -> Columns:
    random = np.random.default_rng(seed)
    z_spec = random.uniform(0.001, 1.2, rows)
    z_phot = (z_spec + random.normal(0.002, 0.02, rows)).astype(np.float32)
    return z_phot, z_spec


def direct(z_phot: NDArray[np.float32], z_spec: NDArray[np.float64]) -> dict[str, float]:
    """The definitions, spelled out once more."""
    error = z_phot.astype(np.float64) - z_spec
    dz = error / (1 + z_spec)
    return {
        "mae": float(np.mean(np.abs(error))),
        "mse": float(np.mean(np.square(error))),
        "bias": float(np.mean(dz)),
        "nmad": float(1.48 * np.median(np.abs(dz - np.median(dz)))),
        "r2": float(1 - np.sum(np.square(error)) / (np.var(z_spec) * len(z_spec))),
    }


@given(
    st.integers(2, 300),
    st.integers(0, 2**32 - 1),
    st.lists(st.floats(0, 1), max_size=8),
)
def test_any_split_gives_the_numbers_of_a_direct_computation(
    rows: int, seed: int, cuts: list[float]
) -> None:
    z_phot, z_spec = columns(rows, seed)
    edges = [0, *sorted(int(cut * rows) for cut in cuts), rows]  # empty parts are among them
    parts = [slice(a, b) for a, b in pairwise(edges)]
    total = np.sum([metrics.sums(z_phot[part], z_spec[part]) for part in parts], axis=0)
    merged = metrics.from_sums(total, metrics.nmad(z_phot, z_spec))
    assert merged == pytest.approx(direct(z_phot, z_spec), rel=1e-6, abs=1e-9)


def test_known_values() -> None:
    z_spec = np.array([0.0, 1.0, 3.0])
    z_phot = np.array([0.5, 1.0, 2.0], np.float32)
    found = metrics.compute(z_phot, z_spec)
    assert found["mae"] == pytest.approx(0.5)
    assert found["mse"] == pytest.approx(1.25 / 3)
    assert found["bias"] == pytest.approx((0.5 + 0 - 0.25) / 3)
    assert found["nmad"] == pytest.approx(1.48 * 0.25)  # of deviations 0.5, 0 and 0.25
    assert found["r2"] == pytest.approx(1 - 1.25 / (42 / 9))


def test_rows_marked_nan_do_not_count() -> None:
    z_phot, z_spec = columns(50, 1)
    marked = z_phot.copy()
    marked[[3, 7]] = np.nan
    kept = np.delete(np.arange(50), [3, 7])
    z_spec_bad = z_spec.copy()
    z_spec_bad[3] = np.inf
    assert metrics.compute(marked, z_spec_bad) == metrics.compute(z_phot[kept], z_spec[kept])


def test_without_rows_nothing_is_known() -> None:
    assert set(metrics.compute(np.empty(0, np.float32), np.empty(0)).values()) == {None}


def test_of_one_row_all_but_r2_is_known() -> None:
    found = metrics.compute(np.array([0.2], np.float32), np.array([0.1]))
    assert found["nmad"] == 0.0
    assert found["r2"] is None
    assert found["mae"] == pytest.approx(0.1, rel=1e-6)


def test_equal_redshifts_have_no_r2() -> None:
    z_phot = np.linspace(0, 1, 1000, dtype=np.float32)
    assert metrics.compute(z_phot, np.full(1000, 0.1))["r2"] is None
