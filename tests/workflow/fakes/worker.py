"""Stands in for `python -m lambda_worker`: the same lines on stdout, and failures on demand.

The event's `data` says what happens where: fake://{"infer 2": "kill"}. A rank leaves
`<rank>.pid` in the results folder when it starts, and `<rank>.seen` when it has noticed a failure.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = {"MAE": 0.01, "MSE": 0.0002, "bias": -0.001, "NMAD": 0.0131, "R2": 0.92}
KEYS = {"mae": 0.01, "mse": 0.0002, "bias": -0.001, "nmad": 0.0131, "r2": 0.92}


def say(kind: str, content: object) -> None:
    print(json.dumps({kind: content}), flush=True)


def fail(kind: str, text: str) -> None:
    say("error", {"type": kind, "message": text, "rank": None})
    sys.exit(1)


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            sys.exit("the fake worker waited in vain")
        time.sleep(0.005)


def leave(path: Path, text: str) -> None:
    """Write a file that tests may look at, whole at once."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(text)
    partial.replace(path)


def wanted(data: str) -> dict:
    return json.loads(data.removeprefix("fake://")) if data.startswith("fake://") else {}


def init(event: dict) -> dict:
    size = event["world_size"]
    folder = str(Path(event["results"], event.get("run", "fake-run")).absolute())
    os.makedirs(folder, exist_ok=True)
    plan = {"run": "fake-run", "world_size": size, "rows": 10 * size, "results": folder}
    task = {"shard": [["a.pt", 0, 10]], "do": wanted(event["data"])}
    ranks = [{"rank": rank, **task, **plan} for rank in range(size)]
    leave(Path(folder, "init.json"), json.dumps(event))
    return plan | {"ranks": ranks, "do": task["do"]}


def infer(task: dict) -> dict:
    folder, rank = Path(task["results"]), task["rank"]
    leave(Path(folder, f"{rank}.pid"), str(os.getpid()))
    secrets = {
        k: v for k, v in os.environ.items() if k.startswith(("FMI_", "OMP_", "MALLOC_", "LOCAL_"))
    }
    Path(tempfile.mkdtemp(), "scratch").touch()  # whoever is killed cannot clean up
    say("progress", {"rank": rank, "stage": "join", "rows": 0, "of": 0})
    say("progress", {"rank": rank, "stage": "infer", "rows": 10, "of": 10})
    act(task["do"].get(f"infer {rank}", ""), folder, rank, task["world_size"])
    record = {
        "rank": rank,
        "rows": 10,
        "num_batches": 1,
        "batch_size": 128,
        "calibration": None,
        "inference_time (seconds)": 0.5,
        "total_cpu_time (seconds)": time.process_time(),  # no two records are the same
        "sample_persec": 20.0,
        "peak_memory (MB)": 300.0,
        "spans": [["infer", 1.8e9, 0.5]],
        **NAMES,
        "environment": secrets,
    }
    leave(Path(folder, f"{rank}.json"), json.dumps(record))
    return record


def act(what: str, folder: Path, rank: int, size: int) -> None:
    others = [other for other in range(size) if other != rank]
    match what:
        case "error":
            fail("DatasetError", "bad.pt: truncated")
        case "error, last":
            wait_for(*(Path(folder, f"{other}.seen") for other in others))
            fail("DatasetError", "bad.pt: truncated")
        case "notice":
            Path(folder, f"{rank}.seen").touch()
            fail("RankFailed", "rank 2 is gone")
        case "kill":
            wait_for(*(Path(folder, f"{other}.pid") for other in others))
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            signal.pause()
        case "hang for good":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen(["sleep", "600"])
            leave(Path(folder, f"{rank}.pid"), f"{os.getpid()} {child.pid}")
            while True:
                signal.pause()
        case "talk":
            print("Loading the model...", flush=True)
        case "odd progress":
            say("progress", {"percent": 3})
        case "shout":
            print("x" * (17 << 20), flush=True)
        case "crash":
            sys.exit("Traceback: no module named torch")
        case "leave":
            sys.exit(0)


def summarize(task: dict) -> dict:
    act(task["do"].get("summarize", ""), Path(task["results"]), 0, 1)
    folder, size, rows = Path(task["results"]), task["world_size"], task["rows"]
    records = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    leave(Path(folder, "combined_data.json"), json.dumps(records))
    names = {"combined_data": "combined_data.json", "summary_path": "summary.json"}
    urls = {key: str(folder / name) for key, name in names.items()}
    summary = {
        "rows": rows,
        "rows_excluded": 0 if "plot" in task["do"] else rows,  # nothing to plot
        "excluded_rows": [],
        "batches": size,
        "world_size": size,
        "inference_seconds": 0.5,
        "rows_per_second": {"wall_clock": 80.0, "end_to_end": 8.0, "sum_of_ranks": 85.0},
        "engine": "torch",
        "precision_max_dz": None,
        "peak_memory_mb": 300.0,
        "metrics": KEYS,
    }
    return urls | {"predictions": "none.npz", "summary": summary, "records": records}


if __name__ == "__main__":
    step = {"init": init, "infer": infer, "summarize": summarize}[sys.argv[1]]
    say("result", step(json.load(sys.stdin)))
