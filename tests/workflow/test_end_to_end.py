"""The real thing: `cosmic run` with the real handlers, server and communicator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lambda_worker.engine import has_bf16
from tests.worker.worker_data import RECORD
from workflow.datasets import make

ROWS = 50


def cosmic(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "workflow", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cosmic")
    make(place / "some.pt", ROWS, "test", 0, lambda stage, rows, of: None)
    return place


@pytest.fixture(scope="module")
def answer(folder: Path) -> dict[str, Any]:
    words = ("--data", "some.pt", "--world-size", "3", "--batch-size", "16", "--run", "joined")
    code, out, err = cosmic(folder, "run", *words, "--json")
    assert code == 0, err
    return dict(json.loads(out))


def test_ranks_that_talk(answer: dict[str, Any], folder: Path) -> None:
    records = json.loads((folder / "results/joined/combined_data.json").read_text())
    assert records == answer["records"]
    assert [record["rank"] for record in records] == [0, 1, 2]
    assert sorted(record["rows"] for record in records) == [16, 17, 17]
    assert not [record for record in records if RECORD - record.keys()]
    assert answer["summary"]["links"]["direct"] > 0
    assert (folder / "results/joined/redshift.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_that_do_not_talk_give_the_same_numbers(answer: dict[str, Any], folder: Path) -> None:
    words = ("--data", "some.pt", "--world-size", "1", "--no-fmi", "--run", "alone")
    code, out, err = cosmic(folder, "run", *words)
    assert code == 0, err
    assert f"total   {ROWS}" in out
    assert "plot:    results/alone/redshift.png" in out
    summary = json.loads((folder / "results/alone/summary.json").read_text())
    assert summary["metrics"] == pytest.approx(answer["summary"]["metrics"], abs=1e-6)


def test_a_broken_file_is_named(folder: Path) -> None:
    content = (folder / "some.pt").read_bytes()
    (folder / "half.pt").write_bytes(content[: len(content) // 2])
    code, out, err = cosmic(folder, "run", "--data", "half.pt")
    assert code == 1
    assert out == ""
    assert "Error: init failed: DatasetError" in err
    assert "half.pt" in err
    assert "Traceback" not in err


@pytest.mark.skipif(not has_bf16(), reason="this processor has no bf16 instructions")
def test_bf16_tells_what_it_costs(folder: Path) -> None:
    words = ("--data", "some.pt", "--world-size", "2", "--precision", "bf16", "--json")
    code, out, err = cosmic(folder, "run", *words)
    assert code == 0, err
    summary = json.loads(out)["summary"]
    assert (summary["engine"], summary["precision"]) == ("torch", "bf16")
    assert 0 < summary["precision_max_dz"] < 0.01
    assert summary["precision_rows"] == ROWS
