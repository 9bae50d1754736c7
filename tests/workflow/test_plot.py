"""The plot: a picture that holds what it should."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest

from workflow.plot import redshift_png, save_plot

METRICS = {"nmad": 0.013, "bias": 0.0002, "r2": 0.923}


def pixels(picture: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(io.BytesIO(picture), format="png"))[..., :3]


def galaxies(rows: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    z_spec = random.gamma(3, 0.05, rows).astype(np.float32)
    return z_spec, z_spec + random.normal(0, 0.013, rows).astype(np.float32)


def test_it_is_a_png_of_a_sensible_size() -> None:
    picture = redshift_png(*galaxies(500), METRICS)
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", picture[16:24]) == (1050, 1200)
    assert 30_000 < len(picture) < 400_000


def test_the_density_shows_the_data() -> None:
    one, many = (pixels(redshift_png(*galaxies(rows), METRICS)) for rows in (1, 2000))
    # Coloured and not grey, left of the colour bar.
    coloured = [float((np.ptp(p[:, :880], axis=2) > 0.2).mean()) for p in (one, many)]
    assert coloured[1] > 20 * coloured[0] > 0


def test_outliers_have_lines() -> None:
    picture = pixels(redshift_png(*galaxies(500), METRICS))
    red = (picture[..., 0] > 0.7) & (picture[..., 1] < 0.4) & (picture[..., 2] < 0.4)
    assert red[:850].sum() > 300  # two dotted lines across the upper panel
    assert not red[900:].any()


@pytest.mark.parametrize("scatter", [0.0, 5.0])
def test_perfect_and_hopeless_predictions(scatter: float) -> None:
    z_spec, _ = galaxies(50)
    z_phot = z_spec + scatter * np.random.default_rng(0).normal(size=50)
    nmad = {"nmad": scatter, "bias": 0.0, "r2": None}
    assert redshift_png(z_spec, z_phot, nmad).startswith(b"\x89PNG")


def test_rows_without_a_prediction_are_left_out(tmp_path: Path) -> None:
    z_spec, z_phot = galaxies(200)
    z_phot[::2] = np.nan
    np.savez(tmp_path / "predictions.npz", z_spec=z_spec, z_phot=z_phot)
    url = (tmp_path / "redshift.png").as_uri()
    save_plot(str(tmp_path / "predictions.npz"), METRICS, url)
    expected = redshift_png(z_spec[1::2], z_phot[1::2], METRICS)
    drawn = (tmp_path / "redshift.png").read_bytes()
    assert np.array_equal(pixels(drawn), pixels(expected))


@pytest.mark.parametrize(("z_spec", "z_phot"), [(0.01, -0.02), (-0.5, -0.5), (0.1, -0.9)])
def test_galaxies_that_are_all_outside_the_panels(z_spec: float, z_phot: float) -> None:
    metrics = dict.fromkeys(("mae", "mse", "bias", "nmad", "r2"), 0.1)
    picture = redshift_png(np.full(10, z_spec), np.full(10, z_phot), metrics)
    assert picture.startswith(b"\x89PNG")
