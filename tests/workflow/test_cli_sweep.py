"""`cosmic sweep` and `cosmic infer --batch-sizes` as processes, around fakes and for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_aws import MACHINE, FakeAws
from launched import alive, finish, pids, start, start_fakes, until
from typer.testing import CliRunner

from lambda_worker.storage import StorageError
from workflow import cli_sweep, report
from workflow.cli import app
from workflow.results import Results

Cosmic = Callable[..., "subprocess.Popen[str]"]
FOUR = ("--world-size", "1,2", "--batch-size", "8,16", "--no-fmi")
USUAL = ("--state-machine", MACHINE, "--rendezvous", "fmi.example.org:10000")
PLACES = ("--data", "s3://bucket/datasets/small", "--aws-results", "s3://bucket/results")


@pytest.fixture
def cosmic(tmp_path: Path) -> Cosmic:
    """Start `cosmic` around the fakes, in an empty folder."""
    (tmp_path / "tmp").mkdir()
    return partial(start_fakes, tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sixteen galaxies."""
    from workflow.datasets import make

    make(tmp_path / "few.pt", 16, "test", 0, lambda stage, rows, of: None)
    return tmp_path / "few.pt"


def fake(**what: str) -> str:
    return f"fake://{json.dumps(what)}"


def record(folder: Path, start: str) -> dict[str, Any]:
    (path,) = folder.glob(f"runs/{start}-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# -- what is said ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--world-size", "1,,2"], ["--world-size", "'1,,2' has an empty place between commas"]),
        (["--world-size", "0"], ["--world-size", "'0' is no whole number from 1 to 10,000"]),
        (["--world-size", "20000"], ["--world-size", "'20000' is no whole number from 1"]),
        (["--world-size", "1-4"], ["--world-size", "'1-4' is no", "give some, as in 1,2,4"]),
        (["--batch-size", "auto"], ["--batch-size", "'auto' is no whole number", "is not swept"]),
        (["--batch-size", "9" * 10], ["--batch-size", "no whole number from 1 to 999,999,999"]),
        (["--batch-size", "٣"], ["--batch-size", "no whole number"]),
        (["--data-size", "small,tiny"], ["--data-size", "'tiny' is none of small, medium, large"]),
        (["--data", ".", "--data-size", "small"], ["--data", "leave one out"]),
        (["--data", "nowhere"], ["--data", "nowhere does not exist"]),
        (["--model", "nothing"], ["--model", "nothing: no such file"]),
        (["--repeat", "0"], ["--repeat", "Invalid value"]),
        (["--name", "../up"], ["--name", "use letters, digits"]),
        (["--results", "s3://bucket/x"], ["--results", "on this machine", "--aws-results"]),
        (["--results", "/dev/null"], ["--results", "/dev/null is not a folder"]),
        (["--results", "/dev/null/x", "--name", "y"], ["--results", "is not a folder"]),
        (["--timeout", "inf"], ["--timeout", "inf is not a number of seconds"]),
        (["--stack", "x"], ["--stack", "that is for --on aws only"]),
        (["--aws-results", "s3://a/b"], ["--aws-results", "that is for --on aws only"]),
        (["--rendezvous", "a:1"], ["--rendezvous", "that is for --on aws only"]),
        (["--on", "aws", "--data", "mine"], ["--data", "mine", "s3:// URL"]),
        (["--on", "aws", "--aws-results", "mine"], ["--aws-results", "s3:// URL"]),
        (["--on", "aws", *USUAL, "--data-size", "small"], ["--data-size", "name it with --data"]),
        (["--on", "aws", *USUAL, *PLACES[:2]], ["--aws-results", "needed with --state-machine"]),
        (["--on", "aws", *USUAL[:2], *PLACES], ["--rendezvous", "needed with", "or --no-fmi"]),
    ],
)
def test_wrong_usage_names_the_option_and_makes_nothing(
    words: list[str], says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["sweep", *words])
    assert done.exit_code == 2
    assert done.stdout == ""
    seen = "".join(done.stderr.split())
    assert not [text for text in says if text.replace(" ", "") not in seen], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch-sizes", "1,x"], ["--batch-sizes", "'x' is no whole number from 1"]),
        (["--batch-sizes", "1", "--batch-size", "1"], ["--batch-size", "is for one run"]),
        (["--batch-sizes", "1", "--plot", "a.png"], ["--plot", "is for one run"]),
        (["--batch-sizes", "1", "--profile"], ["--profile", "is for one run"]),
        (["--repeat", "2"], ["--repeat", "goes with --batch-sizes only"]),
        (["--seed", "2"], ["--seed", "goes with --batch-sizes only"]),
        (["--name", "none"], ["--batch-sizes", "needed, as results/none is not there"]),
    ],
)
def test_wrong_usage_of_infer(
    words: list[str], says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["infer", *words])
    assert done.exit_code == 2
    seen = "".join(done.stderr.split())
    assert not [text for text in says if text.replace(" ", "") not in seen], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["sweep", "infer"])
