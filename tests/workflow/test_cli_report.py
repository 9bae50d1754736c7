"""`cosmic report`, from its words to what it prints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from made_runs import failed_run, made_run, many_findings
from typer.testing import CliRunner, Result

from workflow import cli, results
from workflow import cost as cost_module
from workflow.cli_report import report
from workflow.results import Results, Tabled

Cosmic = Callable[..., Result]
MADE = Results((made_run(1), failed_run(2, 8)), many_findings(2, 3))


@pytest.fixture
def cosmic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cosmic:
    """Run `cosmic report` on what is said to be in its paths, in an empty folder."""
    app = typer.Typer()
    app.command()(report)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()

    def run(*words: str, there: Results = MADE) -> Result:
        def read(paths: Any) -> Results:
            return there

        monkeypatch.setattr(results, "read", read)
        return CliRunner().invoke(app, list(words))

    return run


def test_it_says_what_was_written_and_how_much_is_to_be_known(cosmic: Cosmic) -> None:
    done = cosmic("runs")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[:4] == [
        "runs/report/report.html",
        "runs/report/report.md",
        "runs/report/results.csv",
        "runs/report/configurations.csv",
    ]
    assert f"runs/report/plots/: {len(list(Path('runs/report/plots').iterdir()))} pictures" in (
        done.stdout
    )
    last = "Runs: 2, 1 failed or incomplete. Warnings: 5 (kind 0 3, kind 1 2)"
    assert done.stdout.splitlines()[-1] == last
    assert "plot: time by stage" in done.stderr
    assert "from:\n" not in done.stdout


def test_json_is_all_that_a_program_reads(cosmic: Cosmic) -> None:
    done = cosmic("runs", "--json", "--out", "there", "--title", "Mine")
    told = json.loads(done.stdout)
    assert told["report"] == "there/report.html"
    assert all(Path(path).is_file() for path in told["written"])
    assert [tuple(f.values()) for f in told["findings"]] == [tuple(f) for f in MADE.findings]
    assert "<h1>Mine</h1>" in Path("there/report.html").read_text()


def test_a_file_has_its_report_beside_it_and_several_have_theirs_here(cosmic: Cosmic) -> None:
    Path("runs/summary.json").write_text("{}")
    assert "runs/report/report.html" in cosmic("runs/summary.json").stdout
    Path("more").mkdir()
    assert cosmic("runs", "more").stdout.startswith("report/report.html")


def test_a_device_has_no_report() -> None:
    done = CliRunner().invoke(cli.app, ["report", "/dev/null"])
    assert done.exit_code == 1
    assert "no results in /dev/null (it is not an ordinary file)" in done.stderr


def test_a_trace_is_of_the_run_that_is_shown(
    cosmic: Cosmic, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workflow import trace

    monkeypatch.setattr(trace, "chrome_trace", lambda run: {"traceEvents": [run.name]})
    done = cosmic("runs", "--trace", "t/trace.json", "--run", "w1-b32-small-r1")
    assert json.loads(Path("t/trace.json").read_text()) == {"traceEvents": ["w1-b32-small-r1"]}
    assert "t/trace.json" in done.stdout


def test_memory_and_prices_change_the_cost(cosmic: Cosmic) -> None:
    def cost(*words: str) -> float:
        assert cosmic("runs", *words).exit_code == 0
        line = Path("runs/report/results.csv").read_text().splitlines()[1]
        return float(line.rpartition(",")[2])

    assert cost("--memory", "10240") > cost("--memory", "1769") > 0
    prices = Path(cost_module.__file__).with_name("prices.toml").read_text()
    Path("mine.toml").write_text(re.sub(r"(?m)^usd = ", "usd = 1", prices))
    assert cost("--prices", "mine.toml") > cost()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["nothing"], 2, "nothing does not exist; name a folder or a file of results"),
        ([], 2, "Missing argument"),
        (["runs", "--prices", "none.toml"], 2, "no such file; leave it out"),
        (["runs", "--memory", "64"], 2, "128"),
        (["runs", "--run", "w9"], 1, "no run is called w9; there is w1-b32-small-r1, "),
        (["runs", "--run", "w9", "--trace", "t.json"], 1, "no run is called w9"),
        (["runs", "--run", "w2-b8-small-r1", "--trace", "t.json"], 1, "has no record of when"),
        (["runs", "--prices", "runs/bad.toml"], 1, "bad.toml"),
        (["runs", "--out", "runs/bad.toml/x"], 1, "bad.toml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    cosmic: Cosmic, words: list[str], code: int, text: str
) -> None:
    Path("runs/bad.toml").write_text("no prices")
    done = cosmic(*words)
    assert done.exit_code == code
    said = " ".join(done.stderr.replace("│", " ").split())
    assert text in said
    assert "Traceback" not in said
    assert not list(Path().rglob("report.html"))
    assert not Path("t.json").exists()


def test_no_results_at_all_are_an_error_and_findings_alone_are_not(cosmic: Cosmic) -> None:
    nothing = cosmic("runs", "--json", there=Results((), ()))
    assert nothing.exit_code == 1
    assert "there are no results in runs" in json.loads(nothing.stdout)["error"]["message"]
    assert cosmic("runs", there=Results((), many_findings(1, 1))).exit_code == 0
    Path("notes.md").write_text("no results")
    only = cosmic("notes.md", "--json", there=Results((), many_findings(1, 1)))
    assert only.exit_code == 1
    assert "in notes.md (rank 0 is missing); name" in json.loads(only.stdout)["error"]["message"]
    assert cosmic("runs", there=Results((made_run(),), ())).exit_code == 0


def test_tables_of_the_originals_are_results_too(cosmic: Cosmic) -> None:
    row = Tabled("stats.csv", 25.0, 1.0, 1, 5.6, 9e9, 1.5e9, 40.0, 20.0)
    done = cosmic("runs", "--out", "page", there=Results((), (), (row,)))
    assert done.exit_code == 0
    line = "| 25MB partitions, 1GB | 1 | 0 | 1 | 5.60 | 1.500 | 0.4500 | 0.2250 |"
    assert line in Path("page/report.md").read_text()


@pytest.mark.parametrize(("command", "argument"), [("report", "PATH..."), ("check", "SERVER")])
def test_help_calls_an_argument_the_same_everywhere(command: str, argument: str) -> None:
    said = CliRunner().invoke(cli.app, [command, "--help"], prog_name="cosmic").stdout
    assert said.startswith(f"Usage: cosmic {command} [OPTIONS] {argument}\n")
    assert re.search(rf"^Arguments:\n  {re.escape(argument)}  \w", said, re.MULTILINE)
