"""Simulated SDSS cutouts of real galaxies: `make_dataset`, `write_pt`.

Real: magnitudes, redshifts, colours and luminosities, the point-spread function, sky, gain and
noise. Simulated: every pixel. docs/demo-data.md says which is which, and how far to trust it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lambda_worker.atomic import replacing
from workflow.demo.catalogue import (
    BANDS,
    SPLITS,
    Catalogue,
    Epochs,
    Split,
    load_catalogue,
    load_epochs,
)
from workflow.demo.render import PIXEL_SCALE, SIDE, Floats, Sources, render

ZERO_POINT = 22.5  # AB magnitude of one nanomaggie
HUBBLE_DISTANCE = 299_792.458 / 70.0  # Mpc, with H0 = 70 km/s/Mpc as the catalogue's luminosities
OMEGA_MATTER = 0.3

# How sharply the profile follows the colour. Real galaxies scatter more: this, more than anything
# else here, sets how well redshifts can be had from the simulated pixels.
TYPE_WIDTH = 0.1  # magnitudes of g - r
TYPE_SCATTER = 0.1  # of the share of the de Vaucouleurs profile

# About 8 objects per square arcminute down to r = 22.5 at high Galactic latitude, half of them
# stars, their counts rising as 10^(0.4 r): round numbers for SDSS imaging.
NEIGHBOURS_PER_ARCMIN2 = 8.0
NEIGHBOUR_FAINTEST, NEIGHBOUR_BRIGHTEST, COUNT_SLOPE = 22.5, 16.0, 0.4
NEIGHBOUR_MARGIN = 4  # pixels beyond the cutout's edge from where light still comes in


class GalaxyArrays(NamedTuple):
    """N objects.

    Attributes:
        images: (N, 5, 32, 32) float32, nanomaggies per pixel, ugriz, sky subtracted.
        magnitudes: (N, 5) float32, AB, ugriz, corrected for Galactic extinction.
        redshift: (N,) float32, spectroscopic.
        row: (N,) int64, row of `load_catalogue()` that the object was painted from.
    """

    images: NDArray[np.float32]
    magnitudes: NDArray[np.float32]
    redshift: NDArray[np.float32]
    row: NDArray[np.int64]


def make_dataset(
    rows: int,
    seed: int = 0,
    split: Split | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GalaxyArrays:
    """Simulate cutouts of catalogue galaxies; about a millisecond each.

    Args:
        rows: how many; beyond the catalogue's length its rows repeat, with new noise, orientation
            and neighbours.
        seed: the same seed, split and rows give the same bits; fewer rows give a prefix of more.
        split: take galaxies of this split only; None takes all.
        progress: called with (objects done, rows), now and then and at the end.

    Returns:
        The arrays, in an order shuffled by the seed.

    Raises:
        ValueError: rows or seed is negative, or the split does not exist.
    """
    if rows < 0 or seed < 0:
        raise ValueError(f"rows and seed must not be negative, got {rows} and {seed}")
    catalogue, epochs = load_catalogue(), load_epochs()
    order = np.random.default_rng(seed).permutation(_rows_of(catalogue, split))
    row = np.resize(order, rows).astype(np.int64)
    images = np.empty((rows, len(BANDS), SIDE, SIDE), np.float32)
    for number in range(rows):
        # A stream per object: neither the number of rows nor another object's draws change it.
        stream = np.random.SeedSequence(seed, spawn_key=(int(row[number]), number))
        rng = np.random.default_rng(stream)
        images[number] = simulate(catalogue, int(row[number]), epochs, rng)
        if progress and (number % 256 == 255 or number == rows - 1):
            progress(number + 1, rows)
    magnitudes, redshift = catalogue.magnitudes[row], catalogue.redshift[row]
    return GalaxyArrays(images, magnitudes.astype(np.float32), redshift.astype(np.float32), row)


def simulate(
    catalogue: Catalogue, row: int, epochs: Epochs, rng: np.random.Generator
) -> NDArray[np.float32]:
    """One noisy cutout (5, 32, 32) float32, nanomaggies, of one row under a random epoch."""
    epoch = int(rng.integers(len(epochs.sky)))
    target, others = _target(catalogue, row, rng), _neighbours(catalogue, rng)
    sources = Sources(*(np.concatenate(columns) for columns in zip(target, others, strict=True)))
    return add_noise(render(sources, epochs.psf[epoch]), epochs, epoch, rng)


def add_noise(
    image: NDArray[np.float32], epochs: Epochs, epoch: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """What the camera makes of a noise-free image.

    Poisson electrons of object and sky, read noise and dark current are added, and the mean sky is
    subtracted again.

    Args:
        image: (5, side, side) nanomaggies.
        epochs, epoch: conditions, and which of them.

    Returns:
        The same shape, float32, nanomaggies.
    """
    calibration, sky, gain, dark = (
        column[epoch][:, None, None]
        for column in (epochs.calibration, epochs.sky, epochs.gain, epochs.dark_variance)
    )
    electrons = rng.poisson(np.maximum(image / calibration + sky, 0) * gain)
    noise = rng.standard_normal(image.shape, np.float32) * np.sqrt(dark)
    noisy: NDArray[np.float32] = ((electrons / gain + noise - sky) * calibration).astype(np.float32)
    return noisy


def write_pt(arrays: GalaxyArrays, path: str | Path) -> None:
    """Write a `TensorDataset` of images, magnitudes and redshift with `torch.save`.

    Magnitudes are stored as float64, like the project's real files: 164,160 bits of image and
    magnitudes a row. Redshift stays float32.

    Args:
        path: the .pt file; replaced as a whole or not at all.

    Raises:
        OSError: the folder cannot be made or the file not written; the text says why.
    """
    import torch
    from torch.utils.data import TensorDataset

    dataset = TensorDataset(
        torch.from_numpy(arrays.images),
        torch.from_numpy(arrays.magnitudes.astype(np.float64)),
        torch.from_numpy(arrays.redshift),
    )
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(dataset, file)
            file.flush()
        except RuntimeError as error:
            # torch reports a short write, whatever its cause, in its own words.
            raise OSError(errno.ENOSPC, f"disk full or file too large ({error})") from error


def flux(magnitude: Floats) -> Floats:
    """Nanomaggies of an AB magnitude."""
    converted: Floats = 10.0 ** ((ZERO_POINT - magnitude) / 2.5)
    return converted


def kpc_per_arcsec(redshift: float) -> float:
    """Proper size per angle in a flat universe (Hogg 1999, astro-ph/9905116), Simpson's rule."""
    z = np.linspace(0.0, redshift, 65)
    integrand = 1 / np.sqrt(OMEGA_MATTER * (1 + z) ** 3 + 1 - OMEGA_MATTER)
    weights = np.array([1, *[4, 2] * 31, 4, 1]) * redshift / (3 * 64)
    angular_distance = HUBBLE_DISTANCE * float(integrand @ weights) / (1 + redshift)
    return angular_distance * 1000 * np.pi / (180 * 3600)