def test_help_fits_and_has_sections(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    title, option = (
        ("Only with --on aws:", "--stack NAME")
        if command == "sweep"
        else (
            "Several batch sizes:",
            "--batch-sizes N,...",
        )
    )
    assert option in done.stdout.partition(title)[2]


# -- to the end --------------------------------------------------------------------------------


def test_a_sweep_ends_with_a_table_and_a_page(cosmic: Cosmic, tmp_path: Path) -> None:
    code, out, err = finish(cosmic("sweep", *FOUR, "--data", fake(), "--name", "mine"))
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    table = [line[:4] for line in lines if line[2:3] == ["1/1"]]
    assert table == [[w, b, "1/1", "0.50"] for w in "12" for b in ("8", "16")]
    assert lines[-2:] == [["runs:", "results/mine"], ["report:", "results/mine/report/report.html"]]
    assert max(map(len, out.splitlines())) <= 80
    assert "report.html" in os.listdir(tmp_path / "results/mine/report")
    assert "warm-up: a run that is not counted" in err
    assert "run 4 of 4: " in err
    run = record(tmp_path / "results/mine", "w2-b16")
    assert (run["status"], run["world_size"], run["batch_size"]) == ("ok", 2, 16)
    folder = Path(run["folder"])
    assert folder.parent == tmp_path / "results/mine/runs"
    assert json.loads((folder / "run.json").read_text())["plan"]["batch_size"] == 16
    assert not (tmp_path / "results/mine/warm-up").exists()


def test_a_report_that_cannot_be_written_does_not_cost_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageError("cannot write report.html: No space left on device")

    monkeypatch.setattr(report, "write", full)
    sweep: Any = SimpleNamespace(folder=tmp_path)
    said: list[str] = []
    view: Any = SimpleNamespace(step=said.append)
    assert cli_sweep._report(sweep, view) == (Results((), ()), None)
    assert said[-1] == "no report: cannot write report.html: No space left on device"


def test_json_is_all_there_is_on_stdout(cosmic: Cosmic, tmp_path: Path) -> None:
    words = ("--world-size", "2,1,2", "--world-size", "3", "--batch-size", "8", "--no-fmi")
    done = finish(cosmic("sweep", *words, "--data", fake(), "--seed", "5", "--json"))
    code, out, err = done
    assert code == 0, err
    answer = json.loads(out)
    assert answer["plan"]["world_sizes"] == [2, 1, 3]
    assert answer["plan"]["seed"] == 5
    assert [each["world_size"] for each in answer["configurations"]] == [1, 2, 3]
    assert answer["configurations"][1]["measures"]["inference_s"]["median"] == 0.5
    assert sorted(run["order"] for run in answer["runs"]) == [1, 2, 3]
    assert Path(answer["report"]) == Path(answer["folder"]) / "report" / "report.html"
    assert answer["failed"] == 0
    assert answer["name"].startswith("sweep-2")


def test_a_rank_that_is_killed_does_not_end_the_sweep(cosmic: Cosmic, tmp_path: Path) -> None:
    words = ("sweep", *FOUR, "--data", fake(**{"infer 1": "kill"}), "--name", "bad")
    code, out, err = finish(cosmic(*words))
    assert code == 1
    assert "2 of 4 runs failed:" in out
    assert out.count("rank 1 was killed by SIGKILL (out of memory?)") == 2
    assert "Do them again: cosmic sweep --name bad" in out
    assert [line.split()[2] for line in out.splitlines() if line.split()[2:3] in (["0/1"], ["1/1"])]
    assert "  failed: rank 1 was killed by SIGKILL" in err
    run = record(tmp_path / "results/bad", "w2-b8")
    assert (run["status"], run["error"]["rank"]) == ("failed", 1)
    assert record(tmp_path / "results/bad", "w1-b8")["status"] == "ok"

    code, _, err = finish(cosmic("sweep", "--name", "bad"))
    assert code == 1
    assert "4 runs, 2 of them done before" in err
    assert len(record(tmp_path / "results/bad", "w2-b8")["failures"]) == 1


@pytest.mark.alone
def test_the_timeout_is_each_runs(cosmic: Cosmic, tmp_path: Path) -> None:
    words = ("sweep", *FOUR, "--data", fake(**{"infer 1": "hang"}), "--timeout", "2")
    code, out, _ = finish(cosmic(*words))
    assert code == 1
    assert out.count("took longer than 2 s (--timeout)") == 2
    assert not [pid for pid in pids(tmp_path) if alive(pid)]


# -- stopped, and gone on with -----------------------------------------------------------------


def hanging(cosmic: Cosmic, tmp_path: Path) -> subprocess.Popen[str]:
    """A sweep of which the runs of 1 rank go well, and those of 2 never end."""
    words = ("--world-size", "2,1", "--batch-size", "8", "--repeat", "2", "--no-fmi")
    process = cosmic(
        "sweep", *words, "--data", fake(**{"infer 1": "hang", "x": "/same"}), "--name", "long"
    )
    until(lambda: list(tmp_path.glob("results/long/runs/w2-*/1.pid")), 40)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_how_to_go_on(cosmic: Cosmic, tmp_path: Path, number: signal.Signals) -> None:
    process = hanging(cosmic, tmp_path)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number
    assert out == ""
    done = len(list(tmp_path.glob("results/long/runs/*.json")))
    assert err.splitlines()[-1] == (
        f"Stopped by {number.name}; {done} of 4 runs are done, go on with: "
        "cosmic sweep --name long."
    )
    assert not [pid for pid in pids(tmp_path) if alive(pid)]
    assert not list((tmp_path / "tmp").iterdir())


def test_a_killed_sweep_goes_on_where_it_was(cosmic: Cosmic, tmp_path: Path) -> None:
    process = hanging(cosmic, tmp_path)
    second = cosmic("sweep", "--name", "long")
    code, out, err = finish(second)
    assert (code, out) == (1, "")
    assert f"Error: results/long: process {process.pid} is at work on it" in err
    process.kill()
    finish(process)
    until(lambda: not [pid for pid in pids(tmp_path) if alive(pid)])
    manifest = tmp_path / "results/long/sweep.json"
    changed = json.loads(manifest.read_text())
    changed["plan"]["data"] = fake(x="/same")  # nothing hangs any more
    manifest.write_text(json.dumps(changed))
    code, out, err = finish(cosmic("sweep", "--name", "long"))
    assert code == 0, err
    runs = tmp_path / "results/long/runs"
    assert len(list(runs.glob("*.json"))) == 4
    assert not list(runs.glob(".*"))
    # The run that was cut off was done anew.
    assert len(list(runs.glob("*/run.json"))) == 4
    assert len(list(runs.iterdir())) == 8


def test_a_sweep_grows_but_does_not_change(cosmic: Cosmic, tmp_path: Path) -> None:
    usual = ("--data", fake(), "--name", "mine")
    finish(cosmic("sweep", "--world-size", "1", "--batch-size", "8", "--no-fmi", *usual))
    first = record(tmp_path / "results/mine", "w1-b8")
    for words, says in (
        (("--world-size", "2"), "--world-size: this sweep has 1 too; leave the option out, give 1"),
        (("--engine", "onnx"), "--engine: this sweep was begun with torch; leave the option out"),
        (("--data", "."), "--data: this sweep was begun with fake"),
    ):
        code, _, err = finish(cosmic("sweep", "--name", "mine", *words))
        assert code == 2
        assert says.replace(" ", "") in "".join(err.split())
    code, _, err = finish(cosmic("infer", "--name", "mine"))
    assert code == 1
    assert "results/mine is of another kind; go on with: cosmic sweep --name mine" in err
    code, _, err = finish(cosmic("sweep", "--name", "mine", "--world-size", "1,2"))
    assert code == 0, err
    assert "2 runs, 1 of them done before" in err
    assert record(tmp_path / "results/mine", "w1-b8") == first
    assert record(tmp_path / "results/mine", "w2-b8")["order"] == 2


def test_a_changed_machine_is_told(cosmic: Cosmic, tmp_path: Path) -> None:
    words = ("sweep", "--world-size", "1", "--batch-size", "8", "--no-fmi", "--data", fake())
    finish(cosmic(*words, "--name", "m"))
    manifest = tmp_path / "results/m/sweep.json"
    changed = json.loads(manifest.read_text())
    changed["environment"]["cpu"] = "another"
    manifest.write_text(json.dumps(changed))
    code, out, _ = finish(cosmic("sweep", "--name", "m"))
    assert code == 0
    assert "Warning: since the sweep was begun, this machine has changed (cpu)" in out


# -- on AWS ------------------------------------------------------------------------------------


def test_a_sweep_on_aws_keeps_what_it_needs_here(
    aws: FakeAws, cosmic: Cosmic, tmp_path: Path
) -> None:
    aws.objects["bucket/results/r-1/summary.json"] = b"{}"
    words = ("--on", "aws", *USUAL, *PLACES, "--world-size", "4,5", "--batch-size", "8")
    code, out, err = finish(cosmic("sweep", *words, "--name", "n" * 64))
    assert code == 0, err
    started = [json.loads(call["input"]) for call in aws.asked("StartExecution")]
    assert sorted(each["world_size"] for each in started) == [4, 5]
    names = [call["name"] for call in aws.asked("StartExecution")]
    assert len(set(names)) == 2
    assert all(
        len(name) <= 80 and name.startswith("nnn") and "-b8-small-" in name for name in names
    )
    assert {each["results"] for each in started} == {"s3://bucket/results"}
    run = record(tmp_path / "results" / ("n" * 64), "w4")
    assert (run["on"], run["folder"]) == ("aws", "s3://bucket/results/r-1")
    here = tmp_path / "results" / ("n" * 64) / "runs" / run["key"]
    assert {p.name for p in here.iterdir()} == {"combined_data.json", "summary.json", "run.json"}
    assert "warm-up" not in err
    assert "this machine's" not in out


@pytest.mark.parametrize("name", [(), ("--name", "mine")])
def test_a_sweep_whose_stack_is_not_there_leaves_nothing(
    aws: FakeAws, cosmic: Cosmic, tmp_path: Path, name: tuple[str, ...]
) -> None:
    code, _, err = finish(cosmic("sweep", "--on", "aws", "--stack", "gone", *name))
    assert code == 1
    assert "cannot read the stack gone" in err
    assert list((tmp_path / "results").iterdir()) == []


def test_a_sweep_that_has_begun_outlives_its_stack(
    aws: FakeAws, cosmic: Cosmic, tmp_path: Path
) -> None:
    aws.objects["bucket/results/r-1/summary.json"] = b"{}"
    aws.outputs = {"StateMachineArn": MACHINE, "BucketName": "bucket"}
    words = ("--on", "aws", "--no-fmi", "--world-size", "4", "--batch-size", "8", "--name", "mine")
    code, _, err = finish(cosmic("sweep", *words))
    assert code == 0, err
    aws.outputs = None
    code, _, err = finish(cosmic("sweep", "--name", "mine", "--batch-size", "8,16"))
    assert (code, "cannot read the stack" in err) == (1, True)
    assert record(tmp_path / "results" / "mine", "w4")["status"] == "ok"
    assert (tmp_path / "results" / "mine" / "sweep.json").exists()


# -- for real ----------------------------------------------------------------------------------


def test_a_real_sweep_of_two_configurations(data: Path, tmp_path: Path) -> None:
    words = ("sweep", "--world-size", "1,2", "--batch-size", "8", "--data", str(data), "--json")
    words = (*words, "--engine", "auto")  # which is faster
    code, out, err = finish(start(tmp_path, "-m", "workflow", *words))
    assert code == 0, err
    answer = json.loads(out)
    one, two = answer["configurations"]
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["measures"]["rows_per_s_wall_clock"]["median"] > 0
    assert one["speedup"] == 1
    assert two["speedup"] > 0
    assert answer["warnings"] == []
    assert [run["status"] for run in answer["runs"]] == ["ok", "ok"]


def test_real_batch_sizes_are_equally_accurate(data: Path, tmp_path: Path) -> None:
    words = ("infer", "--batch-sizes", "4,16", "--data", str(data), "--name", "b")
    code, out, err = finish(start(tmp_path, "-m", "workflow", *words, "--engine", "onnx"))
    assert code == 0, err
    speed, _, accuracy = out.partition("Accuracy")
    lines = [line.split() for line in speed.splitlines()]
    assert [line[:3] for line in lines if "1/1" in line] == [["4", "1/1", "4"], ["16", "1/1", "1"]]
    metrics = [line.split()[2:] for line in accuracy.splitlines() if "1/1" in line]
    assert metrics[0] == metrics[1]
    assert "Warning" not in out
    assert max(map(len, out.splitlines())) <= 80
    run = record(tmp_path / "results/b", "w1-b4")
    assert run["report"]["batch_size"] == 4
    assert run["folder"] is None
