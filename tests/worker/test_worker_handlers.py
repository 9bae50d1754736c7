"""The three handlers together, with and without a job: same numbers, clear errors, no halves."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fmi_client import sync
from fmi_client.errors import Aborted
from lambda_worker import engine, handlers, inference, storage, torch_engine
from lambda_worker.dataset import DatasetError
from lambda_worker.engine import DEMO_MODEL, ModelError, Predict
from lambda_worker.model_file import load_model
from lambda_worker.storage import StorageError
from lambda_worker.summary import SummaryError
from tests.worker.worker_data import RECORD, MakePt, tensors


def alone(plan: dict[str, Any]) -> dict[str, Any]:
    """A run without a rendezvous, one rank after the other."""
    for task in plan["ranks"]:
        handlers.infer(task)
    return handlers.summarize(plan)


def together(plan: dict[str, Any]) -> list[Any]:
    """All ranks as threads of one job: what each of them returned or raised."""
    with ThreadPoolExecutor(plan["world_size"]) as pool:
        futures = [pool.submit(handlers.infer, task) for task in plan["ranks"]]
    return [future.exception() or future.result() for future in futures]


def written(results: Path) -> set[str]:
    """Files of all runs in this folder, by their names in their run's folder."""
    files = (path for run in results.glob("run-*") for path in run.rglob("*") if path.is_file())
    return {path.relative_to(results).as_posix().partition("/")[2] for path in files}


@pytest.fixture
def payload(make_pt: MakePt, tmp_path: Path) -> dict[str, Any]:
    """Two files of 21 and 20 rows."""
    make_pt("data/1.pt", 21, seed=1)
    make_pt("data/2.pt", 20, seed=2)
    return {"data": str(tmp_path / "data"), "results": str(tmp_path / "out"), "world_size": 3}


def direct(rows: list[torch.Tensor]) -> dict[str, float]:
    """Metrics of all rows in one batch, spelled out."""
    with torch.inference_mode():
        z_phot = load_model(DEMO_MODEL)(rows[0], rows[1]).double().numpy()
    z = rows[2].double().numpy()
    dz: NDArray[np.float64] = (z_phot - z) / (1 + z)
    return {
        "mae": float(np.abs(z_phot - z).mean()),
        "mse": float(((z_phot - z) ** 2).mean()),
        "bias": float(dz.mean()),
        "nmad": float(1.48 * np.median(np.abs(dz - np.median(dz)))),
        "r2": float(1 - ((z_phot - z) ** 2).sum() / ((z - z.mean()) ** 2).sum()),
    }


