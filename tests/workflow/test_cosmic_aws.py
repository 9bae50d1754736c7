"""`cosmic run --on aws` as a process: options, what people see, signals."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import launched
import pytest
from fake_aws import MACHINE, FakeAws, Frame, ranks
from launched import finish, until
from rich.console import Console
from typer.testing import CliRunner

from workflow.cli import app
from workflow.plan import RanksProgress, Step
from workflow.progress import LiveView, tell

Start = Callable[..., "subprocess.Popen[str]"]
MINE = ("--state-machine", MACHINE, "--rendezvous", "fmi.example.org:10000")
PLACES = ("--data", "s3://bucket/datasets/small", "--results", "s3://bucket/results")
NAMED = (*MINE, *PLACES, "--run", "r-1")


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start `cosmic run` in an empty folder; the environment is the fake account's, if there is."""
    return partial(launched.start, tmp_path, "-m", "workflow", "run")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stack", "x"], ["--stack", "that is for --on aws only"]),
        (["--state-machine", "x"], ["--state-machine", "that is for --on aws only"]),
        (["--endpoint-url", "http://x"], ["--endpoint-url", "that is for --on aws only"]),
        (["--on", "moon"], ["'--on'", "'local', 'aws'"]),
        (["--on", "aws", "--seed", "3"], ["--seed", "that is for --on local only"]),
        (["--on", "aws", "--data", "mine"], ["--data", "mine: the functions", "s3:// URL"]),
        (["--on", "aws", "--data", "s3://"], ["--data", "s3:// URL"]),
        (["--on", "aws", "--model", "m.safetensors"], ["--model", "s3:// URL"]),
        (["--on", "aws", "--results", "./out"], ["--results", "s3:// URL"]),
        (["--on", "aws", "--run", "x" * 81], ["--run", "80 characters at most", "81"]),
        (["--on", "aws", "--endpoint-url", "localhost:4566"], ["--endpoint-url", "http(s)://host"]),
        (["--on", "aws", "--stack", "x", *MINE], ["--state-machine", "leave --stack or this out"]),
        (
            ["--on", "aws", "--state-machine", "arn:aws:x"],
            ["--state-machine", "neither a name nor"],
        ),
        (["--on", "aws", *MINE, "--data-size", "small"], ["--data-size", "name it with --data"]),
        (["--on", "aws", *MINE, *PLACES[:2]], ["--results", "needed with --state-machine"]),
        (["--on", "aws", *MINE, *PLACES[2:]], ["--data", "needed with --state-machine"]),
        (["--on", "aws", *MINE[:2], *PLACES], ["--rendezvous", "needed with", "or --no-fmi"]),
    ],
)
def test_wrong_usage_names_the_option(words: list[str], says: list[str]) -> None:
    done = CliRunner().invoke(app, ["run", *words])
    assert done.exit_code == 2
    assert done.stdout == ""
    seen = "".join(done.stderr.split())
    assert not [text for text in says if text.replace(" ", "") not in seen], done.stderr


def test_help_says_what_belongs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, ["run", "--help"])
    assert done.exit_code == 0
    common, _, rest = done.stdout.partition("Only with --on local:")
    local, _, aws = rest.partition("Only with --on aws:")
    assert "--on <local|aws>" in common
    assert "--seed" in local
    options = ("--stack", "--state-machine", "--endpoint-url")
    assert not [option for option in options if option not in aws]
    assert "--stack" not in common
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_run_ends_with_the_same_table_as_here(aws: FakeAws, start: Start) -> None:
    code, out, err = finish(start("--on", "aws", *NAMED))
    assert code == 0, err
    assert "total   40" in out
    assert "results: s3://bucket/results/r-1/combined_data.json" in out
    steps = [line.split()[2] for line in err.splitlines() if line.split()[2].endswith(":")]
    assert list(dict.fromkeys(steps)) == ["start:", "init:", "infer:", "summarize:"]


def test_json_has_the_execution_too(aws: FakeAws, start: Start) -> None:
    code, out, err = finish(start("--on", "aws", *NAMED, "--json"))
    assert code == 0, err
    answer = json.loads(out)
    assert answer["summary"]["metrics"]["r2"] == 0.92
    assert [record["rank"] for record in answer["records"]] == [0, 1, 2, 3]
    assert answer["execution_arn"] == aws.arn
    assert answer["plot"] is None


