"""The simulator: determinism, splits, noise against real pixels, extremes, files."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from workflow.demo.catalogue import BANDS, SPLITS, Catalogue, load_catalogue, load_epochs
from workflow.demo.galaxies import (
    GalaxyArrays,
    add_noise,
    bulge_share,
    flux,
    half_light_kpc,
    kpc_per_arcsec,
    make_dataset,
    simulate,
    write_pt,
)

SIGMAS = Path(__file__).parent.parent / "fixtures" / "sdss_sky_sigma.csv"


@pytest.fixture(scope="module")
def arrays() -> GalaxyArrays:
    return make_dataset(200, seed=4, split="test")


def one_row(**changes: float) -> Catalogue:
    """A catalogue of one galaxy; `magnitude` sets all bands."""
    magnitude = changes.get("magnitude", 17.0)
    return Catalogue(
        np.array(["x"]),
        np.array(["train"]),
        np.full((1, 5), magnitude),
        np.full((1, 5), 0.01),
        np.array([changes.get("redshift", 0.1)]),
        np.array([changes.get("luminosity", -21.0)]),
        np.array([changes.get("colour", 0.7)]),
    )


def test_shapes_types_and_values(arrays: GalaxyArrays) -> None:
    assert arrays.images.shape == (200, 5, 32, 32)
    assert arrays.magnitudes.shape == (200, 5)
    assert arrays.redshift.shape == arrays.row.shape == (200,)
    assert {column.dtype.name for column in arrays[:3]} == {"float32"}
    assert all(np.isfinite(column).all() for column in arrays)
    catalogue = load_catalogue()
    assert np.array_equal(arrays.magnitudes, catalogue.magnitudes[arrays.row].astype(np.float32))
    assert np.array_equal(arrays.redshift, catalogue.redshift[arrays.row].astype(np.float32))


def test_the_seed_fixes_every_bit_and_fewer_rows_are_a_prefix(arrays: GalaxyArrays) -> None:
    again = make_dataset(50, seed=4, split="test")
    for first, second in zip(arrays, again, strict=True):
        assert np.array_equal(first[:50], second)
    other = make_dataset(50, seed=5, split="test")
    assert not np.array_equal(other.row, again.row)
    assert not np.array_equal(other.images, again.images)


def test_repeated_rows_get_new_pixels() -> None:
    count = int((load_catalogue().split == "val").sum())
    many = make_dataset(count + 3, seed=1, split="val")
    assert len(set(many.row[:count].tolist())) == count
    assert np.array_equal(many.row[count:], many.row[:3])
    assert np.array_equal(many.redshift[count:], many.redshift[:3])
    assert not np.array_equal(many.images[count:], many.images[:3])


def test_splits_never_overlap() -> None:
    catalogue = load_catalogue()
    assert len(set(catalogue.id.tolist())) == len(catalogue.id)
    assert set(catalogue.split.tolist()) == set(SPLITS)
    seen = {split: set(make_dataset(60, split=split).row.tolist()) for split in SPLITS}
    for split, rows in seen.items():
        assert set(catalogue.split[list(rows)].tolist()) == {split}
    # A galaxy listed twice under two names must not sit on both sides of a split either.
    keys = np.column_stack([catalogue.magnitudes, catalogue.redshift])
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    assert np.array_equal(catalogue.split[first][inverse.ravel()], catalogue.split)


def test_no_split_means_all_rows() -> None:
    rows = make_dataset(80, seed=2).row
    assert len({*load_catalogue().split[rows].tolist()}) > 1


def test_progress_ends_at_the_number_of_rows() -> None:
    calls: list[tuple[int, int]] = []
    make_dataset(300, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(256, 300), (300, 300)]


def test_no_rows_are_legal() -> None:
    assert make_dataset(0).images.shape == (0, 5, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"rows": -1}, "must not be negative"),
        ({"rows": 1, "seed": -1}, "must not be negative"),
        ({"rows": 1, "split": "exam"}, "one of train, val, test or None, got 'exam'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_dataset(**arguments)  # type: ignore[arg-type]


def test_flux_of_the_catalogue_is_painted(arrays: GalaxyArrays) -> None:
    # Noise averages out over many; light beyond the edge is lost, and neighbours add some.
    share = arrays.images.sum(axis=(2, 3)) / flux(arrays.magnitudes.astype(np.float64))
    median = np.median(share, axis=0)
    assert np.all(median > 0.8)
    assert np.all(median < 1.0)


def test_sky_noise_is_that_of_the_real_pixels() -> None:
    epochs, rng = load_epochs(), np.random.default_rng(3)
    blank = np.zeros((5, 64, 64), np.float32)
    expected, measured = [], []
    with SIGMAS.open(newline="") as file:
        for row in csv.DictReader(file):
            noise = add_noise(blank, epochs, int(row["epoch"]), rng)[BANDS.index(row["band"])]
            expected.append(noise.std() / float(row["sigma_expected"]))
            measured.append(noise.std() / float(row["sigma_measured"]))
            assert abs(noise.mean()) < 4 * noise.std() / 64
    assert len(expected) == 80
    # Against the survey's own inverse variances, and against the scatter of the pixels themselves,
    # which resampling to a common grid has smoothed a little.
    np.testing.assert_allclose(expected, 1.0, atol=0.12)
    assert np.median(expected) == pytest.approx(1.0, abs=0.04)
    assert np.median(measured) == pytest.approx(1.1, abs=0.1)


def test_bright_pixels_carry_poisson_noise() -> None:
    epochs, rng = load_epochs(), np.random.default_rng(8)
    level = 5.0
    noise = add_noise(np.full((5, 64, 64), level, np.float32), epochs, 0, rng)
    electrons = (level / epochs.calibration[0] + epochs.sky[0]) / epochs.gain[0]
    sigma = epochs.calibration[0] * np.sqrt(electrons + epochs.dark_variance[0])
    np.testing.assert_allclose(noise.std(axis=(1, 2)), sigma, rtol=0.05)
    np.testing.assert_allclose(noise.mean(axis=(1, 2)), level, atol=0.05)


@pytest.mark.parametrize("magnitude", [5.0, 11.0, 30.0])
@pytest.mark.parametrize("redshift", [0.001, 0.5, 3.0])
@pytest.mark.parametrize("luminosity", [-26.0, -12.0])
def test_extremes_give_finite_pixels(magnitude: float, redshift: float, luminosity: float) -> None:
    catalogue = one_row(magnitude=magnitude, redshift=redshift, luminosity=luminosity)
    image = simulate(catalogue, 0, load_epochs(), np.random.default_rng(1))
    assert image.shape == (5, 32, 32)
    assert np.isfinite(image).all()
    assert np.all(image.std(axis=(1, 2)) > 0.01), "even an empty field shows the sky's noise"


def test_brightness_and_colour_reach_the_pixels() -> None:
    # A compact galaxy, so that nearly all of its light is on the cutout.
    catalogue = one_row(magnitude=16.0, luminosity=-18.0, redshift=0.2)
    catalogue.magnitudes[0] += [1.0, 0.5, 0.0, -0.25, -0.5]
    rng = np.random.default_rng(2)
    images = [simulate(catalogue, 0, load_epochs(), rng) for _ in range(40)]
    total = np.median([image.sum(axis=(1, 2)) for image in images], axis=0)
    np.testing.assert_allclose(total / flux(catalogue.magnitudes[0]), 0.98, atol=0.05)


def test_angular_sizes_follow_the_usual_cosmology() -> None:
    # H0 = 70, Omega_m = 0.3, flat; published calculators: 1.844, 3.300, 6.104, 8.008 kpc/arcsec.
    for redshift, kpc in [(0.1, 1.844), (0.2, 3.300), (0.5, 6.104), (1.0, 8.008)]:
        assert kpc_per_arcsec(redshift) == pytest.approx(kpc, rel=1e-3)


def test_sizes_grow_with_luminosity() -> None:
    # Shen et al. 2003, figure 4: early types of M = -22 near 4.5 kpc, late types of -20.5 near 3.
    for bulge in (1.0, 0.5, 0.0):
        sizes = [half_light_kpc(luminosity, bulge)[0] for luminosity in (-18, -20, -22, -24)]
        assert sizes == sorted(sizes)
    assert half_light_kpc(-22.0, 1.0)[0] == pytest.approx(4.5, abs=0.3)
    assert half_light_kpc(-20.5, 0.0)[0] == pytest.approx(3.2, abs=0.3)
    assert half_light_kpc(-18.0, 0.0)[1] > 0.45 > 0.30 > half_light_kpc(-23.0, 0.0)[1]


def test_red_galaxies_are_bulges_and_blue_ones_discs() -> None:
    assert bulge_share(-21.0, 1.1) > 0.9
    assert bulge_share(-21.0, 0.4) < 0.1
    # The red sequence lies redder where galaxies are brighter.
    assert bulge_share(-23.0, 0.85) < bulge_share(-19.0, 0.85)
    edge = 0.21 - 0.03 * (-21.0 + 0.7745)
    assert bulge_share(-21.0, edge) == pytest.approx(0.5, abs=1e-3)


def test_an_object_takes_about_a_millisecond() -> None:
    make_dataset(4)
    started = time.process_time()
    make_dataset(100)
    # Ten times what it takes here: this is to catch a blunder, not to measure.
    assert time.process_time() - started < 1.0


def test_files_are_tensor_datasets_with_the_bits_per_row_of_real_ones(
    arrays: GalaxyArrays, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "folder" / "demo.pt"
    write_pt(arrays, path)
    with torch.serialization.safe_globals([TensorDataset]):
        dataset = torch.load(path, weights_only=True)
    images, magnitudes, redshift = dataset.tensors
    assert isinstance(dataset, TensorDataset)
    assert torch.equal(images, torch.from_numpy(arrays.images))
    assert torch.equal(magnitudes, torch.from_numpy(arrays.magnitudes).double())
    assert torch.equal(redshift, torch.from_numpy(arrays.redshift))
    bits = 8 * sum(t.element_size() * t[0].numel() for t in (images, magnitudes))
    assert bits == 164_160
    assert [entry.name for entry in path.parent.iterdir()] == ["demo.pt"]


def test_a_full_disk_is_a_clear_error_and_leaves_the_old_file(
    arrays: GalaxyArrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "demo.pt"
    path.write_bytes(b"old")
    full = Path("/dev/full")
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: real_open(full, *args))
    with pytest.raises(OSError, match=r"cannot write .*demo\.pt: .*(No space left|disk full)"):
        write_pt(arrays, path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_clear_error(
    arrays: GalaxyArrays, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*demo\.pt"):
        write_pt(arrays, tmp_path / "file" / "demo.pt")
