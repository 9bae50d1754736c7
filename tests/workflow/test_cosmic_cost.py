"""The command line of costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.workflow.test_estimate import run as made
from workflow import results
from workflow.cli_cost import cost
from workflow.results import Results, Run

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(cost)


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "80"})


def told(*words: str) -> dict[str, Any]:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_which_is_cheapest_and_which_is_fastest() -> None:
    answer = told("--rows", "659817")
    points = answer["frontier"]
    assert points[0] | {"items_usd": answer["cheapest"]["items_usd"]} == answer["cheapest"]
    assert answer["fastest"]["seconds"] == min(point["seconds"] for point in points)
    assert answer["fastest"]["world_size"] <= 1000
    assert answer["cheapest"]["memory_mb"] == 1769  # below a core all takes longer for the same
    assert sum(answer["knee"]["items_usd"].values()) == pytest.approx(answer["knee"]["usd"])
    assert answer["usd_per_hour"]["total"] == pytest.approx(0.0513, abs=1e-4)
    assert answer["asked"] is None


def test_one_choice() -> None:
    answer = told("--rows", "659817", "--world-size", "130", "--memory", "2048")
    asked = answer["asked"]
    assert (asked["world_size"], asked["memory_mb"]) == (130, 2048)
    assert answer["cheapest"]["usd"] <= asked["usd"]
    assert answer["fastest"]["seconds"] <= asked["seconds"]
    only = told("--rows", "659817", "--world-size", "130")
    assert {point["world_size"] for point in only["frontier"]} == {130}
    only = told("--rows", "659817", "--memory", "2048")
    assert {point["memory_mb"] for point in only["frontier"]} == {2048}
    few = told("--rows", "659817", "--max-world-size", "20")
    assert max(point["world_size"] for point in few["frontier"]) == 20


def test_what_people_read_fits_their_terminal() -> None:
    result = call("--rows", "659817", "--world-size", "130", "--memory", "2048", "--arch", "arm")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    first = result.stdout.splitlines()[0]
    assert first.startswith("659,817 rows, asked for: 130 ranks of 2,048 MB (1.16 cores), ")
    for word in ("cheapest", "knee", "fastest", "USD per run", "USD per hour", "more of them"):
        assert word in result.stdout
    assert "335 rows/s on one core" in result.stdout  # never without where that is from
    assert "never measured" in result.stdout  # on ARM


def test_the_session_in_the_docs_is_what_comes_out() -> None:
    text = (Path(__file__).parent.parent.parent / "docs/cost.md").read_text()
    command, _, shown = text.partition("```\n$ cosmic cost ")[2].partition("\n")
    lines = call(*command.split()).stdout.splitlines()
    assert [line.rstrip() for line in lines] == shown.partition("```")[0].splitlines()


def test_arm_is_cheaper_at_the_same_time() -> None:
    words = ("--rows", "10000", "--world-size", "4", "--memory", "1769")
    x86, arm = (told(*words, "--arch", arch)["asked"] for arch in ("x86", "arm"))
    assert x86["seconds"] == arm["seconds"]
    ratio = arm["items_usd"]["Lambda, ranks"] / x86["items_usd"]["Lambda, ranks"]
    assert ratio == pytest.approx(0.8, abs=1e-4)


def test_another_speed() -> None:
    words = ("--rows", "10000", "--world-size", "4", "--memory", "1769")
    slow, fast = (
        told(*words, "--rows-per-second", rate)["asked"]["billed_rank_seconds"]
        for rate in ("100", "1e3")
    )
    assert slow - fast == pytest.approx(22.5)
    assert told(*words, "--engine", "onnx")["speed"]["rows_per_s_of_one_core"] == 369


def results_are(monkeypatch: pytest.MonkeyPatch, *runs: Run) -> None:
    def read(paths: list[str]) -> Results:
        assert list(paths) == ["a", "b"]
        return Results(tuple(runs), ())

    monkeypatch.setattr(results, "read", read)


def test_speed_from_results(monkeypatch: pytest.MonkeyPatch) -> None:
    results_are(monkeypatch, made(100), made(9, status="failed"))
    answer = told("--rows", "10000", "--from", "a", "--from", "b")
    assert answer["speed"]["rows_per_s_of_one_core"] == pytest.approx(100)
    assert answer["speed"]["least_memory_mb"] == 573
    assert "onnx, fp32, batches of 32" in "".join(answer["assumptions"])


def test_failed_runs_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results_are(monkeypatch, made(9, status="failed"))
    result = call("--rows", "10000", "--from", "a", "--from", "b", "--json")
    assert result.exit_code == 1
    assert "none of its 1 runs ended well" in json.loads(result.stdout)["error"]["message"]
    assert "none of its 1 runs ended well" in result.stderr


def test_results_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(paths: list[str]) -> Results:
        raise ValueError(f"{paths[0]} does not exist")

    monkeypatch.setattr(results, "read", read)
    result = call("--rows", "9", "--from", "/none")
    assert (result.exit_code, result.stderr) == (1, "Error: /none does not exist\n")


def test_a_place_without_results_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "read", lambda paths: Results((), ()))
    result = call("--rows", "9", "--from", "a", "--from", "b")
    assert (result.exit_code, result.stderr) == (1, "Error: there are no results in a, b\n")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("--rows 0", 2, "--rows"),
        ("--rows -3", 2, "--rows"),
        ("--rows 1e3", 2, "--rows"),
        ("", 2, "--rows"),
        ("--rows 9 --world-size 0", 2, "--world-size"),
        ("--rows 9 --memory 127", 2, "--memory"),
        ("--rows 9 --memory 10241", 2, "--memory"),
        ("--rows 9 --memory 300", 1, "300 MB are too few: a rank needs 512"),
        ("--rows 9 --rows-per-second nan", 2, "not a number above 0"),
        ("--rows 9 --rows-per-second inf", 2, "not a number above 0"),
        ("--rows 9 --rows-per-second 0", 2, "not a number above 0"),
        ("--rows 9 --rows-per-second 1e-300", 1, "take more ranks"),
        ("--rows 9 --rows-per-second 5 --from x", 2, "leave one out"),
        ("--rows 9 --engine onnx --from x", 2, "leave one out"),
        ("--rows 9 --plot a.pdf", 2, "ends with .png"),
        ("--rows 9 --region mars-1", 1, "no prices of mars-1"),
        ("--rows 9 --prices /none.toml", 1, "/none.toml: No such file"),
        ("--rows 1000000000000", 1, "take more ranks (--world-size, --max-world-size)"),
        ("--rows 659817 --world-size 1 --memory 1769", 1, "Lambda ends them after 900 s"),
    ],
)
def test_what_is_refused(words: str, code: int, text: str) -> None:
    result = call(*words.split())
    assert result.exit_code == code, result.output
    assert text in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_more_ranks_than_rows_is_said() -> None:
    result = call("--rows", "9", "--world-size", "12", "--memory", "1769")
    assert result.exit_code == 0
    assert "3 of these ranks would have no rows" in result.stdout


def test_one_row() -> None:
    answer = told("--rows", "1")
    assert len(answer["frontier"]) == 1
    assert "1 row, knee: 1 rank of 1,769 MB" in call("--rows", "1").stdout


@pytest.mark.parametrize("rows", ["1", "659817"])
def test_a_picture(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "f.png"
    result = call("--rows", rows, "--plot", str(path))
    assert result.exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "plot: " in result.stdout
    result = call("--rows", rows, "--plot", str(tmp_path / "f.png" / "g.png"))
    assert result.exit_code == 1
    assert "g.png" in result.stderr
