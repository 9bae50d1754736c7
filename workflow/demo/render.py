"""Draw galaxies and stars through a point-spread function, exactly, as sums of Gaussians.

A profile that is a mixture of Gaussians, convolved with a point-spread function that is one, is
again a mixture of Gaussians (Hogg & Lang 2013, PASP 125, 719): no grid, no FFT, one `exp` per pixel
and component.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 32
PIXEL_SCALE = 0.396  # arcsec per pixel of the SDSS camera

Floats = NDArray[np.float64]


class Mixture(NamedTuple):
    """A circular profile of total flux 1 and half-light radius 1.

    Attributes:
        weights: (K,) share of the flux in each Gaussian; sums to 1.
        variances: (K,) in units of the half-light radius squared.
    """

    weights: Floats
    variances: Floats


# Our own fits, by expectation-maximisation, to exp(-1.678 r) and exp(-7.669 r^(1/4)). As in SDSS
# the profiles end smoothly, between 3.2 and 4 (exponential) and 5.6 and 7 half-light radii.
# tests/science/test_render.py compares them with the formulae.
EXPONENTIAL = Mixture(
    np.array([0.00408, 0.05206, 0.33707, 0.60679]),
    np.array([0.0091423, 0.067147, 0.3284, 1.3368]),
)
DE_VAUCOULEURS = Mixture(
    np.array([0.00886, 0.04338, 0.11610, 0.20981, 0.28803, 0.33382]),
    np.array([0.0001703, 0.0026746, 0.021944, 0.13484, 0.74085, 5.2262]),
)


class Sources(NamedTuple):
    """S sources on one cutout.

    Attributes:
        flux: (S, B) nanomaggies per band.
        centre: (S, 2) x and y in pixels from the middle of the cutout.
        half_light: (S,) radius in pixels, of the circle of the same area; 0 is a star.
        axis_ratio: (S,) minor over major, in (0, 1].
        angle: (S,) of the major axis from x, radians.
        bulge: (S,) share of the light in the de Vaucouleurs profile, the rest is exponential.
    """

    flux: Floats
    centre: Floats
    half_light: Floats
    axis_ratio: Floats
    angle: Floats
    bulge: Floats


def render(sources: Sources, psf: Floats, side: int = SIDE) -> NDArray[np.float32]:
    """Noise-free image of the sources.

    Args:
        sources: what to draw; light that falls outside the cutout is lost, as in a real one.
        psf: (B, 3, 6) as in `Epochs.psf`. SDSS fits it to pixels, so it contains the pixel's own
            response and is evaluated at pixel centres.
        side: of the cutout, pixels.

    Returns:
        (B, side, side) float32, nanomaggies per pixel.
    """
    weights, shapes = _profiles(sources)
    share = weights[:, :, None] * psf[:, None, None, :, 0]
    flux = sources.flux.T[:, :, None, None] * share
    mean = (sources.centre[:, None, :] + psf[:, None, :, 1:3])[:, :, None]
    covariance = shapes[:, :, None] + psf[:, None, None, :, 3:]
    return _add_up(flux, mean, covariance, side)


def _add_up(flux: Floats, mean: Floats, covariance: Floats, side: int) -> NDArray[np.float32]:
    """Sum of Gaussians (B, ...) of total flux `flux`, at pixel centres: (B, side, side).

    No matrix product: BLAS would start threads for it, and on busy cores wait ten times as long.
    """
    xx, yy, xy = np.moveaxis(covariance, -1, 0)
    mx, my = np.moveaxis(mean, -1, 0)
    determinant = xx * yy - xy**2
    a, b, c = yy / determinant, xx / determinant, -xy / determinant
    px, py = a * mx + c * my, b * my + c * mx
    # A share of 0 is no light, but has no logarithm.
    peak = np.maximum(flux / (2 * np.pi * np.sqrt(determinant)), np.finfo(np.float64).tiny)
    constant = np.log(peak) - (px * mx + py * my) / 2
    axis = np.arange(side) - (side - 1) / 2
    along_x = constant[..., None] + px[..., None] * axis - a[..., None] / 2 * axis**2
    along_y = py[..., None] * axis - b[..., None] / 2 * axis**2
    exponent = -c[..., None, None].astype(np.float32) * np.outer(axis, axis).astype(np.float32)
    exponent += along_x[..., None, :].astype(np.float32)
    exponent += along_y[..., None].astype(np.float32)
    light = np.exp(exponent, out=exponent).reshape(len(flux), -1, side, side)
    image: NDArray[np.float32] = light.sum(axis=1)
    return image


def _profiles(sources: Sources) -> tuple[Floats, Floats]:
    """Flux shares (S, K) and covariances (S, K, 3: xx, yy, xy) of the unblurred profiles."""
    bulge = sources.bulge[:, None]
    weights = np.concatenate(
        [bulge * DE_VAUCOULEURS.weights, (1 - bulge) * EXPONENTIAL.weights], axis=1
    )
    variances = np.concatenate([DE_VAUCOULEURS.variances, EXPONENTIAL.variances])
    q, cos, sin = sources.axis_ratio, np.cos(sources.angle), np.sin(sources.angle)
    shape = np.stack(
        [cos**2 / q + sin**2 * q, sin**2 / q + cos**2 * q, cos * sin * (1 / q - q)], axis=-1
    )
    shape *= sources.half_light[:, None] ** 2
    return weights, variances[:, None] * shape[:, None, :]
