"""The inference loop by itself, with models that are easy to foresee."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from lambda_worker import inference, records
from lambda_worker.dataset import DatasetError
from lambda_worker.engine import Array
from lambda_worker.reading import Rows, Shard
from lambda_worker.shard import Piece
from tests.worker.worker_data import MakePt, tensors


def first_magnitude(images: Array, magnitudes: Array) -> Array:
    assert images.dtype == magnitudes.dtype == np.float32
    return magnitudes[:, 0]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_rows_in_order_over_two_files(make_pt: MakePt, tmp_path: Path, batch_size: int) -> None:
    names = [str(make_pt(f"{seed}.pt", 7, seed=seed, wide=torch.float64)) for seed in (1, 2)]
    shard = Shard([Piece(names[0], 1, 7), Piece(names[1], 0, 5)], tmp_path)
    done: list[tuple[int, int]] = []
    found = inference.run(first_magnitude, shard, batch_size, lambda *step: done.append(step))
    first, second = (tensors(7, seed=seed, wide=torch.float64) for seed in (1, 2))
    assert np.array_equal(found.z_phot, torch.cat((first[1][1:], second[1][:5]))[:, 0].float())
    assert np.array_equal(found.z_spec, torch.cat((first[2][1:], second[2][:5])))
    assert found.batches == len(done) == -(-11 // batch_size)
    assert done[-1] == (11, 11)
    assert found.bits == 11 * (32 * 5 * 32 * 32 + 64 * 5)  # 164,160 a row, as in the reference


def test_rows_that_do_not_count_are_nan(tmp_path: Path) -> None:
    rows = tensors(6, wide=torch.float64)
    rows[0][1, 0, 0, 0] = torch.inf
    rows[1][2, 4] = torch.nan  # the model below does not look at it
    rows[1][4, 0] = 1e39  # infinite as float32
    torch.save(TensorDataset(*rows), tmp_path / "a.pt")
    shard = Shard([Piece(str(tmp_path / "a.pt"), 0, 6)], tmp_path)
    found = inference.run(first_magnitude, shard, 4)
    assert found.excluded.tolist() == [1, 2, 4]
    parts = [row.part for row in found.named(shard.pieces)]
    assert parts == ["images", "magnitudes", "z_phot"]


def test_predictions_that_are_not_finite_do_not_count(make_pt: MakePt, tmp_path: Path) -> None:
    shard = Shard([Piece(str(make_pt("a.pt", 3)), 0, 3)], tmp_path)
    answers = np.array([np.inf, 0.1, np.nan], np.float32)
    found = inference.run(lambda images, magnitudes: answers, shard, 3)
    assert found.excluded.tolist() == [0, 2]
    with pytest.raises(DatasetError, match=r"2 of 3 rows cannot be used.*a\.pt row 0 \(z_phot\)"):
        inference.judge(found, shard.pieces, strict=True)


def test_excluded_rows_are_named_as_they_stand_in_their_files(
    make_pt: MakePt, tmp_path: Path
) -> None:
    names = [str(make_pt(f"{seed}.pt", 7, seed=seed)) for seed in (1, 2)]
    shard = Shard([Piece(names[0], 4, 7), Piece(names[1], 2, 7)], tmp_path)
    nothing = np.full(8, np.nan, np.float32)
    found = inference.run(lambda images, magnitudes: nothing[: len(images)], shard, 3)
    places = [(Path(row.file).name, row.row) for row in found.named(shard.pieces)]
    assert places == [("1.pt", 4), ("1.pt", 5), ("1.pt", 6), ("2.pt", 2), ("2.pt", 3)]
    warning = str(inference.judge(found, shard.pieces, strict=False))
    assert warning.startswith("no metric counts 8 of 8 rows")
    assert warning.endswith("2.pt row 3 (z_phot), ...")


def test_the_time_of_each_batch_adds_up(make_pt: MakePt, tmp_path: Path) -> None:
    shard = Shard([Piece(str(make_pt("a.pt", 7)), 0, 7)], tmp_path)
    found = inference.run(first_magnitude, shard, 3)
    assert len(found.batch_seconds) == found.batches == 3
    assert (found.batch_seconds > 0).all()
    assert found.batch_seconds.sum() == pytest.approx(found.wall_seconds)
    assert inference.judge(found, shard.pieces, strict=True) is None


def test_empty_shard_never_calls_the_model(tmp_path: Path) -> None:
    found = inference.run(lambda images, magnitudes: 1 / 0, Shard([], tmp_path), 8)  # type: ignore[arg-type, return-value]
    assert (found.batches, found.bits, len(found.z_phot)) == (0, 0, 0)


def test_waiting_for_rows_is_told_apart_from_predicting(
    make_pt: MakePt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.0)
    shard = Shard([Piece(str(make_pt("a.pt", 6)), 0, 6)], tmp_path)

    def slow(batch_size: int, look: object) -> Iterator[tuple[int, int, Rows]]:
        for start in range(0, 6, batch_size):
            now[0] += 3
            yield start, start + batch_size, shard.batch(start, start + batch_size)

    def predict(images: Array, magnitudes: Array) -> Array:
        now[0] += 10
        return magnitudes[:, 0]

    monkeypatch.setattr(inference, "time", clock)
    monkeypatch.setattr(shard, "batches", slow)
    found = inference.run(predict, shard, 2)
    assert (found.read_seconds, found.wall_seconds) == (9, 39)


@pytest.mark.parametrize(("rows", "compared"), [(0, 0), (1, 1), (40, 40), (300, 256)])
def test_a_sample_of_the_rows_is_compared(
    make_pt: MakePt, tmp_path: Path, rows: int, compared: int
) -> None:
    shard = Shard([Piece(str(make_pt("a.pt", rows or 1)), 0, rows)], tmp_path)
    z_phot = inference.run(first_magnitude, shard, 64).z_phot
    assert inference.compare(first_magnitude, shard, z_phot) == (0, compared)
    if rows:
        z_phot[-1] += 0.5  # the last row is in the sample
        z_phot[0] = np.nan  # and so is the first, which is excluded from the metrics
        expected = (0.5, compared - 1) if rows > 1 else (0, 0)
        assert inference.compare(first_magnitude, shard, z_phot) == expected


def test_peak_memory_remembers_what_was_freed() -> None:
    before = records.memory("VmRSS")
    block = np.ones(30_000_000)  # 240 MB
    during = records.memory("VmRSS")
    del block
    assert during - before > 200
    assert records.memory("VmHWM") > during - 20  # the kernel counts in steps
    assert records.memory("VmRSS") < during - 200
