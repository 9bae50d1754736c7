"""The packaged tables: real SDSS magnitudes and redshifts, and real observing conditions."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

BANDS = "ugriz"
PSF_COLUMNS = ("amp", "mx", "my", "vxx", "vyy", "vxy")
SPLITS = ("train", "val", "test")
Split = Literal["train", "val", "test"]
CATALOGUE = Path(__file__).with_name("catalogue.csv")
EPOCHS = Path(__file__).with_name("psf_sky_epochs.csv")

Floats = NDArray[np.float64]


class Catalogue(NamedTuple):
    """N galaxies of SDSS; see docs/demo-data.md for where each number comes from.

    Attributes:
        id: (N,) names of the rows.
        split: (N,) "train", "val" or "test".
        magnitudes: (N, 5) ugriz AB model magnitudes, corrected for Galactic extinction.
        errors: (N, 5) their standard errors, magnitudes (rounded to 0.001 in the file).
        redshift: (N,) spectroscopic.
        luminosity: (N,) absolute magnitude in the 0.1-shifted r band (H0 = 70 km/s/Mpc).
        colour: (N,) 0.1-shifted g - r.
    """

    id: NDArray[np.str_]
    split: NDArray[np.str_]
    magnitudes: Floats
    errors: Floats
    redshift: Floats
    luminosity: Floats
    colour: Floats


class Epochs(NamedTuple):
    """E real exposures of one spot of the sky in B = 5 bands, ugriz.

    Attributes:
        calibration: (E, B) nanomaggies per DN.
        sky: (E, B) sky level, DN per pixel.
        gain: (E, B) electrons per DN.
        dark_variance: (E, B) read noise and dark current, DN^2.
        psf: (E, B, 3, 6) Gaussians of the point-spread function: amplitude (sums to 1), mean x and
            y (pixels), variances xx, yy and covariance xy (pixels^2).
    """

    calibration: Floats
    sky: Floats
    gain: Floats
    dark_variance: Floats
    psf: Floats


@cache
def load_catalogue() -> Catalogue:
    """The packaged rows, all splits, in the file's order (which is shuffled)."""
    rows = _read(CATALOGUE)
    errors = _columns(rows, *(f"mmag_{band}" for band in BANDS)) / 1000
    return Catalogue(
        np.array([row["id"] for row in rows]),
        np.array([row["split"] for row in rows]),
        _columns(rows, *BANDS),
        errors,
        *_columns(rows, "redshift", "Mr01", "gr01").T,
    )


@cache
def load_epochs() -> Epochs:
    """The packaged exposures."""
    rows = sorted(_read(EPOCHS), key=lambda row: (int(row["epoch"]), BANDS.index(row["band"])))
    table = _columns(rows, "nmgy_per_dn", "sky_dn", "gain", "darkvar").reshape(-1, len(BANDS), 4)
    fields = [f"psf{k}_{name}" for k in range(3) for name in PSF_COLUMNS]
    psf = _columns(rows, *fields).reshape(-1, len(BANDS), 3, 6)
    psf[..., 0] /= psf[..., 0].sum(axis=2, keepdims=True)
    calibration, sky, gain, dark_variance = np.moveaxis(table, 2, 0)
    return Epochs(calibration, sky, gain, dark_variance, psf)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="ascii") as file:
        return list(csv.DictReader(file))


def _columns(rows: list[dict[str, str]], *names: str) -> Floats:
    return np.array([[float(row[name]) for name in names] for row in rows])