@pytest.fixture
def expected(payload: dict[str, Any]) -> dict[str, float]:
    pairs = zip(tensors(21, seed=1), tensors(20, seed=2), strict=True)
    return direct([torch.cat(pair) for pair in pairs])


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 64), (2, 7), (5, 1), (45, 16)])
def test_metrics_do_not_depend_on_ranks_or_batches(
    payload: dict[str, Any], expected: dict[str, float], world_size: int, batch_size: int
) -> None:
    plan = handlers.init({**payload, "world_size": world_size, "batch_size": batch_size})
    summary = alone(plan)["summary"]
    assert summary["rows"] == plan["rows"] == 41
    assert summary["metrics"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_job_gives_the_same_numbers(
    payload: dict[str, Any], expected: dict[str, float], rendezvous: str, world_size: int
) -> None:
    event = {**payload, "rendezvous_endpoint": rendezvous, "world_size": world_size}
    plan = handlers.init(event)
    records = together(plan)
    result = handlers.summarize(plan)
    assert result["summary"]["metrics"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert result["records"] == records == json.loads(storage.read(result["combined_data"]))
    merged = json.loads(storage.read(f"{plan['results']}/merged.json"))
    assert merged["metrics"] == result["summary"]["metrics"]
    with np.load(result["predictions"]) as table:
        assert table["row"].tolist() == [*range(21), *range(20)]
    assert result["summary"]["links"]["relay"] == 0
    assert all(record["links"]["direct"] >= (world_size > 1) for record in records)


def test_how_a_rank_joins(payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def connect(*server: str, **options: Any) -> None:
        raise Seen(*server, options)

    monkeypatch.setattr(sync, "connect", connect)
    event = {**payload, "rendezvous_endpoint": "host:1", "run": "r1", "epoch": "2", "timeout": 7}
    with pytest.raises(Seen) as caught:
        handlers.infer(handlers.init(event)["ranks"][1])
    job = {"job": "r1", "rank": 1, "size": 3, "epoch": 2, "timeout": 7.0}
    assert caught.value.args == ("host:1", job)


def test_ranks_meet_at_a_barrier_before_they_start(
    payload: dict[str, Any], rendezvous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []  # across ranks: no inference before the last one is at the barrier
    barrier, run = sync.Communicator.barrier, inference.run
    monkeypatch.setattr(
        sync.Communicator, "barrier", lambda comm: (steps.append("barrier"), barrier(comm))
    )
    monkeypatch.setattr(inference, "run", lambda *args: (steps.append("infer"), run(*args))[1])
    together(handlers.init({**payload, "rendezvous_endpoint": rendezvous}))
    assert steps == ["barrier"] * 3 + ["infer"] * 3


def test_ranks_without_rows_take_part(make_pt: MakePt, tmp_path: Path, rendezvous: str) -> None:
    data = str(make_pt("a.pt", 2))
    event = {"data": data, "results": str(tmp_path), "rendezvous_endpoint": rendezvous}
    plan = handlers.init({**event, "world_size": 5})
    assert [record["rows"] for record in together(plan)] == [0, 0, 1, 0, 1]
    assert handlers.summarize(plan)["summary"]["metrics"] == pytest.approx(
        direct(tensors(2)), rel=1e-6, abs=1e-6
    )


def test_what_a_run_leaves(payload: dict[str, Any], tmp_path: Path) -> None:
    plan = handlers.init({**payload, "run": "r1", "batch_size": 8})
    result = alone(plan)
    folder = tmp_path / "out" / "r1"
    assert plan["results"] == str(folder)
    assert {path.name for path in folder.iterdir()} == {
        *(f"{rank}.{ending}" for rank in range(3) for ending in ("json", "npz")),
        "combined_data.json",
        "predictions.npz",
        "summary.json",
    }
    records = json.loads((folder / "combined_data.json").read_text())
    assert [record["rank"] for record in records] == [0, 1, 2]
    assert [record["rows"] for record in records] == [13, 14, 14]
    assert all(set(record) >= RECORD for record in records)
    assert records[0]["data_path"] == str(tmp_path / "data" / "1.pt")
    assert records[1]["data_path"] == [str(tmp_path / "data" / name) for name in ("1.pt", "2.pt")]
    assert records[1]["num_batches"] == 2
    sizes = [path.stat().st_size for path in sorted((tmp_path / "data").iterdir())]
    assert sum(sizes) < sum(record["bytes_read"] for record in records) < sum(sizes) + 4 * 9000
    assert records[1]["bits"] == 14 * 32 * (5 * 32 * 32 + 5)
    assert json.loads((folder / "summary.json").read_text()) == result["summary"]


def test_predictions_carry_their_rows(payload: dict[str, Any]) -> None:
    result = alone(handlers.init(payload))
    with np.load(result["predictions"]) as table:
        assert table["z_phot"].dtype == table["z_spec"].dtype == np.float32
        names = [Path(name).name for name in table["files"][table["file_index"]]]
        assert names == ["1.pt"] * 21 + ["2.pt"] * 20
        assert table["row"].tolist() == [*range(21), *range(20)]
        assert np.array_equal(table["z_spec"][:21], tensors(21, seed=1)[2].numpy())


def test_summary_tells_the_rates_apart(payload: dict[str, Any]) -> None:
    result = alone(handlers.init(payload))
    summary, records = result["summary"], result["records"]
    rate = summary["rows_per_second"]
    slowest = max(record["inference_time (seconds)"] for record in records)
    assert rate["wall_clock"] == pytest.approx(41 / slowest)
    assert rate["sum_of_ranks"] == pytest.approx(sum(r["sample_persec"] for r in records))
    assert rate["end_to_end"] < rate["wall_clock"] <= rate["sum_of_ranks"]
    bits = summary["bits_per_second"]["wall_clock"]
    assert bits == pytest.approx(rate["wall_clock"] * 32 * 5 * 1025)
    assert summary["peak_memory_mb"] > 50


def test_files_of_other_runs_are_not_swept_up(payload: dict[str, Any], tmp_path: Path) -> None:
    plan = handlers.init({**payload, "run": "r1", "world_size": 2})
    folder = tmp_path / "out" / "r1"
    for stranger in (
        folder / "2.json",
        folder / "old" / "0.json",
        folder.parent / "r10" / "1.json",
    ):
        stranger.parent.mkdir(parents=True, exist_ok=True)
        stranger.write_text('{"rows": 1000000}')
    assert alone(plan)["summary"]["rows"] == 41


def test_a_run_may_be_repeated_under_its_name(payload: dict[str, Any]) -> None:
    first = alone(handlers.init({**payload, "run": "r1"}))
    second = alone(handlers.init({**payload, "run": "r1", "world_size": 2}))
    assert second["summary"]["metrics"] == pytest.approx(first["summary"]["metrics"], abs=1e-6)
    assert len(second["records"]) == 2


def test_older_files_of_the_same_name_do_not_hide_a_missing_rank(payload: dict[str, Any]) -> None:
    alone(handlers.init({**payload, "run": "r1"}))
    plan = handlers.init({**payload, "run": "r1"})
    handlers.infer(plan["ranks"][1])
    with pytest.raises(SummaryError, match=r"files of rank 0, 2 in .* are of an earlier run"):
        handlers.summarize(plan)


def test_missing_ranks_are_named(payload: dict[str, Any], tmp_path: Path) -> None:
    plan = handlers.init({**payload, "run": "r1"})
    handlers.infer(plan["ranks"][1])
    with pytest.raises(SummaryError, match=r"no record of rank 0, 2 \(of 3\) in .*out/r1"):
        handlers.summarize(plan)
    assert {path.name for path in (tmp_path / "out" / "r1").iterdir()} == {"1.json", "1.npz"}


def test_job_without_merged_file(payload: dict[str, Any]) -> None:
    plan = handlers.init({**payload, "run": "r1"})
    alone(plan)
    with pytest.raises(SummaryError, match=r"no merged\.json"):
        handlers.summarize({**plan, "fmi_enabled": True})


def test_rank_that_fails_stops_the_others_and_nothing_is_written(
    payload: dict[str, Any], tmp_path: Path, rendezvous: str
) -> None:
    plan = handlers.init({**payload, "rendezvous_endpoint": rendezvous, "timeout": 30})
    whole = (tmp_path / "data" / "2.pt").read_bytes()
    (tmp_path / "data" / "2.pt").write_bytes(whole[:-1000])  # after init looked at it
    for task in plan["ranks"][:2]:  # only the last rank notices
        task["shard"] = plan["ranks"][0]["shard"]
    outcome = together(plan)
    assert isinstance(outcome[2], DatasetError)
    for other in outcome[:2]:
        assert isinstance(other, Aborted)
        assert other.by == 2
        assert "2.pt: truncated or damaged" in other.reason
    assert written(tmp_path / "out") == {f"failed/0/{rank}.json" for rank in range(3)}


def test_missing_model(payload: dict[str, Any], tmp_path: Path) -> None:
    plan = handlers.init({**payload, "model": str(tmp_path / "none.safetensors")})
    with pytest.raises(ModelError, match=r"none\.safetensors"):
        handlers.infer(plan["ranks"][0])
    assert written(tmp_path / "out") == {"failed/0/0.json"}


@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_that_are_not_finite_are_named_and_do_not_count(
    tmp_path: Path, world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tensors(12)
    rows[0][1, 2, 3, 4] = torch.nan
    rows[1][4, 0] = torch.inf
    rows[2][7] = torch.nan
    rows[2][8] = -1.0
    torch.save(TensorDataset(*rows), tmp_path / "a.pt")
    event = {"data": str(tmp_path / "a.pt"), "results": str(tmp_path), "world_size": world_size}
    with pytest.raises(DatasetError, match=r"rows cannot be used.*a\.pt row 1 \(images\)"):
        alone(handlers.init({**event, "strict": True}))
    assert written(tmp_path) == {"failed/0/0.json"}
    plan = handlers.init(event)
    with caplog.at_level(logging.WARNING):
        result = alone(plan)
    kept = [0, 2, 3, 5, 6, 9, 10, 11]
    assert result["summary"]["rows"] == 12
    assert result["summary"]["rows_excluded"] == 4
    wanted = direct([column[kept] for column in rows])
    assert result["summary"]["metrics"] == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    flaws = {1: "images", 4: "magnitudes", 7: "redshift", 8: "redshift"}
    for row, part in flaws.items():
        assert f"a.pt row {row} ({part})" in caplog.text
    named = [{"file": event["data"], "row": row, "part": part} for row, part in flaws.items()]
    assert result["summary"]["excluded_rows"] == named
    assert [row for record in result["records"] for row in record["excluded_rows"]] == named
    with np.load(result["predictions"]) as table:
        assert np.flatnonzero(np.isnan(table["z_phot"])).tolist() == [1, 4, 7, 8]


def test_dataset_without_rows(make_pt: MakePt, tmp_path: Path) -> None:
    plan = handlers.init(
        {"data": str(make_pt("a.pt", 0)), "results": str(tmp_path), "world_size": 2}
    )
    summary = alone(plan)["summary"]
    assert summary["rows"] == 0
    assert set(summary["metrics"].values()) == {None}


def test_one_rank_per_file_without_a_world_size(make_pt: MakePt, tmp_path: Path) -> None:
    for number in (1, 2, 10):
        make_pt(f"data/{number}.pt", number)
    event = {"data": str(tmp_path / "data"), "file_limit": "2"}
    plan = handlers.init(event)
    shards = [[(Path(file).name, a, b) for file, a, b in t["shard"]] for t in plan["ranks"]]
    assert shards == [[("1.pt", 0, 1)], [("2.pt", 0, 2)]]


def test_data_map_with_files_and_null(make_pt: MakePt, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        make_pt(f"data/{number}.pt", number)
    plan = handlers.init(
        {"data": str(tmp_path / "data"), "data_map": {"0": "3.pt", "1": None, "2": []}}
    )
    shards = [[(Path(file).name, a, b) for file, a, b in t["shard"]] for t in plan["ranks"]]
    assert shards == [[("3.pt", 0, 3)], [("1.pt", 0, 1), ("2.pt", 0, 2)], []]


@pytest.mark.parametrize("name", ["small/1.pt", "small.pt"])
def test_dataset_by_size(make_pt: MakePt, tmp_path: Path, name: str) -> None:
    make_pt(f"data/{name}", 3)
    make_pt("data/large/1.pt", 5)
    plan = handlers.init({"data": str(tmp_path / "data"), "data_size": "small"})
    assert plan["rows"] == 3


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({}, r"data: no \.pt file there, only folders: small/$"),
        ({"data_size": "large"}, r"data/large: no \.pt file there: check the name$"),
        ({"data_map": {"0": "gone.pt"}}, r"data/gone\.pt: no such file"),
    ],
)
def test_no_data(make_pt: MakePt, tmp_path: Path, event: dict[str, Any], message: str) -> None:
    make_pt("data/small/1.pt", 3)
    with pytest.raises(DatasetError, match=message):
        handlers.init({"data": str(tmp_path / "data"), **event})


def test_data_that_are_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(DatasetError, match=r"a\.csv: expected a \.pt file, or a folder of them"):
        handlers.init({"data": str(tmp_path / "a.csv")})


def test_a_size_is_found_as_the_demo_data_are_named(make_pt: MakePt, tmp_path: Path) -> None:
    make_pt("data/demo-small-test-0-abc.pt", 3)
    make_pt("data/demo-medium-test-0-abc.pt", 4)
    assert handlers.init({"data": str(tmp_path / "data"), "data_size": "small"})["rows"] == 3
    make_pt("mine/1.pt", 5)
    assert handlers.init({"data": str(tmp_path / "mine"), "data_size": "medium"})["rows"] == 5


def test_results_that_cannot_be_written_are_refused_before_the_work(
    payload: dict[str, Any],
) -> None:
    file = Path(payload["data"])
    file = file if file.is_file() else next(file.glob("*.pt"))
    with pytest.raises(StorageError, match="is not a folder"):
        handlers.init({**payload, "results": str(file / "results")})


def test_a_smaller_run_of_the_same_name_leaves_nothing_of_the_larger_one(
    payload: dict[str, Any],
) -> None:
    first = alone(handlers.init({**payload, "world_size": 3, "run": "again"}))
    folder = Path(first["combined_data"]).parent
    for name in ("redshift.png", "run.json"):  # as the launcher of the first one leaves them
        (folder / name).touch()
    alone(handlers.init({**payload, "world_size": 2, "run": "again"}))
    assert {path.name for path in folder.iterdir()} == {
        *("0.json", "1.json", "0.npz", "1.npz"),
        *("combined_data.json", "summary.json", "predictions.npz"),
    }


def test_rank_item_of_the_reference_reads_whole_files(payload: dict[str, Any]) -> None:
    item = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "BATCH_SIZE": 16,
        "DATA_PATH": [f"{payload['data']}/1.pt", f"{payload['data']}/2.pt"],
        "results": payload["results"],
    }
    record = handlers.infer(item)
    assert record["rows"] == 41
    assert record == json.loads(Path(payload["results"], "1.json").read_text())


def test_threads_of_a_rank(payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = handlers.init({**payload, "world_size": 1, "threads": "2"})
    asked: list[int] = []

    def open_torch(model: Path, precision: str, threads: int) -> Predict:
        asked.append(threads)
        return lambda images, magnitudes: magnitudes[:, 0]

    monkeypatch.setattr(torch_engine, "open_torch", open_torch)
    handlers.infer(plan["ranks"][0])
    assert asked == [2]


def test_a_lower_precision_is_judged_on_the_runs_own_rows(
    payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_torch(model: Path, precision: str, threads: int) -> Predict:
        off = 0.25 if precision == "bf16" else 0
        return lambda images, magnitudes: magnitudes[:, 0] + off

    monkeypatch.setattr(engine, "has_bf16", lambda: True)
    monkeypatch.setattr(torch_engine, "open_torch", open_torch)
    result = alone(handlers.init({**payload, "precision": "bf16"}))
    for told in (result["summary"], result["records"][0]):
        assert (told["engine"], told["precision"]) == ("torch", "bf16")
        assert told["precision_max_dz"] == 0.25
    assert result["summary"]["precision_rows"] == 41
    plain = alone(handlers.init(payload))["summary"]
    assert (plain["precision"], plain["precision_max_dz"]) == ("fp32", None)


def test_bf16_on_a_processor_without_it(
    payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "has_bf16", lambda: False)
    plan = handlers.init({**payload, "precision": "bf16"})
    with pytest.raises(engine.EngineError, match="bf16"):
        handlers.infer(plan["ranks"][0])


def test_progress_names_the_stages(payload: dict[str, Any]) -> None:
    plan = handlers.init({**payload, "world_size": 1, "batch_size": 20})
    seen: list[tuple[str, int, int]] = []
    handlers.infer(plan["ranks"][0], None, lambda *step: seen.append(step))
    batches = [("infer", 20, 41), ("infer", 40, 41), ("infer", 41, 41)]
    assert seen == [
        *(("join", 0, 0), ("load", 0, 0), ("load", 0, 41)),
        *batches,
        *(("gather", 41, 41), ("done", 41, 41)),
    ]


def test_run_on_s3(bucket: Path, make_pt: MakePt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo input's form, its bucket on a real S3 server."""
    rows = {"1.pt": 5, "2.pt": 6, "10.pt": 7}
    for name, count in rows.items():
        path = make_pt(name, count)
        storage.write(f"s3://bucket/100MB/{name}", path.read_bytes())
    storage.write("s3://bucket/models/m.safetensors", DEMO_MODEL.read_bytes())
    event = {"bucket": "bucket", "file_limit": "2", "data_prefix": "100MB", "result_path": "out/1"}
    plan = handlers.init({**event, "run": "r1", "model": "s3://bucket/models/m.safetensors"})
    assert plan["results"] == "s3://bucket/out/1/r1"
    result = alone(plan)
    assert [record["data_path"] for record in result["records"]] == [
        "s3://bucket/100MB/1.pt",
        "s3://bucket/100MB/2.pt",
    ]
    assert (bucket / "out/1/r1/combined_data.json").is_file()
    monkeypatch.setattr("lambda_worker.rank._joined", None)  # summarizing again needs no rank
    # Records are megabytes where ranks are thousands; a state machine could not take them.
    file = {"bucket": "bucket", "key": "out/1/r1/ranks.json"}
    again = handlers.summarize({**plan, "ranks_file": file})
    assert again == {key: value for key, value in result.items() if key != "records"}
