"""What the cost model counts, against what a run does: requests to S3, log lines, states."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from lambda_worker import handlers, storage, telemetry
from lambda_worker.engine import DEMO_MODEL
from tests.processes import serve_rendezvous
from tests.s3 import S3Server, s3_client, serve_s3
from tests.worker.test_telemetry import fresh  # noqa: F401 - a fixture: loggers as they were
from tests.worker.worker_data import tensors
from workflow import cost

ROOT = Path(__file__).parent.parent.parent
ROWS = 40


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server with two files of a dataset, and a model."""
    for name in ("data/1.pt", "data/2.pt"):
        path = tmp_path / "s3/bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(TensorDataset(*tensors(ROWS // 2)), path)
    (tmp_path / "s3/bucket/m.safetensors").write_bytes(DEMO_MODEL.read_bytes())
    with serve_s3(tmp_path / "s3") as server, s3_client(server.endpoint, monkeypatch):
        yield server


def run(ranks: int, endpoint: str, context: Any = None) -> None:
    """Do what the state machine does."""
    event = {"data": "s3://bucket/data", "model": "s3://bucket/m.safetensors", "run": f"r{ranks}"}
    event |= {"results": "s3://bucket/out", "rendezvous_endpoint": endpoint}
    plan = handlers.init({**event, "world_size": ranks, "ranks_file": True}, context)
    place = plan["ranks_file"]
    tasks = json.loads(storage.read(f"s3://{place['bucket']}/{place['key']}"))
    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(lambda task: handlers.infer({**task, "threads": 1}, context), tasks))
    handlers.summarize(plan, context)


def counted(s3: S3Server) -> tuple[int, int]:
    """Requests by their two prices: GET, HEAD and others; PUT, POST and LIST. DELETE is free."""
    writes = [m for m, path in s3.requests if m in ("PUT", "POST") or "list-type" in path]
    reads = [m for m, path in s3.requests if m in ("GET", "HEAD") and "list-type" not in path]
    return len(reads), len(writes)


def job(ranks: int) -> cost.Usage:
    return cost.as_job(cost.Usage(rank_s=[1.0] * ranks, memory_mb=1769), ROWS)


def test_requests_to_s3(s3: S3Server) -> None:
    """The model has one large model and one file for each rank; here two share a small one."""
    with serve_rendezvous() as endpoint:
        run(4, endpoint)
    reads, writes = counted(s3)
    assert writes == job(4).writes
    assert job(4).reads / 2 <= reads <= job(4).reads


CONTEXT = SimpleNamespace(aws_request_id="1-2-3" * 7, function_name="cosmic-InferFunction-0123456")
LAMBDAS_OWN = 350  # START, END and REPORT


def test_bytes_of_log(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    with serve_rendezvous() as endpoint:
        run(4, endpoint, CONTEXT)
    told = capsys.readouterr().out
    assert told.count('"infer: done"') == 4
    each = len(told.encode()) / 6 + LAMBDAS_OWN
    assert 0.7 * cost.LOG_BYTES <= each <= 1.1 * cost.LOG_BYTES


MACHINE = json.loads((ROOT / "workflow/state_machine.asl.json").read_text())


def entered(machine: dict[str, Any]) -> list[dict[str, Any]]:
    """The states that an execution enters when all goes well."""
    path, name = [], machine["StartAt"]
    while name:
        path.append(machine["States"][name])
        name = path[-1].get("Next")
    return path


def test_transitions() -> None:
    """Each state that is entered, in the run and in each rank's child, and each child's start."""
    path = entered(MACHINE)
    assert len(path) == cost.RUN_TRANSITIONS
    (ranks,) = (state["ItemProcessor"] for state in path if state["Type"] == "Map")
    assert ranks["ProcessorConfig"] == {"Mode": "DISTRIBUTED", "ExecutionType": "STANDARD"}
    assert 1 + len(entered(ranks)) == cost.RANK_TRANSITIONS
    assert job(32).transitions == 5 + 32 * 2


def test_invocations_and_metrics() -> None:
    tasks = [state for state in entered(MACHINE) if state["Type"] == "Task"]
    assert len(tasks) == len(cost.STEPS)
    assert job(32).invocations == 32 + len(tasks)
    # A rank sends all of them, init and summarize only whether they started cold.
    assert len(telemetry.UNITS) + len(tasks) == cost.METRICS


def test_the_server_is_that_of_the_template() -> None:
    text = (ROOT / "deploy/template.yaml").read_text()

    def default(name: str) -> int:
        found = re.search(rf"^  {name}:\n    Type: Number\n    Default: (\d+)", text, re.M)
        assert found
        return int(found[1])

    assert default("ServerCpu") / 1024 == cost.SERVER_VCPU
    assert default("ServerMemory") / 1024 == cost.SERVER_GB
    assert default("WorkerStorage") == cost.FREE_STORAGE_MB
    assert text.count("Type: AWS::EC2::Subnet\n") == cost.ZONES
    assert text.count("Type: AWS::SecretsManager::Secret\n") == cost.SECRETS


def test_a_row_is_as_long_as_docs_have_it() -> None:
    """float32 images of 5 bands of 32 by 32, five float64 magnitudes."""
    assert cost.ROW_BYTES == 5 * 32 * 32 * 4 + 5 * 8