def test_what_the_launcher_knows_goes_to_the_bucket(aws: FakeAws, start: Start) -> None:
    code, _, err = finish(start("--on", "aws", *NAMED))
    assert code == 0, err
    told = json.loads(aws.objects["bucket/results/r-1/run.json"])
    assert (told["run"], told["on"], told["plan"]["data"]) == ("r-1", "aws", PLACES[1])
    assert [name for _, name, _, _ in told["spans"]] == ["start", "init", "infer", "summarize"]
    assert told["environment"] is None  # this machine's is not the ranks'


def test_the_stack_says_what_is_not_given(aws: FakeAws, start: Start) -> None:
    aws.outputs = {
        "StateMachineArn": MACHINE,
        "BucketName": "bucket",
        "RendezvousEndpoint": "nlb.example.org:10000",
        "ServerSecretArn": "arn:secret",
        "KeyArn": "arn:key",
    }
    code, _, err = finish(start("--on", "aws", "--data-size", "medium", "--run", "r-1"))
    assert code == 0, err
    event = json.loads(aws.asked("StartExecution")[0]["input"])
    expected = {
        "data": "s3://bucket/datasets/medium",
        "results": "s3://bucket/results",
        "rendezvous_endpoint": "nlb.example.org:10000",
        "server_secret_arn": "arn:secret",
        "key_arn": "arn:key",
    }
    assert {name: event.get(name) for name in expected} == expected
    assert aws.asked("DescribeStacks")[0]["StackName"] == "cosmic"


def test_what_is_given_wins_over_the_stack(
    aws: FakeAws, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    aws.outputs = {"StateMachineArn": MACHINE, "BucketName": "bucket"}
    words = ("--on", "aws", "--stack", "mine", *MINE[2:], "--run", "r-1")
    words = (*words, "--data", "s3://other/mine", "--endpoint-url", aws.endpoint)
    code, _, err = finish(start(*words))
    assert code == 0, err
    event = json.loads(aws.asked("StartExecution")[0]["input"])
    assert event["rendezvous_endpoint"] == "fmi.example.org:10000"
    assert (event["data"], event["results"]) == ("s3://other/mine", PLACES[3])
    assert aws.asked("DescribeStacks")[0]["StackName"] == "mine"


def test_a_stack_that_is_not_there(aws: FakeAws, start: Start) -> None:
    code, out, err = finish(start("--on", "aws", "--json"))
    assert code == 1
    says = "cannot read the stack cosmic: there is none in us-east-1: check --stack and the region"
    assert json.loads(out)["error"]["message"].startswith(says)
    assert err.splitlines()[-1].startswith(f"Error: {says}")


def test_a_failed_run_says_whose_fault_it_was(aws: FakeAws, start: Start) -> None:
    end = {"error": "DatasetError", "cause": "rank 1 failed: DatasetError: bad.pt: truncated"}
    aws.frames = [Frame("FAILED", (ranks("FAILED", failed=1),), end)]
    code, out, err = finish(start("--on", "aws", *NAMED, "--json"))
    assert code == 1
    assert json.loads(out)["error"] == {
        "who": "rank 1",
        "type": "DatasetError",
        "message": "bad.pt: truncated",
        "rank": 1,
        "execution_arn": aws.arn,
        "log_group": "/cosmic/w",
    }
    assert err.splitlines()[-3:] == [
        "Error: rank 1 failed: DatasetError: bad.pt: truncated",
        f"  execution: {aws.arn}",
        "  logs:      CloudWatch, log group /cosmic/w",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_execution(aws: FakeAws, start: Start, number: signal.Signals) -> None:
    aws.frames = [Frame("RUNNING", (ranks(running=4),))]
    process = start("--on", "aws", *NAMED)
    until(lambda: aws.asked("DescribeMapRun"), 40)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number
    assert out == ""
    assert err.splitlines()[-1] == (
        f"Stopped by {number.name}; execution r-1 is stopped; functions that run already cannot "
        "be, and end by themselves."
    )
    assert len(aws.asked("StopExecution")) == 1
    assert "Traceback" not in err


def test_ranks_on_aws_are_one_bar_and_a_failed_attempt_is_marked() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with LiveView(screen, "ranks") as view:
        tell(view, Step("infer", "infer: 4 ranks"))
        tell(view, RanksProgress(running=1, done=1, failed=1, of=4))
        view._live.refresh()
        tell(view, Step("blame", "blame: who was it?"))
        tell(view, Step("infer", "infer: 4 ranks, attempt 2"))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "ranks 1 running, 1 failed, 1 waiting" in text
    assert "1 / 4 ranks" in text
    assert "✗ infer: 4 ranks" in text
    assert "✓ blame: who was it?" in text
