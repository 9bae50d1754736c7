"""A file of half a GB by four ranks: what each takes in memory beyond what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from lambda_worker import handlers
from lambda_worker.engine import DEMO_MODEL

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

ROWS = 24_350  # half a GB: more than a rank may take
IMPORTS = """
import boto3.session, numpy, torch.utils.data
from lambda_worker import dataset, engine, handlers, inference, metrics, model_file, summary
input()
"""


def private(process: subprocess.Popen[str]) -> float:
    """MB (10^6 bytes) of memory that no other process shares, 0 if it is no more."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except (ProcessLookupError, FileNotFoundError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


def start(*command: str, event: Any = None) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    if event is not None:
        process.stdin.write(json.dumps(event))
        process.stdin.close()
        process.stdin = None
    return process


def imports() -> float:
    """What a process takes that has imported what a rank imports, and has done nothing."""
    process, seen = start("-c", IMPORTS), [0.0, 1.0]
    while seen[-1] != seen[-2]:  # until nothing is added any more
        time.sleep(1)
        seen.append(private(process))
    process.communicate("\n")
    return seen[-1]


def peaks(data: Path, model: Path, batch_size: int = 128) -> tuple[list[float], list[Any]]:
    """Largest private memory of each of four ranks, and their records."""
    event = {"data": str(data), "model": str(model), "results": str(data.parent)}
    plan = handlers.init({**event, "world_size": 4, "batch_size": batch_size, "threads": 1})
    ranks = [start("-m", "lambda_worker", "infer", event=task) for task in plan["ranks"]]
    most = [0.0] * 4
    while any(rank.poll() is None for rank in ranks):
        most = [max(top, private(rank)) for top, rank in zip(most, ranks, strict=True)]
        time.sleep(0.05)
    outputs = [rank.communicate()[0] for rank in ranks]
    return most, [json.loads(text.splitlines()[-1])["result"] for text in outputs]


@pytest.mark.parametrize("rows", [ROWS, pytest.param(2 * ROWS, marks=pytest.mark.nightly)])
def test_one_file_by_four_ranks(tmp_path: Path, rows: int) -> None:
    made = (torch.rand(rows, 5, 32, 32), 17 + torch.rand(rows, 5).double(), torch.rand(rows))
    torch.save(TensorDataset(*made), tmp_path / "a.pt")
    del made
    before = imports()
    most, records = peaks(tmp_path / "a.pt", DEMO_MODEL)
    print(f"imports {before:.0f} MB, ranks {[round(top) for top in most]} MB at most")
    assert sum(record["rows"] for record in records) == rows
    assert (
        sum(record["bytes_read"] for record in records) < 1.001 * (tmp_path / "a.pt").stat().st_size
    )
    assert before > 50
    assert max(most) - before < 400
