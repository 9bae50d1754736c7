"""The shipped demo model: its figures are those of a run, and can be found again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors import safe_open

from lambda_worker import metrics
from lambda_worker.engine import DEMO_MODEL
from lambda_worker.model_file import load_model
from workflow.demo.catalogue import load_catalogue
from workflow.demo.galaxies import make_dataset
from workflow.demo.train import predict, to_sample


def shipped(name: str) -> Any:
    return json.loads((DEMO_MODEL.parent / name).read_text())


def test_the_shipped_metrics_come_back_on_the_first_test_rows() -> None:
    report = shipped("metrics.json")
    first = report["first_rows"]
    sample = to_sample(make_dataset(first["n"], report["seed"], "test"))
    z_phot = predict(load_model(DEMO_MODEL), sample)
    again = metrics.compute(z_phot.numpy(), sample.redshift.numpy())
    # Another torch or numpy may round, or draw noise, a little differently.
    assert again == pytest.approx({name: first[name] for name in again}, rel=0.05, abs=5e-4)


def test_other_test_rows_do_as_well() -> None:
    report = shipped("metrics.json")
    sample = to_sample(make_dataset(500, report["seed"] + 1, "test"))
    z_phot = predict(load_model(DEMO_MODEL), sample)
    again = metrics.compute(z_phot.numpy(), sample.redshift.numpy())
    assert again["nmad"] == pytest.approx(report["nmad"], rel=0.2)
    assert again["r2"] == pytest.approx(report["r2"], abs=0.06)
    assert again["bias"] == pytest.approx(0.0, abs=0.004)


def test_metrics_cover_every_test_row_of_the_packaged_catalogue() -> None:
    assert shipped("metrics.json")["n"] == int((load_catalogue().split == "test").sum())


def test_log_metrics_and_provenance_belong_together() -> None:
    report, log = shipped("metrics.json"), shipped("training_log.json")
    with safe_open(DEMO_MODEL, framework="pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert {name: provenance[name] for name in report} == report
    assert len(log) == report["epochs"]
    losses = [record["val_loss"] for record in log]
    assert report["best_epoch"] == 1 + losses.index(min(losses))
    assert log[-1]["train_loss"] < 0.6 * log[0]["train_loss"]


def test_the_model_is_good_enough_to_look_at() -> None:
    report = shipped("metrics.json")
    assert report["nmad"] < 0.015
    assert report["r2"] > 0.85
    assert abs(report["bias"]) < 0.003