def half_light_kpc(luminosity: float, bulge: float) -> tuple[float, float]:
    """Median half-light radius and its scatter in ln R (Shen et al. 2003, MNRAS 343, 978).

    Equations 14 to 16 with the r-band constants of their figure 4: early types at `bulge` 1, late
    types at 0, the geometric mean weighted by `bulge` between. Both scatter by equation 16.

    Args:
        luminosity: absolute r magnitude, 0.1-shifted, H0 = 70.
        bulge: share of the de Vaucouleurs profile, 0 to 1.

    Returns:
        kpc, and the dispersion of the natural logarithm.
    """
    relative = 10 ** (-0.4 * (luminosity + 20.52))
    early = -0.4 * 0.60 * luminosity - 4.63
    late = -0.4 * 0.21 * luminosity + (0.53 - 0.21) * np.log10(1 + relative) - 1.31
    scatter = 0.25 + (0.48 - 0.25) / (1 + relative**2)
    return float(10 ** (bulge * early + (1 - bulge) * late)), scatter


def bulge_share(luminosity: float, colour: float) -> float:
    """Mean share of the de Vaucouleurs profile: 1/2 at the red sequence's edge, 1 far above it.

    The edge is that of Zehavi et al. 2005 (ApJ 630, 1), g - r = 0.21 - 0.03 (M_r - 5 log h).

    Args:
        luminosity, colour: of the catalogue, 0.1-shifted, H0 = 70.
    """
    edge = 0.21 - 0.03 * (luminosity - 5 * np.log10(0.7))
    return float(1 / (1 + np.exp(-(colour - edge) / TYPE_WIDTH)))


def _rows_of(catalogue: Catalogue, split: str | None) -> NDArray[np.intp]:
    if split is None:
        return np.arange(len(catalogue.id))
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)} or None, got {split!r}")
    return np.flatnonzero(catalogue.split == split)


def _target(catalogue: Catalogue, row: int, rng: np.random.Generator) -> Sources:
    """The galaxy itself, near the middle of the cutout."""
    luminosity, colour = float(catalogue.luminosity[row]), float(catalogue.colour[row])
    share = bulge_share(luminosity, colour) + TYPE_SCATTER * rng.standard_normal()
    bulge = np.clip([share], 0.0, 1.0)
    median, scatter = half_light_kpc(luminosity, float(bulge[0]))
    radius = median * np.exp(scatter * rng.standard_normal())
    arcsec = radius / kpc_per_arcsec(float(catalogue.redshift[row]))
    return Sources(
        flux=flux(catalogue.magnitudes[row : row + 1]),
        centre=rng.uniform(-0.5, 0.5, (1, 2)),
        half_light=np.array([arcsec / PIXEL_SCALE]),
        axis_ratio=_axis_ratios(bulge, rng),
        angle=rng.uniform(0, np.pi, 1),
        bulge=bulge,
    )


def _axis_ratios(bulge: Floats, rng: np.random.Generator) -> Floats:
    """Oblate spheroids seen from random directions: thickness 0.2 of a pure disc to 0.6."""
    thickness = 0.2 + 0.4 * bulge
    cosine = rng.random(bulge.shape)
    ratios: Floats = np.sqrt(cosine**2 * (1 - thickness**2) + thickness**2)
    return ratios


def _neighbours(catalogue: Catalogue, rng: np.random.Generator) -> Sources:
    """Unrelated stars and galaxies in the field, with colours of random catalogue rows."""
    side = SIDE + 2 * NEIGHBOUR_MARGIN
    count = int(rng.poisson(NEIGHBOURS_PER_ARCMIN2 * (side * PIXEL_SCALE / 60) ** 2))
    r = NEIGHBOUR_FAINTEST + np.log10(rng.random(count)) / COUNT_SLOPE
    r = np.maximum(r, NEIGHBOUR_BRIGHTEST)
    colours = catalogue.magnitudes[rng.integers(len(catalogue.id), size=count)]
    star = rng.random(count) < 0.5
    arcsec = 0.8 * np.exp(0.4 * rng.standard_normal(count))
    return Sources(
        flux=flux(colours - colours[:, 2:3] + r[:, None]),
        centre=rng.uniform(-side / 2, side / 2, (count, 2)),
        half_light=np.where(star, 0.0, arcsec / PIXEL_SCALE),
        axis_ratio=_axis_ratios(np.zeros(count), rng),
        angle=rng.uniform(0, np.pi, count),
        bulge=np.zeros(count),
    )
