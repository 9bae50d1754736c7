"""What tests of failing storage share: a job whose ranks read one file each from a real S3."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from lambda_worker import aside, handlers
from lambda_worker.engine import DEMO_MODEL
from lambda_worker.exported import export_of
from tests.worker.worker_data import tensors

ROWS = 20  # of each rank's file
LONGEST = 40.0  # seconds of a job, at most

EVENT = {
    **{"data": "s3://bucket/data", "model": "s3://bucket/m.safetensors", "engine": "onnx"},
    **{"results": "s3://bucket/out", "run": "r"},
}


def fill_bucket(bucket: Path, files: int) -> None:
    """Put datasets 1.pt, 2.pt ... and a model where EVENT looks for them."""
    (bucket / "data").mkdir(parents=True)
    for number in range(1, files + 1):
        torch.save(TensorDataset(*tensors(ROWS, seed=number)), bucket / f"data/{number}.pt")
    for suffix in (".safetensors", ".onnx"):
        source = DEMO_MODEL if suffix == ".safetensors" else Path(export_of(str(DEMO_MODEL)))
        (bucket / f"m{suffix}").write_bytes(source.read_bytes())


def visible(bucket: Path) -> set[str]:
    """Files of the run, but not the records of its failures."""
    folder = bucket / "out/r"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(("failed/", "."))}


def attempt(tasks: list[Any]) -> list[BaseException | None]:
    """All ranks at once: what each of them raised.

    Raises:
        TimeoutError: one is still at it, which then nobody waits for: it may hang for ever.
    """
    futures = [aside.start(partial(handlers.infer, task), "rank") for task in tasks]
    return [future.exception(LONGEST) for future in futures]


@contextmanager
def disk_takes(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
