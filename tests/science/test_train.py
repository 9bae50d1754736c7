"""Training: the loss falls, the splits stay apart, the files say what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lambda_worker import metrics
from lambda_worker.model import AstroMAE
from lambda_worker.model_file import load_model
from workflow.demo import train as training
from workflow.demo.catalogue import Split, load_catalogue
from workflow.demo.galaxies import GalaxyArrays, make_dataset

ROWS, EPOCHS = 320, 3


class Trained:
    """One small training, shared by the tests of this file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, int, int]] = []
        self.report = training.train(
            folder,
            epochs=EPOCHS,
            rows=ROWS,
            seed=5,
            progress=lambda stage, done, total: self.calls.append((stage, done, total)),
        )
        self.log = json.loads((folder / "training_log.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("model"))


def test_the_loss_goes_down(trained: Trained) -> None:
    losses = [record["train_loss"] for record in trained.log]
    assert len(losses) == EPOCHS
    assert losses[-1] < 0.8 * losses[0]


def test_the_log_has_a_record_per_epoch(trained: Trained) -> None:
    assert [record["epoch"] for record in trained.log] == [1, 2, 3]
    for record in trained.log:
        assert record["val_loss"] > 0
        assert set(record["val"]) == {"mae", "mse", "bias", "nmad", "r2"}


def test_metrics_are_those_of_the_written_model_on_the_test_rows(trained: Trained) -> None:
    report = json.loads((trained.folder / "metrics.json").read_text())
    assert report == trained.report
    sample = training.to_sample(make_dataset(ROWS, 5, "test"))
    z_phot = training.predict(load_model(trained.folder / "model.safetensors"), sample)
    again = metrics.compute(z_phot.numpy(), sample.redshift.numpy())
    assert report["n"] == ROWS
    assert again == pytest.approx({name: report[name] for name in again}, abs=1e-6)
    first = report["first_rows"]
    again = metrics.compute(z_phot[: first["n"]].numpy(), sample.redshift[: first["n"]].numpy())
    assert again == pytest.approx({name: first[name] for name in again}, abs=1e-6)


def test_the_kept_epoch_is_the_best_on_val(trained: Trained) -> None:
    losses = [record["val_loss"] for record in trained.log]
    assert trained.report["best_epoch"] == 1 + losses.index(min(losses))
    val = training.to_sample(make_dataset(ROWS, 5, "val"))
    z_phot = training.predict(load_model(trained.folder / "model.safetensors"), val)
    mae = metrics.compute(z_phot.numpy(), val.redshift.numpy())["mae"]
    assert mae == pytest.approx(trained.log[losses.index(min(losses))]["val"]["mae"], abs=1e-6)


def test_progress_goes_through_the_stages(trained: Trained) -> None:
    stages = list(dict.fromkeys(stage for stage, _, _ in trained.calls))
    assert stages == ["simulate", "train", "evaluate"]
    steps = [(done, total) for stage, done, total in trained.calls if stage == "train"]
    assert steps == [(k + 1, len(steps)) for k in range(len(steps))]


def test_provenance_travels_with_the_weights(trained: Trained) -> None:
    from safetensors import safe_open

    with safe_open(trained.folder / "model.safetensors", framework="pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert "simulated pixels" in provenance["data"]
    assert provenance["seed"] == 5
    assert provenance["versions"]["torch"] == torch.__version__
    assert len(provenance["catalogue_sha256"]) == 64


def test_test_rows_are_simulated_only_after_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[str] = []
    seen: dict[str, set[int]] = {}

    def spy(rows: int, seed: int, split: Split, progress: Any) -> GalaxyArrays:
        events.append(split)
        arrays = make_dataset(min(rows, 40), seed, split)
        seen[split] = set(arrays.row.tolist())
        return arrays

    def fit(model: AstroMAE, sample: training.Sample, val: training.Sample, *rest: Any) -> Any:
        events.append("fit")
        return [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0}]

    monkeypatch.setattr(training, "make_dataset", spy)
    monkeypatch.setattr(training, "fit", fit)
    training.train(tmp_path, rows=40)
    assert events == ["train", "val", "fit", "test"]
    names = load_catalogue().split
    for split, rows in seen.items():
        assert set(names[list(rows)].tolist()) == {split}


def test_magnitudes_enter_whitened() -> None:
    magnitudes = torch.from_numpy(make_dataset(300, 1, "train").magnitudes)
    config = training.demo_config(magnitudes)
    centred = magnitudes.double().numpy() - np.array(config.magnitude_mean)
    white = centred @ np.array(config.magnitude_mix)
    np.testing.assert_allclose(np.cov(white.T), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)


def test_an_epoch_meets_each_row_at_most_once_and_turns_whole_images() -> None:
    sample = training.to_sample(make_dataset(2 * training.BATCH, 1, "train"))
    generator = torch.Generator().manual_seed(0)
    batches = list(training._batches(sample, 2, generator))
    redshifts = torch.cat([batch.redshift for batch in batches])
    assert torch.equal(redshifts.sort().values, sample.redshift.sort().values)
    for batch in batches:
        row = int((sample.redshift == batch.redshift[0]).nonzero()[0])
        original, turned = sample.images[row], batch.images[0]
        copies = [original.rot90(k, (1, 2)) for k in range(4)]
        assert any(torch.equal(turned, x) or torch.equal(turned, x.flip(2)) for x in copies)
