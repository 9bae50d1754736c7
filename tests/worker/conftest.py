"""Small datasets, and an S3 server in a thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.processes import serve_rendezvous
from tests.s3 import s3_client
from tests.worker.worker_data import MakePt, tensors

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture
def make_pt(tmp_path: Path) -> MakePt:
    """Write a dataset file: `make_pt("a.pt", rows)`; returns its path."""

    def make(name: str, rows: int, **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(TensorDataset(*tensors(rows, **options)), path)  # type: ignore[arg-type]
        return path

    return make


@pytest.fixture(scope="session")
def rendezvous() -> Iterator[str]:
    """host:port of a rendezvous server, a process of its own."""
    with serve_rendezvous() as server:
        yield server


@pytest.fixture
def bucket(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, and no client of an earlier test's environment."""
    with s3_client(os.environ["AWS_ENDPOINT_URL"], monkeypatch):
        yield bucket
