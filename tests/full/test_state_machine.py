"""The state machine as an emulator executes it, with ranks as processes around a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest

from tests.full.emulator import MACHINE, ROOT, Emulator, emulator
from tests.processes import serve_rendezvous

ROWS = 64
MOST = 256 * 1024  # bytes that a state may hold, and what a Map's results may take together
MANY = 10_000  # ranks
VALIDATOR = ROOT / ".tools/node/node_modules/.bin/asl-validator"

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Deployed:
    """The machine, and where its ranks meet."""

    aws: Emulator
    machine: str
    server: str
    secrets: tuple[str, ...]

    def run(self, name: str, world_size: int = 4, **fields: Any) -> dict[str, Any]:
        """Execute a run of the bucket's data to its end; returns the execution's description."""
        event = {
            "run": name,
            "world_size": world_size,
            "bucket": "cosmic",
            "data_prefix": "datasets/good",
            "rendezvous_endpoint": self.server,
            "engine": "onnx",
            "batch_size": 8,
            "threads": 1,
        }
        return self.aws.finish(self.aws.start(self.machine, event | fields))

    def read(self, key: str) -> Any:
        """A JSON object of the bucket."""
        return json.loads(self.aws.client("s3").get_object(Bucket="cosmic", Key=key)["Body"].read())

    def attempts(self, execution: dict[str, Any]) -> list[dict[str, Any]]:
        """The execution's Map Runs, first to last."""
        states, arn = self.aws.client("stepfunctions"), execution["executionArn"]
        runs = states.list_map_runs(executionArn=arn)["mapRuns"]
        runs.sort(key=lambda run: run["startDate"])
        return [states.describe_map_run(mapRunArn=run["mapRunArn"]) for run in runs]

    def ranks(self, attempt: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank's execution in a Map Run came to."""
        states = self.aws.client("stepfunctions")
        children = states.list_executions(mapRunArn=attempt["mapRunArn"])["executions"]
        return [states.describe_execution(executionArn=c["executionArn"]) for c in children]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good.pt, and strict.pt, whose row 40 (of rank 2 of 4) has no redshift."""
    import torch
    from torch.utils.data import TensorDataset

    from workflow.datasets import make

    folder = tmp_path_factory.mktemp("data")
    make(folder / "good.pt", ROWS, "test", 0, lambda stage, rows, of: None)
    tensors = torch.load(folder / "good.pt", weights_only=False).tensors
    tensors[2][40] = float("nan")
    torch.save(TensorDataset(*tensors), folder / "strict.pt")
    return folder


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Deployed]:
    folder, secret, key = tmp_path_factory.mktemp("aws"), token_hex(32), token_hex(32)
    with emulator(folder) as aws, serve_rendezvous(secret=secret) as server:
        aws.bucket("cosmic")
        for name in ("good", "strict"):
            place = f"datasets/{name}/1.pt"
            aws.client("s3").upload_file(str(data / f"{name}.pt"), "cosmic", place)
        environment = keep(aws, secret, key)
        machine = aws.deploy(infer="tests.full.doomed.infer", **environment)
        yield Deployed(aws, machine, server, (secret, key))


def keep(aws: Emulator, secret: str, key: str) -> dict[str, str]:
    """Put away what ranks need to join; returns the variables that name where."""
    kept = aws.client("secretsmanager").create_secret(Name="server", SecretString=secret)
    aws.client("ssm").put_parameter(Name="/key", Value=key, Type="SecureString")
    parameter = aws.client("ssm").get_parameter(Name="/key")["Parameter"]
    return {"FMI_SERVER_SECRET_ARN": kept["ARN"], "FMI_KEY_ARN": parameter["ARN"]}


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(VALIDATOR), "--json-path", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not VALIDATOR.exists(), reason="needs asl-validator: run `make tools` with npm")
def test_the_validator_accepts_it(tmp_path: Path) -> None:
    done = validate(MACHINE)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "broken.asl.json"
    broken.write_text(MACHINE.read_text().replace('"Next": "Summarize"', '"Next": "Summary"'))
    assert "Summary" in validate(broken).stderr


def test_a_run_succeeds_with_the_same_numbers_as_on_this_machine(
    deployed: Deployed, data: Path, tmp_path: Path
) -> None:
    done = deployed.run("success")
    assert done["status"] == "SUCCEEDED", done
    output = json.loads(done["output"])
    assert sorted(output) == [
        *("combined_data", "predictions", "results", "run", "summary", "summary_path")
    ]
    assert output["combined_data"] == "s3://cosmic/results/success/combined_data.json"
    records = deployed.read("results/success/combined_data.json")
    assert [record["rank"] for record in records] == [0, 1, 2, 3]
    assert sum(record["rows"] for record in records) == ROWS
    assert output["summary"]["links"]["direct"] > 0
    assert output["summary"] == deployed.read("results/success/summary.json")

    here = locally(data / "good.pt", tmp_path)
    assert output["summary"]["metrics"] == pytest.approx(here["metrics"], abs=1e-6)
    assert output["summary"]["rows"] == here["rows"]


def test_no_secret_is_in_any_event_file_or_log(deployed: Deployed) -> None:
    done = deployed.run("quiet", world_size=2)
    assert done["status"] == "SUCCEEDED", done
    s3 = deployed.aws.client("s3")
    keys = [o["Key"] for o in s3.list_objects_v2(Bucket="cosmic", Prefix="results/")["Contents"]]
    texts = [s3.get_object(Bucket="cosmic", Key=key)["Body"].read() for key in keys]
    texts += [text.encode() for text in told(deployed, done)]
    texts.append(deployed.aws.log.read_bytes())
    assert len(texts) > 10
    assert not any(secret.encode() in text for secret in deployed.secrets for text in texts)


def locally(data: Path, folder: Path) -> dict[str, Any]:
    """The summary of the same run by the launcher of this machine."""
    words = ("--data", str(data), "--world-size", "4", "--batch-size", "8", "--engine", "onnx")
    done = subprocess.run(
        [sys.executable, "-m", "workflow", "run", *words, "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)["summary"]
    return summary


def test_32_ranks_and_nothing_that_10000_would_burst(deployed: Deployed) -> None:
    done = deployed.run("many", world_size=32)
    assert done["status"] == "SUCCEEDED", done
    assert [r["rows"] for r in deployed.read("results/many/combined_data.json")] == [2] * 32
    (attempt,) = deployed.attempts(done)
    assert (attempt["status"], attempt["itemCounts"]["succeeded"]) == ("SUCCEEDED", 32)
    results = [rank["output"] for rank in deployed.ranks(attempt)]
    assert sorted(json.loads(result)["rank"] for result in results) == list(range(32))
    assert MANY * max(map(len, results)) < MOST

    one = deployed.run("one", world_size=1)
    assert one["status"] == "SUCCEEDED", one
    per_rank = (largest(deployed, done) - largest(deployed, one)) / 31
    assert largest(deployed, one) + MANY * per_rank < MOST


def largest(deployed: Deployed, execution: dict[str, Any]) -> int:
    """Bytes of the largest state, input, or output that an execution's history tells of."""
    return max(map(len, told(deployed, execution)))


def told(deployed: Deployed, execution: dict[str, Any]) -> list[str]:
    """All states, inputs and outputs that an execution's history tells of."""
    pages = deployed.aws.client("stepfunctions").get_paginator("get_execution_history")
    arn = execution["executionArn"]
    events = [event for page in pages.paginate(executionArn=arn) for event in page["events"]]
    details = [value for event in events for value in event.values() if isinstance(value, dict)]
    return [detail.get(name) or "" for detail in details for name in ("input", "output")]


def names(cause: str) -> list[int]:
    """The ranks that a cause names."""
    return [int(number) for number in re.findall(r"\brank (\d+)", cause)]


def test_a_rank_with_an_error_of_its_own_fails_the_execution(deployed: Deployed) -> None:
    done = deployed.run("own", data_prefix="datasets/strict", strict=True)
    assert done["status"] == "FAILED", done
    assert done["error"] == "DatasetError"
    assert names(done["cause"]) == [2]
    assert "row 40" in done["cause"]
    assert "\n" not in done["cause"]
    # Another attempt would read the same row.
    (attempt,) = deployed.attempts(done)
    assert attempt["status"] == "FAILED"
    assert attempt["itemCounts"]["failed"] == 4, "the others end, too"


def test_a_rank_that_dies_in_every_attempt_fails_the_execution(deployed: Deployed) -> None:
    done = deployed.run("often-kills-1-in-any")
    assert done["status"] == "FAILED", done
    assert done["error"] == "RankFailed"
    assert set(names(done["cause"])) == {1}, "and none that only noticed"
    first, second = deployed.attempts(done)
    for attempt in (first, second):
        assert (attempt["status"], attempt["itemCounts"]["failed"]) == ("FAILED", 4)
    errors = sorted(rank["error"] for rank in deployed.ranks(second))
    assert "Runtime.ExitError" in errors, "that is what Lambda says of the one that was killed"


def test_a_rank_that_dies_once_is_tried_again(deployed: Deployed) -> None:
    done = deployed.run("once-kills-3-in-0")
    assert done["status"] == "SUCCEEDED", done
    first, second = deployed.attempts(done)
    assert (first["status"], second["status"]) == ("FAILED", "SUCCEEDED")
    folder = json.loads(done["output"])["results"].removeprefix("s3://cosmic/")
    records = deployed.read(f"{folder}/combined_data.json")
    assert [record["rank"] for record in records] == [0, 1, 2, 3]
    assert sum(record["rows"] for record in records) == ROWS
    assert {r["epoch"] for r in map(json.loads, inputs(deployed, second))} == {1}


def inputs(deployed: Deployed, attempt: dict[str, Any]) -> list[str]:
    return [rank["input"] for rank in deployed.ranks(attempt)]


def test_one_attempt_is_one_attempt(deployed: Deployed) -> None:
    done = deployed.run("single-kills-0-in-0", attempts=1)
    assert (done["status"], done["error"]) == ("FAILED", "RankFailed")
    assert set(names(done["cause"])) == {0}
    assert len(deployed.attempts(done)) == 1


def test_init_that_fails_fails_the_execution_at_once(deployed: Deployed) -> None:
    done = deployed.run("nothing", data_prefix="datasets/nothing")
    assert (done["status"], done["error"]) == ("FAILED", "DatasetError")
    assert "datasets/nothing" in done["cause"]
    assert "\n" not in done["cause"]
    assert "stackTrace" not in done["cause"]
    assert deployed.attempts(done) == []


def test_what_is_not_a_functions_own_error_is_told_as_it_is(deployed: Deployed) -> None:
    aws = deployed.aws
    missing = "arn:aws:lambda:us-east-1:000000000000:function:missing"
    names = ("Init", "Infer", "Summarize", "Blame")
    functions = {f"{name}FunctionArn": missing for name in names}
    done = aws.finish(aws.start(aws.machine("empty", aws.role("empty"), functions), {}))
    assert (done["status"], done["error"]) == ("FAILED", "Lambda.ResourceNotFoundException")
    assert "missing" in done["cause"]
