"""Files of results, made up for tests: of the original project's forms, and of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow.results import Finding, Results

ORIGINAL = Path(__file__).parent.parent / "fixtures" / "original"
ROW_BITS = 164_160


def original_record(data: str | None = "25MB/1.pt", rows: int = 1278, cpu: float = 5.0) -> Any:
    """A record of the original's first schema."""
    return {
        "total_cpu_time (seconds)": cpu,
        "total_cpu_memory (MB)": 17864.67,
        "execution_time (seconds/batch)": cpu / 3,
        "num_batches": 3,
        "batch_size": 512,
        "device": "cpu",
        "throughput_bps": rows * ROW_BITS / cpu,
        "sample_persec": rows / cpu,
        "result_path": "result-partition-25MB/1GB/1",
        "data_path": data,
    }


def our_record(rank: int, world_size: int = 2, seconds: float = 1.0, **more: Any) -> Any:
    """A rank's record of ours, with the fields that are read."""
    return {
        "total_cpu_time (seconds)": 2 * seconds,
        "num_batches": 2,
        "batch_size": 32,
        "throughput_bps": 50 * ROW_BITS / seconds,
        "sample_persec": 50 / seconds,
        "data_path": "/d/demo-small-test-0-7e10ddce.pt",
        "rank": rank,
        "world_size": world_size,
        "run": "r",
        "rows": 50,
        "rows_excluded": 0,
        "bits": 50 * ROW_BITS,
        "engine": "torch",
        "precision": "fp32",
        "init_time (seconds)": 0.5,
        "join_time (seconds)": 0.1,
        "load_time (seconds)": 0.2,
        "collective_time (seconds)": 0.05,
        "inference_time (seconds)": seconds,
        "read_time (seconds)": 0.01,
        "wall_time (seconds)": seconds + 0.35,
        "peak_memory (MB)": 300.0,
        "memory_limit (MB)": 1000.0,
        "spans": [["join", 100.0, 0.1], ["infer", 100.3, seconds]],
        **more,
    }


def put(path: Path, content: object) -> Path:
    """Write JSON, or a text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def our_run(folder: Path, ranks: Sequence[Any], **main: Any) -> Path:
    """Write the folder of a run, as `cosmic run` leaves it."""
    seconds = max(rank["inference_time (seconds)"] for rank in ranks)
    put(folder / "combined_data.json", list(ranks))
    for rank in ranks:
        put(folder / f"{rank['rank']}.json", rank)
    put(folder / "merged.json", {"init_id": "i", "metrics": {}, "records": list(ranks)})
    put(
        folder / "summary.json",
        {
            "run": folder.name,
            "rows": sum(rank["rows"] for rank in ranks),
            "world_size": ranks[0]["world_size"],
            "batch_size": 32,
            "inference_seconds": seconds,
            "metrics": {"mae": 0.01, "mse": 0.001, "bias": -0.002, "nmad": 0.01, "r2": None},
            "data": "/d/demo-small-test-0-7e10ddce.pt",
        },
    )
    (folder / "predictions.npz").touch()
    told = {"format": 1, "run": folder.name, "on": "local", "seconds": seconds + 4, "spans": []}
    plan = {"data": "/d/demo-small-test-0-7e10ddce.pt", "world_size": ranks[0]["world_size"]}
    put(folder / "run.json", {**told, "environment": {"cpu": "EPYC"}, "plan": plan, **main})
    return folder


def kinds(results: Results) -> list[str]:
    """Return the findings' kinds, sorted, without the one that all of the original's have."""
    return sorted(f.kind for f in results.findings if f.kind != "CPU time")


def of_kind(results: Results, kind: str) -> Finding:
    """Return the one finding of a kind."""
    (found,) = [f for f in results.findings if f.kind == kind]
    return found
