"""`cosmic sweep --on aws` as a user runs it, on a local AWS whose ranks are real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from secrets import token_hex

import pytest

from tests.full.emulator import REGION, ROOT, emulator
from tests.full.test_run_on_aws import deploy, keep
from tests.processes import own_environment, serve_rendezvous

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


def test_two_configurations(tmp_path: Path) -> None:
    from workflow.datasets import make

    secret, home, data = token_hex(32), tmp_path / "home", tmp_path / "1.pt"
    make(data, 32, "test", 0, lambda stage, rows, of: None)
    home.mkdir()
    with emulator(tmp_path) as aws, serve_rendezvous(secret=secret) as server:
        aws.bucket("cosmic")
        aws.client("s3").upload_file(str(data), "cosmic", "datasets/small/1.pt")
        outputs = {
            "StateMachineArn": aws.deploy(),
            "BucketName": "cosmic",
            "RendezvousEndpoint": server,
            "ServerSecretArn": keep(aws, "server", secret),
            "KeyArn": keep(aws, "key", token_hex(32)),
        }
        deploy(aws, outputs)
        words = ("--on", "aws", "--endpoint-url", aws.endpoint, "--engine", "onnx", "--json")
        sizes = ("--world-size", "1,3", "--batch-size", "8", "--name", "pair")
        done = _cosmic(home, "sweep", *words, *sizes)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        found = aws.client("s3").list_objects_v2(Bucket="cosmic", Prefix="results/")["Contents"]
    keys = {item["Key"] for item in found}
    assert sorted(run["world_size"] for run in answer["runs"]) == [1, 3]
    for run in answer["runs"]:
        assert (run["status"], run["on"]) == ("ok", "aws")
        prefix = run["folder"].removeprefix("s3://cosmic/")
        assert {f"{prefix}/{name}" for name in ("run.json", "combined_data.json")} <= keys
        here = home / "results/pair/runs" / run["key"]
        assert len(json.loads((here / "combined_data.json").read_text())) == run["world_size"]
    measured = {each["world_size"]: each["measures"] for each in answer["configurations"]}
    assert measured[3]["rows_per_s_wall_clock"]["median"] > 0
    assert all(each["cost_usd"] > 0 for each in answer["configurations"])
    assert answer["warnings"] == []
    # All is here by now: there is no AWS any more.
    again = _cosmic(home, "sweep", "--name", "pair", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == answer


def _cosmic(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = own_environment()
    mine = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    mine |= {"AWS_DEFAULT_REGION": REGION, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "workflow", *words]
    return subprocess.run(
        command, cwd=home, env=environment | mine, capture_output=True, text=True, timeout=240
    )
