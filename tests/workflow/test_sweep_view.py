"""What a sweep says at its end, of runs that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workflow.results import Finding, Rank, Results, Run
from workflow.sweep import Manifest, Record, Sweep
from workflow.sweep_plan import Plan
from workflow.sweep_view import End

SIZES: dict[str, Any] = {"world_sizes": (1, 4), "batch_sizes": (128,), "repeat": 2, "seed": 0}


def run(world: int, repeat: int, seconds: float, data: str = "small", **more: Any) -> Run:
    known = {"wall_s": seconds + 1, "inference_s": seconds, "memory_limit_mb": 1855.0}
    ranks = tuple(Rank(rank=n, peak_memory_mb=300 + n, **known) for n in range(world))
    about = {"world_size": world, "batch_size": 128, "engine": "torch", "precision": "fp32"}
    usual = {"rows": 1253, "total_s": seconds + 4, "metrics": {"mae": 0.01, "r2": 0.9}}
    place = f"runs/w{world}-b128-{data}-r{repeat}"
    fields = {**about, **usual, "inference_s": seconds, "ranks": ranks, "repeat": repeat} | more
    return Run(place=place, source="cosmic run", name=place, data=data, **fields)


def end(folder: Path, runs: list[Run], sizes: tuple[str, ...] = ("small",), **more: Any) -> End:
    """The end of a sweep with these runs; those whose status says so have failed."""
    plan = Plan(**SIZES, data_sizes=sizes, **more)
    machine = {"cores_usable": 2}
    manifest = Manifest(kind="sweep", created="", plan=plan, environment=machine)
    sweep = Sweep(folder, manifest)
    for number, (item, measured) in enumerate(zip(sorted(sweep.items), runs, strict=False)):
        error = {"who": "rank 1", "type": None, "message": "was killed", "rank": 1}
        sweep.records[item.key] = Record(
            key=item.key,
            **item._asdict(),
            order=number + 1,
            **{"on": plan.on, "engine": "torch", "precision": "fp32", "started": ""},
            seconds=1,
            status="ok" if measured.status == "ok" else "failed",
            error=None if measured.status == "ok" else error,
        )
    findings = (Finding("x", "outliers", "one"),)
    return End(sweep, Results(tuple(runs), findings), "page.html", [], "cosmic sweep --name x")


def test_repeats_show_median_least_and_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    runs = [run(1, 1, 10.0), run(1, 2, 20.0), run(4, 1, 5.0), run(4, 2, 7.0)]
    end(tmp_path, runs).show()
    out = capsys.readouterr().out
    cells = [line.split()[:9] for line in out.splitlines() if "2/2" in line]
    assert cells[0][:8] == [
        "1",
        "128",
        "2/2",
        "15.00",
        "(10.00-20.00)",
        "19.00",
        "94",
        "1.00",
    ]  # (125 + 63) / 2
    assert cells[1][:8] == ["4", "128", "2/2", "6.00", "(5.00-7.00)", "10.00", "215", "2.50"]
    assert cells[1][8] == "303"
    assert "Of several runs: median (least-most)" in out
    assert "All ranks share this machine's 2 cores" in out
    assert "The report has 1 remark on these runs" in out
    assert "Warning" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_several_data_fit_into_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    runs = [run(w, r, 99.0, data) for data in ("medium", "small") for w in (1, 4) for r in (1, 2)]
    end(tmp_path, runs, ("medium", "small")).show()
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "2/2" in line] == [
        *("medium", "medium", "small", "small")
    ]
    assert max(map(len, out.splitlines())) <= 80


def test_failed_runs_are_named_and_in_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = run(4, 2, 900.0, status="failed", metrics={})
    it = end(tmp_path, [run(1, 1, 10.0), run(1, 2, 10.0), run(4, 1, 5.0), lost])
    it.show()
    out = capsys.readouterr().out
    assert "1/2 5.00" in " ".join(out.split())
    assert "1 of 4 runs failed:" in out
    assert "w4-b128-small-r2" in out
    assert "rank 1 was killed" in out
    assert "Do them again: cosmic sweep --name x" in out
    answer = json.loads(it.as_json())
    assert answer["failed"] == 1
    alone = end(tmp_path, [run(1, 1, 10.0), run(1, 2, 10.0), run(4, 1, 5.0), run(4, 2, 5.0)])
    costs = [json.loads(e.as_json())["configurations"][1]["cost_usd"] for e in (it, alone)]
    assert costs[0] == costs[1] > 0
    assert answer["configurations"][1]["failed"] == 1
    assert answer["configurations"][1]["runs"] == 2


@pytest.mark.parametrize(
    ("off", "precision", "warned"),
    [(2e-6, "fp32", False), (2e-5, "fp32", True), (2e-4, "bf16", False), (2e-3, "bf16", True)],
)
def test_accuracy_that_depends_on_the_configuration_is_told(
    tmp_path: Path, off: float, precision: str, warned: bool
) -> None:
    other = {"mae": 0.01 + off, "r2": 0.9}
    one = run(1, 1, 1.0, precision=precision)
    two = run(4, 1, 1.0, precision=precision, metrics=other)
    warnings = json.loads(end(tmp_path, [one, two, one, two]).as_json())["warnings"]
    assert len(warnings) == warned
    if warned:
        assert "Warning: mae on small is 0.01" in warnings[0]


def test_different_data_may_be_differently_accurate(tmp_path: Path) -> None:
    other = run(1, 1, 1.0, "medium", metrics={"mae": 0.5, "r2": 0.1})
    runs = [run(1, 1, 1.0), run(4, 1, 1.0), run(1, 2, 1.0), run(4, 2, 1.0), other]
    assert json.loads(end(tmp_path, runs).as_json())["warnings"] == []


def test_on_aws_nothing_is_said_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run(w, r, 9.0, on="aws") for w in (1, 4) for r in (1, 2)]
    end(tmp_path, runs, on="aws").show()
    out = capsys.readouterr().out
    assert "cores" not in out
    assert "USD: what the run costs on AWS" in out
