"""Redshift metrics that merge exactly: from sums that add up, and from all residuals.

The residual is dz = (z_phot - z_spec) / (1 + z_spec). Definitions:

* MAE, MSE: mean of |z_phot - z_spec| and of its square
* bias: mean of dz
* NMAD ("precision" in the reference): 1.48 median(|dz - median(dz)|)
  (Hoaglin, Mosteller & Tukey 1983; Brammer et al. 2008, ApJ 686, 1503)
* R2 = 1 - sum (z_phot - z_spec)^2 / sum (z_spec - mean)^2

Rows whose z_phot is NaN take no part: that is how `inference` marks a row it excludes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Below this share of sum(z_spec^2) the variance is rounding, and R2 has no meaning.
NO_VARIANCE = 1e-9
NAMED = 5  # excluded rows that messages and records name; the predictions mark all of them


def used(z_phot: Array) -> NDArray[np.bool_]:
    """Which rows count, (N,) bool."""
    return ~np.isnan(z_phot)


def sums(z_phot: Array, z_spec: Array) -> NDArray[np.float64]:
    """Six sums over the rows that count; those of disjoint rows add up to those of all.

    Args:
        z_phot, z_spec: (N,) float32 or float64; N may be 0.

    Returns:
        (6,) float64: rows, |d|, d^2, dz, z_spec, z_spec^2.
    """
    difference, z, dz = _residuals(z_phot, z_spec)
    return np.array(
        [len(z), np.abs(difference).sum(), (difference**2).sum(), dz.sum(), z.sum(), (z**2).sum()]
    )


def nmad(z_phot: Array, z_spec: Array) -> float | None:
    """1.48 median(|dz - median(dz)|) over the rows that count; None without any."""
    dz = _residuals(z_phot, z_spec)[2]
    return float(1.48 * np.median(np.abs(dz - np.median(dz)))) if len(dz) else None


def from_sums(total: Array, precision: float | None) -> dict[str, float | None]:
    """All metrics.

    Args:
        total: what `sums` returns, added up over the ranks.
        precision: `nmad` of all rows.

    Returns:
        mae, mse, bias, nmad, r2. Without rows all are None; r2 also where all z_spec are equal
        (one row, say).
    """
    rows, absolute, squared, dz, z, z_squared = (float(value) for value in total)
    if rows == 0:
        return dict.fromkeys(("mae", "mse", "bias", "nmad", "r2"))
    variance = z_squared - z * z / rows
    r2 = 1 - squared / variance if variance > NO_VARIANCE * z_squared else None
    return {
        "mae": absolute / rows,
        "mse": squared / rows,
        "bias": dz / rows,
        "nmad": precision,
        "r2": r2,
    }


def compute(z_phot: Array, z_spec: Array) -> dict[str, float | None]:
    """All metrics of rows that are in one place."""
    return from_sums(sums(z_phot, z_spec), nmad(z_phot, z_spec))


def _residuals(z_phot: Array, z_spec: Array) -> tuple[Array, Array, Array]:
    mask = used(z_phot)
    z = z_spec[mask].astype(np.float64)
    difference = z_phot[mask] - z  # float64, since z is
    return difference, z, difference / (1 + z)
