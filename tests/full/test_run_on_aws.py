"""`cosmic run --on aws` as a user runs it, on a local AWS whose ranks are real processes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest

from tests.full.emulator import REGION, ROOT, Emulator, emulator
from tests.processes import own_environment, serve_rendezvous
from tests.support import wait_for

ROWS = 64

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Account:
    """A local AWS with a deployed stack "cosmic", and who uses it."""

    aws: Emulator
    machine: str
    home: Path

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start `cosmic run --on aws` with these options in addition."""
        usual = ("--on", "aws", "--endpoint-url", self.aws.endpoint, "--engine", "onnx")
        environment = own_environment()
        mine = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        mine |= {"AWS_DEFAULT_REGION": REGION, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
        return subprocess.Popen(
            [sys.executable, "-m", "workflow", "run", *usual, "--batch-size", "8", *words],
            cwd=self.home,
            env=environment | mine,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        """The same to its end; returns exit code, stdout and stderr."""
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def files(self, run: str) -> set[str]:
        """Names in a run's folder."""
        prefix = f"results/{run}/"
        found = self.aws.client("s3").list_objects_v2(Bucket="cosmic", Prefix=prefix)["Contents"]
        return {item["Key"].removeprefix(prefix) for item in found}

    def execution(self, run: str) -> dict[str, Any]:
        """What Step Functions says of a run."""
        arn = f"{self.machine.replace(':stateMachine:', ':execution:')}:{run}"
        seen: dict[str, Any] = self.aws.client("stepfunctions").describe_execution(executionArn=arn)
        return seen


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datasets by name: "small", and "strict", whose row 40 (of rank 2 of 4) has no redshift."""
    import torch
    from torch.utils.data import TensorDataset

    from workflow.datasets import make

    folder = tmp_path_factory.mktemp("data")
    paths = {name: folder / f"{name}.pt" for name in ("small", "strict")}
    make(paths["small"], ROWS, "test", 0, lambda stage, rows, of: None)
    tensors = torch.load(paths["small"], weights_only=False).tensors
    tensors[2][40] = float("nan")
    torch.save(TensorDataset(*tensors), paths["strict"])
    return paths


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Iterator[Account]:
    folder, secret = tmp_path_factory.mktemp("aws"), token_hex(32)
    with emulator(folder) as aws, serve_rendezvous(secret=secret) as server:
        aws.bucket("cosmic")
        for name, path in data.items():
            aws.client("s3").upload_file(str(path), "cosmic", f"datasets/{name}/1.pt")
        machine = aws.deploy(infer="tests.full.doomed.infer")
        outputs = {
            "StateMachineArn": machine,
            "BucketName": "cosmic",
            "RendezvousEndpoint": server,
            "ServerSecretArn": keep(aws, "server", secret),
            "KeyArn": keep(aws, "key", token_hex(32)),
        }
        deploy(aws, outputs)
        yield Account(aws, machine, tmp_path_factory.mktemp("home"))


def keep(aws: Emulator, name: str, value: str) -> str:
    """Put a secret away; returns its ARN."""
    made = aws.client("secretsmanager").create_secret(Name=name, SecretString=value)
    return str(made["ARN"])


def deploy(aws: Emulator, outputs: dict[str, str]) -> None:
    """Make a stack "cosmic" that says what the real one does."""
    properties = {"Type": "String", "Value": "x"}
    template = {
        "Resources": {"Nothing": {"Type": "AWS::SSM::Parameter", "Properties": properties}},
        "Outputs": {name: {"Value": value} for name, value in outputs.items()},
    }
    stacks = aws.client("cloudformation")
    stacks.create_stack(StackName="cosmic", TemplateBody=json.dumps(template))

    def done() -> bool:
        (stack,) = stacks.describe_stacks(StackName="cosmic")["Stacks"]
        return bool(stack["StackStatus"] == "CREATE_COMPLETE")

    wait_for(done, "the stack", 60)


def test_a_run_by_what_the_stack_says(account: Account) -> None:
    code, out, err = account.run("--run", "good")
    assert code == 0, err
    assert f"total   {ROWS} " in out
    assert "results: s3://cosmic/results/good/combined_data.json" in out
    assert "plot:    s3://cosmic/results/good/redshift.png" in out
    steps = [line.split()[2] for line in err.splitlines()]
    assert [step for step in dict.fromkeys(steps) if step.endswith(":")] == [
        *("stack:", "start:", "init:", "infer:", "summarize:", "plot:")
    ]
    usual = {"combined_data.json", "summary.json", "predictions.npz", "redshift.png", "ranks.json"}
    usual |= {"run.json"}
    assert usual | {f"{rank}.json" for rank in range(4)} <= account.files("good")
    payload = json.loads(account.execution("good")["input"])
    assert payload["server_secret_arn"].startswith("arn:aws:secretsmanager:")
    assert list(account.home.iterdir()) == []  # nothing of it is on this machine

    code, _, err = account.run("--run", "good")
    assert code == 1
    assert "the name is taken" in err
    assert "choose another --run" in err


def test_a_rank_that_dies_once(account: Account) -> None:
    code, out, err = account.run("--run", "once-kills-3-in-0", "--json")
    assert code == 0, err
    assert "infer: 4 ranks, attempt 2" in err
    answer = json.loads(out)
    assert [record["rank"] for record in answer["records"]] == [0, 1, 2, 3]
    assert answer["summary"]["rows"] == ROWS
    assert answer["plot"] == "s3://cosmic/results/once-kills-3-in-0/redshift.png"
    assert answer["execution_arn"] == account.execution("once-kills-3-in-0")["executionArn"]


def test_a_rank_that_fails(account: Account) -> None:
    words = ("--run", "bad", "--data", "s3://cosmic/datasets/strict", "--strict", "--json")
    code, out, err = account.run(*words)
    assert code == 1
    error = json.loads(out)["error"]
    assert (error["who"], error["type"], error["rank"]) == ("rank 2", "DatasetError", 2)
    assert "row 40" in error["message"]
    assert error["log_group"] == "/aws/lambda/cosmic-infer"
    arn = account.execution("bad")["executionArn"]
    last = err[err.index("Error: ") :].splitlines()
    assert last[0].startswith("Error: rank 2 failed: DatasetError: ")
    assert last[1:] == [
        f"  execution: {arn}",
        "  logs:      CloudWatch, log group /aws/lambda/cosmic-infer",
    ]


def test_init_that_fails(account: Account) -> None:
    code, _, err = account.run("--run", "none", "--data", "s3://cosmic/datasets/none")
    assert code == 1
    assert "Error: init failed: DatasetError: s3://cosmic/datasets/none: no .pt file" in err
    assert "log group /aws/lambda/cosmic-init" in err


@pytest.fixture
def silent() -> Iterator[str]:
    """host:port of a server that never says a word, so that ranks wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_execution(
    account: Account, silent: str, number: signal.Signals
) -> None:
    run = f"stopped-{number.name}"
    process = account.start("--run", run, "--rendezvous", silent)
    assert process.stderr is not None
    seen = ""
    while "4 running" not in seen:
        seen += (line := process.stderr.readline())
        assert line, seen
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == ""
    assert err.splitlines()[-1].startswith(f"Stopped by {number.name}; execution {run} is stopped")
    now = account.execution(run)
    assert (now["status"], now["cause"]) == ("ABORTED", "cosmic run: stopped by its user")


def test_the_time_limit_stops_the_execution(account: Account, silent: str) -> None:
    code, _, err = account.run("--run", "late", "--rendezvous", silent, "--timeout", "8")
    assert code == 1
    assert "Error: the run took longer than 8 s (--timeout), at step " in err
    assert account.execution("late")["status"] == "ABORTED"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stack", "other"], "there is none in us-east-1: check --stack and the region"),
        (
            ["--state-machine", "other", "--no-fmi", "--data", "s3://a/b", "--results", "s3://a/c"],
            "no such state machine: check --state-machine and the region",
        ),
    ],
)
def test_a_wrong_name(account: Account, words: list[str], says: str) -> None:
    code, out, err = account.run(*words)
    assert (code, out) == (1, "")
    assert says in err.splitlines()[-1]


def test_a_state_machine_by_name_without_a_rendezvous(account: Account) -> None:
    places = ("--data", "s3://cosmic/datasets/small", "--results", "s3://cosmic/results/alone")
    code, out, err = account.run("--state-machine", "cosmic", "--no-fmi", *places, "--run", "alone")
    assert code == 0, err
    assert "plot:    s3://cosmic/results/alone/alone/redshift.png" in out
