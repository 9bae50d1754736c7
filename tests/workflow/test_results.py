"""Our own files, as results: runs, sweeps, reports of one process; and what paths may be."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.result_files import kinds, of_kind, our_record, our_run, put
from workflow.configurations import COLUMNS, row, summarise
from workflow.plan import Span
from workflow.results import Results, ResultsError, read
from workflow.results_ours import short_data


def _report(batch_size: int, seconds: float = 2.0) -> Any:
    """What `cosmic infer --json` says, as far as it is read."""
    return {
        "data": "data/demo-small-test-0-7e10ddce.pt",
        "engine": "torch",
        "precision": "fp32",
        "batch_size": batch_size,
        "rows": 100,
        "rows_excluded": 3,
        "batches": 4,
        "seconds": {"load": 0.5, "inference": seconds, "cpu": 3.5},
        "batch_seconds": {"mean": 0.5, "p50": 0.5, "p95": 0.6},
        "rows_per_second": 100 / seconds,
        "bits_per_second": 100 * 164_160 / seconds,
        "memory_mb": {"peak": 310.5, "beyond_imports": 66.9},
        "metrics": {"mae": 0.01, "mse": 0.001, "bias": 0.0, "nmad": 0.01, "r2": 0.9},
        "environment": {"cpu": "EPYC", "threads": 2},
    }


def _sweep(folder: Path, **plan: Any) -> Path:
    """Write a sweep of two runs that went well and one that failed."""
    fields = {"world_sizes": [1, 2], "batch_sizes": [32, 64], "data_sizes": ["small"], "repeat": 1}
    content = {"format": 1, "kind": "sweep", "created": "2026-11-27", "plan": {**fields, **plan}}
    put(folder / "sweep.json", {**content, "environment": {"cores": 2}})
    for world_size in (1, 2):
        name = f"w{world_size}-b32-small-r1"
        ranks = [our_record(n, world_size, 4.0 / world_size) for n in range(world_size)]
        our_run(folder / "runs" / name, ranks)
        put(folder / "runs" / f"{name}.json", _attempt(world_size, folder=f"/elsewhere/{name}"))
    error = {"who": "rank 1", "type": "Boom", "message": "no memory", "rank": 1}
    failed = _attempt(2, 64, status="failed", error=error)
    put(folder / "runs" / "w2-b64-small-r1.json", failed)
    put(folder / "report" / "results.json", [{"anything": 1}])
    return folder


def _attempt(world_size: int, batch_size: int = 32, **more: Any) -> Any:
    fields = {"data": "small", "world_size": world_size, "batch_size": batch_size, "repeat": 1}
    asked = {"on": "local", "engine": "torch", "precision": "fp32", "seconds": 9.0}
    key = f"w{world_size}-b{batch_size}-small-r1"
    return {"format": 1, "key": key, "status": "ok", "error": None, **fields, **asked, **more}


# -- a run ----------------------------------------------------------------------------------------


def test_a_runs_folder(tmp_path: Path) -> None:
    spans = [[None, "init", 100.0, 0.5], [None, "infer", 100.5, 3.0]]
    ranks = [our_record(0, seconds=1.0), our_record(1, seconds=2.0)]
    results = read([str(our_run(tmp_path / "r1", ranks, spans=spans, seconds=5.5))])
    assert results.findings == ()
    (run,) = results.runs
    assert (run.source, run.name, run.on, run.data) == ("cosmic run", "r1", "local", "small")
    assert (run.status, run.world_size, run.batch_size) == ("ok", 2, 32)
    assert (run.engine, run.precision) == ("torch", "fp32")
    assert (run.total_s, run.inference_s) == (5.5, 2.0)
    assert (run.rows, run.bits) == (100, 100 * 164_160)
    assert dict(run.metrics) == {
        "mae": 0.01,
        "mse": 0.001,
        "bias": -0.002,
        "nmad": 0.01,
        "r2": None,
    }
    assert run.predictions == str(tmp_path / "r1" / "predictions.npz")
    assert run.environment == {"cpu": "EPYC"}
    assert run.spans[:3] == (
        Span(None, "init", 100.0, 0.5),
        Span(None, "infer", 100.5, 3.0),
        Span(0, "join", 100.0, 0.1),
    )
    assert len(run.spans) == 6


def test_a_rank_of_ours(tmp_path: Path) -> None:
    (run,) = read([str(our_run(tmp_path / "r", [our_record(0, 1)]))]).runs
    rank = run.ranks[0]
    assert (rank.rank, rank.rows, rank.batches, rank.bits) == (0, 50, 2, 50 * 164_160)
    assert (rank.init_s, rank.join_s, rank.load_s) == (0.5, 0.1, 0.2)
    assert (rank.inference_s, rank.collective_s, rank.read_s) == (1.0, 0.05, 0.01)
    assert (rank.wall_s, rank.cpu_s) == (1.35, 2.0)
    assert (rank.rows_per_s, rank.bits_per_s) == (50.0, 50 * 164_160)
    assert (rank.peak_memory_mb, rank.memory_limit_mb) == (300.0, 1000.0)
    assert rank.data == ("/d/demo-small-test-0-7e10ddce.pt",)


@pytest.mark.parametrize("file", ["combined_data.json", "summary.json", "run.json", "."])
def test_any_file_of_a_run_stands_for_it(tmp_path: Path, file: str) -> None:
    folder = our_run(tmp_path / "r", [our_record(n) for n in range(2)])
    results = read([str(folder / file)])
    assert [run.name for run in results.runs] == ["r"]
    assert len(results.runs[0].ranks) == 2


def test_records_of_before_there_was_a_run_json(tmp_path: Path) -> None:
    folder = our_run(tmp_path / "r", [our_record(n) for n in range(2)])
    (folder / "run.json").unlink()
    (run,) = read([str(folder)]).runs
    assert (run.total_s, run.status, run.inference_s) == (None, "ok", 1.0)


def test_a_rank_that_left_no_record_is_missing(tmp_path: Path) -> None:
    folder = our_run(tmp_path / "r", [our_record(n, 4) for n in (0, 2)])
    results = read([str(folder)])
    assert results.runs[0].status == "incomplete"
    assert "rank 1, 3 (of 4)" in of_kind(results, "ranks missing").text


def test_a_rank_that_is_there_twice(tmp_path: Path) -> None:
    records = [our_record(0), our_record(1), our_record(1, seconds=1.5)]
    put(tmp_path / "combined_data.json", records)
    put(tmp_path / "summary.json", {"rows": 100, "world_size": 2, "inference_seconds": 1.5})
    results = read([str(tmp_path)])
    assert kinds(results) == ["conflict", "duplicate ranks"]
    assert "Rank 1 has more" in of_kind(results, "duplicate ranks").text


def test_outliers_of_ours_are_named_and_kept(tmp_path: Path) -> None:
    ranks = [our_record(n, 5, 9.0 if n == 3 else 1 + n / 100) for n in range(5)]
    results = read([str(our_run(tmp_path / "r", ranks))])
    text = of_kind(results, "outliers").text
    assert "1 of 5 ranks" in text
    assert "rank 3 9.00 s" in text
    assert results.runs[0].inference_s == 9.0
    assert "original" not in text


def test_rows_that_no_metric_counts_are_named(tmp_path: Path) -> None:
    ranks = [our_record(0, rows_excluded=2), our_record(1, rows_excluded=1)]
    text = of_kind(read([str(our_run(tmp_path / "r", ranks))]), "rows excluded").text
    assert text.startswith("3 of 100 rows")


def test_a_run_that_failed(tmp_path: Path) -> None:
    put(tmp_path / "0.json", our_record(0, 3))
    for rank, own in ((0, False), (1, True)):
        word = {"rank": rank, "epoch": 0, "type": "Boom" if own else "Aborted", "message": "why"}
        put(tmp_path / "failed" / "0" / f"{rank}.json", {**word, "blamed": None if own else 1})
    (run,) = read([str(tmp_path)]).runs
    assert (run.status, run.error) == ("failed", "rank 1: Boom: why")
    assert (run.world_size, len(run.ranks)) == (3, 1)


def test_a_run_that_went_well_at_a_later_attempt(tmp_path: Path) -> None:
    folder = our_run(tmp_path / "r", [our_record(0, 1)])
    put(folder / "failed" / "0" / "0.json", {"rank": 0, "type": "Boom", "blamed": None})
    (run,) = read([str(folder)]).runs
    assert (run.status, run.error) == ("ok", None)


def test_a_run_that_came_to_no_end(tmp_path: Path) -> None:
    put(tmp_path / "0.json", our_record(0, 1))
    (run,) = read([str(tmp_path)]).runs
    assert run.status == "incomplete"


def test_a_summary_alone(tmp_path: Path) -> None:
    content = {"run": "r", "rows": 7, "world_size": 2, "inference_seconds": 2.0, "data": "mine"}
    results = read([str(put(tmp_path / "r-summary.json", content))])
    (run,) = results.runs
    assert (run.rows, run.world_size, run.inference_s, run.data) == (7, 2, 2.0, "mine")
    assert kinds(results) == ["records missing"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/x/data/demo-large-test-0-7e10ddce.pt", "large"),
        ("s3://b/mine/", "mine"),
        ("mine/a.pt", "a.pt"),
        ("small", "small"),
        (None, "unknown"),
    ],
)
def test_short_names_of_data(place: str | None, name: str) -> None:
    assert short_data(place) == name


# -- one process ----------------------------------------------------------------------------------


def test_a_report_of_infer(tmp_path: Path) -> None:
    results = read([str(put(tmp_path / "out.json", _report(32)))])
    (run,) = results.runs
    assert (run.source, run.data, run.world_size, run.batch_size) == (
        "cosmic infer",
        "small",
        1,
        32,
    )
    assert (run.rows, run.bits, run.inference_s, run.total_s) == (100, 16_416_000, 2.0, None)
    assert run.metrics["r2"] == 0.9
    assert run.environment["threads"] == 2
    found = row(run)
    assert (found["load_s"], found["rank_cpu_p50_s"], found["peak_memory_mb"]) == (0.5, 3.5, 310.5)
    assert found["rows_per_s_wall_clock"] == found["rows_per_s_sum_of_ranks"] == 50.0
    assert kinds(results) == ["rows excluded"]


# -- a sweep --------------------------------------------------------------------------------------


def test_a_sweeps_folder(tmp_path: Path) -> None:
    results = read([str(_sweep(tmp_path / "s"))])
    assert [(run.name, run.status) for run in results.runs] == [
        ("w1-b32-small-r1", "ok"),
        ("w2-b32-small-r1", "ok"),
        ("w2-b64-small-r1", "failed"),
    ]
    assert results.runs[2].error == "rank 1: Boom: no memory"
    assert [len(run.ranks) for run in results.runs] == [1, 2, 0]
    assert "3 of 4 runs are done" in of_kind(results, "runs missing").text
    assert of_kind(results, "runs failed").text.startswith("1 of 3 runs failed")
    assert kinds(results) == ["runs failed", "runs missing"]


def test_a_sweep_makes_speedups(tmp_path: Path) -> None:
    found = summarise(read([str(_sweep(tmp_path / "s"))]).runs)
    assert [(c.world_size, c.batch_size, c.ok, c.failed) for c in found] == [
        (1, 32, 1, 0),
        (2, 32, 1, 0),
        (2, 64, 0, 1),
    ]
    assert found[1].speedup == 2.0


def test_a_sweep_that_has_moved_reads_the_folders_beside_its_records(tmp_path: Path) -> None:
    _sweep(tmp_path / "s")
    shutil.move(tmp_path / "s", tmp_path / "t")
    results = read([str(tmp_path / "t")])
    assert all(run.place.startswith(str(tmp_path / "t")) for run in results.runs)


def test_a_run_whose_files_are_gone_is_named(tmp_path: Path) -> None:
    folder = _sweep(tmp_path / "s")
    shutil.rmtree(folder / "runs" / "w1-b32-small-r1")
    results = read([str(folder)])
    run = next(run for run in results.runs if run.name == "w1-b32-small-r1")
    assert (run.status, run.total_s, run.ranks) == ("ok", 9.0, ())
    assert "own files are not here" in of_kind(results, "records missing").text


def test_the_sweeps_environment_is_that_of_runs_that_tell_none(tmp_path: Path) -> None:
    folder = _sweep(tmp_path / "s")
    (folder / "runs" / "w1-b32-small-r1" / "run.json").unlink()
    environments = [run.environment for run in read([str(folder)]).runs]
    assert environments == [{"cores": 2}, {"cpu": "EPYC"}, {"cores": 2}]


def test_links_within_a_sweep_are_not_followed(tmp_path: Path) -> None:
    folder = _sweep(tmp_path / "s")
    outside = our_run(tmp_path / "outside", [our_record(0, 1, 77.0)])
    run = folder / "runs" / "w1-b32-small-r1"
    (run / "combined_data.json").unlink()
    (run / "combined_data.json").symlink_to(outside / "combined_data.json")
    shutil.rmtree(folder / "runs" / "w2-b32-small-r1")
    (folder / "runs" / "w2-b32-small-r1").symlink_to(outside)
    runs = read([str(folder)]).runs
    assert [len(run.ranks) for run in runs] == [1, 0, 0]  # the first run's own 0.json
    assert all(rank.inference_s == 4.0 for run in runs for rank in run.ranks)


def test_what_a_report_has_written_is_no_result(tmp_path: Path) -> None:
    for name in ("results.csv", "configurations.csv"):
        put(tmp_path / "report" / name, ",".join(COLUMNS) + "\n" + "," * len(COLUMNS) + "\n")
    assert read([str(tmp_path)]) == Results((), ())


def test_a_sweep_of_one_process(tmp_path: Path) -> None:
    plan = {"batch_sizes": [1, 2], "data_sizes": ["small"], "world_sizes": [1], "repeat": 1}
    put(tmp_path / "sweep.json", {"format": 1, "kind": "infer", "plan": plan, "environment": {}})
    for size in (1, 2):
        attempt = _attempt(1, size, report={**_report(size, 2.0 + size), "rows_excluded": 0})
        put(tmp_path / "runs" / f"w1-b{size}-small-r1.json", attempt)
    results = read([str(tmp_path)])
    assert results.findings == ()
    assert [(r.source, r.name, r.batch_size, r.total_s) for r in results.runs] == [
        ("cosmic infer", "w1-b1-small-r1", 1, 9.0),
        ("cosmic infer", "w1-b2-small-r1", 2, 9.0),
    ]


# -- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [["."], [".", "."], [".", "s"], ["s/runs/w1-b32-small-r1", "s"]])
def test_overlapping_paths_are_read_once(tmp_path: Path, paths: list[str]) -> None:
    _sweep(tmp_path / "s")
    results = read([str(tmp_path / path) for path in paths])
    assert len(results.runs) == 3
    assert kinds(results).count("given twice") == len(paths) - 1


def test_a_link_to_the_same_is_read_once(tmp_path: Path) -> None:
    _sweep(tmp_path / "s")
    (tmp_path / "t").symlink_to(tmp_path / "s")
    results = read([str(tmp_path / "s"), str(tmp_path / "t")])
    assert len(results.runs) == 3
    assert "given twice" in kinds(results)


def test_a_copy_of_a_run_is_read_once(tmp_path: Path) -> None:
    folder = our_run(tmp_path / "a", [our_record(n) for n in range(2)])
    shutil.copytree(folder, tmp_path / "b")
    results = read([str(tmp_path)])
    assert len(results.runs) == 1
    assert "given twice" in kinds(results)


def test_links_out_of_the_tree_are_not_followed(tmp_path: Path) -> None:
    our_run(tmp_path / "outside", [our_record(0, 1)])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "combined_data.json").symlink_to(tmp_path / "outside" / "combined_data.json")
    (tmp_path / "in" / "loop.json").symlink_to("loop.json")
    os.mkfifo(tmp_path / "in" / "pipe.json")
    results = read([str(tmp_path / "in")])
    assert results.runs == ()
    assert kinds(results) == ["not read"] * 3


def test_folders_too_deep_are_named(tmp_path: Path) -> None:
    our_run(tmp_path.joinpath(*["d"] * 25), [our_record(0, 1)])
    results = read([str(tmp_path)])
    assert results.runs == ()
    assert "deeper than 20" in of_kind(results, "not read").text


def test_files_beyond_the_limit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflow.results_files.MOST_FILES", 2)
    for n in range(4):
        put(tmp_path / f"{n}" / "combined_data.json", [our_record(0, 1, 1.0 + n)])
    results = read([str(tmp_path)])
    assert len(results.runs) == 2
    assert "2 files" in of_kind(results, "not read").text


@pytest.mark.parametrize("path", ["nowhere", "s3://bucket/results", "ftp://x/y", "", "a\0b"])
def test_paths_that_cannot_be_read(path: str) -> None:
    with pytest.raises(ResultsError):
        read([path])


def test_no_paths_are_no_results() -> None:
    assert read([]) == Results((), ())


def test_a_file_of_no_known_form_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.json", {"something": "else"})
    put(tmp_path / "b.csv", "x,y\n1,2\n")
    put(tmp_path / "c.txt", "a text")
    text = of_kind(read([str(tmp_path)]), "not read").text
    assert text.startswith("Left out, as they have no form that is known: 2 (")
    assert "a.json, " in text
    assert kinds(read([str(tmp_path / "c.txt")])) == ["not read"]


def test_a_thousand_runs_take_seconds(tmp_path: Path) -> None:
    ranks = [our_record(n, 4) for n in range(4)]
    for n in range(1000):
        put(
            tmp_path / f"r{n}" / "combined_data.json",
            [{**r, "join_time (seconds)": n} for r in ranks],
        )
    began = time.perf_counter()
    results = read([str(tmp_path)])
    assert len(results.runs) == 1000
    assert time.perf_counter() - began < 20  # 2 s on a machine of its own
