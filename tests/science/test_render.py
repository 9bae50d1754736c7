"""The renderer against formulae and direct sums."""

from __future__ import annotations

import numpy as np
import pytest

from workflow.demo.catalogue import load_epochs
from workflow.demo.render import DE_VAUCOULEURS, EXPONENTIAL, Floats, Mixture, Sources, render

# b_n of I(r) = I_e exp(-b_n (r^(1/n) - 1)), such that half the light lies within r = 1.
SERSIC = [(EXPONENTIAL, 1, 1.67834699), (DE_VAUCOULEURS, 4, 7.66924944)]


def source(**changes: object) -> Sources:
    values: dict[str, object] = {
        "flux": np.full((1, 5), 100.0),
        "centre": np.zeros((1, 2)),
        "half_light": np.array([4.0]),
        "axis_ratio": np.array([1.0]),
        "angle": np.array([0.0]),
        "bulge": np.array([0.0]),
    }
    return Sources(**{**values, **changes})  # type: ignore[arg-type]


def psf(epoch: int = 0) -> Floats:
    return load_epochs().psf[epoch]


def moments(image: Floats) -> tuple[Floats, Floats]:
    """Centroid (x, y) from the middle, and variances (xx, yy, xy)."""
    axis = np.arange(image.shape[0]) - (image.shape[0] - 1) / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    weight = image / image.sum()
    mx, my = (weight * x).sum(), (weight * y).sum()
    dx, dy = x - mx, y - my
    second = np.array([(weight * a).sum() for a in (dx * dx, dy * dy, dx * dy)])
    return np.array([mx, my]), second


@pytest.mark.parametrize(("mixture", "n", "b"), SERSIC)
def test_mixture_follows_its_formula(mixture: Mixture, n: int, b: float) -> None:
    r = np.array([0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0])
    parts = mixture.weights / mixture.variances / (2 * np.pi)
    surface = (parts * np.exp(-(r[:, None] ** 2) / 2 / mixture.variances)).sum(axis=1)
    # The shape is compared; the formula's own flux beyond the truncation is not there.
    ratio = surface / np.exp(-b * r ** (1 / n))
    np.testing.assert_allclose(ratio / np.median(ratio), 1, atol=0.06)


@pytest.mark.parametrize(("mixture", "within"), [(EXPONENTIAL, 0.51), (DE_VAUCOULEURS, 0.545)])
def test_half_of_the_light_lies_within_the_half_light_radius(
    mixture: Mixture, within: float
) -> None:
    # A little more than half: the light beyond the truncation radius is missing.
    enclosed = (mixture.weights * (1 - np.exp(-0.5 / mixture.variances))).sum()
    assert mixture.weights.sum() == pytest.approx(1, abs=1e-4)
    assert enclosed == pytest.approx(within, abs=0.005)


@pytest.mark.parametrize("half_light", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("bulge", [0.0, 0.4, 1.0])
def test_all_flux_lands_on_a_large_enough_cutout(half_light: float, bulge: float) -> None:
    image = render(
        source(half_light=np.array([half_light]), bulge=np.array([bulge])), psf(), side=200
    )
    np.testing.assert_allclose(image.sum(axis=(1, 2), dtype=np.float64), 100.0, rtol=2e-4)


def test_a_compact_galaxy_keeps_its_flux_on_a_32_pixel_cutout() -> None:
    image = render(source(half_light=np.array([1.5])), psf())
    share = image.sum(axis=(1, 2)) / 100.0
    assert np.all(share > 0.96)
    assert np.all(share < 1.0)


def test_a_star_is_the_point_spread_function() -> None:
    image = render(source(half_light=np.array([0.0])), psf(3), side=33)
    axis = np.arange(33) - 16.0
    y, x = np.meshgrid(axis, axis, indexing="ij")
    for band, gaussians in enumerate(psf(3)):
        expected = np.zeros((33, 33))
        for amplitude, mx, my, xx, yy, xy in gaussians:
            offset = np.stack([x - mx, y - my], axis=-1)
            inverse = np.linalg.inv(np.array([[xx, xy], [xy, yy]]))
            exponent = np.einsum("...i,ij,...j", offset, inverse, offset)
            norm = 2 * np.pi * np.sqrt(xx * yy - xy**2)
            expected += 100 * amplitude * np.exp(-exponent / 2) / norm
        np.testing.assert_allclose(image[band], expected, rtol=1e-3, atol=1e-4)


def test_x_is_the_last_axis_and_moves_with_the_centre() -> None:
    still = moments(render(source(), psf(), side=128)[2])[0]
    moved = moments(render(source(centre=np.array([[3.0, -2.0]])), psf(), side=128)[2])[0]
    np.testing.assert_allclose(moved - still, [3.0, -2.0], atol=0.01)


def test_axis_ratio_and_angle_shape_the_galaxy() -> None:
    stretched = source(axis_ratio=np.array([0.25]), angle=np.array([np.pi / 6]))
    image = render(stretched, psf(), side=200)[2]
    star = render(source(half_light=np.array([0.0])), psf(), side=200)[2]
    xx, yy, xy = moments(image)[1] - moments(star)[1]
    values, vectors = np.linalg.eigh(np.array([[xx, xy], [xy, yy]]))
    assert values[0] / values[1] == pytest.approx(0.25**2, rel=0.02)
    assert abs(vectors[1, 1] / vectors[0, 1]) == pytest.approx(np.tan(np.pi / 6), rel=0.02)
    # The area, and so the circularised half-light radius, does not depend on the axis ratio.
    round_one = moments(render(source(), psf(), side=200)[2])[1] - moments(star)[1]
    assert np.sqrt(values[0] * values[1]) == pytest.approx(round_one[0], rel=0.02)


def test_sources_add_up() -> None:
    two = Sources(
        flux=np.full((2, 5), 50.0),
        centre=np.array([[0.0, 0.0], [5.0, 5.0]]),
        half_light=np.array([2.0, 0.0]),
        axis_ratio=np.array([0.5, 1.0]),
        angle=np.array([1.0, 0.0]),
        bulge=np.array([1.0, 0.0]),
    )
    alone = [Sources(*(column[k : k + 1] for column in two)) for k in range(2)]
    expected = render(alone[0], psf()) + render(alone[1], psf())
    np.testing.assert_allclose(render(two, psf()), expected, rtol=1e-4, atol=1e-5)
