"""One process of `inference.py`: ``python -m benchmarks.loops LOOP THREADS FOLDER``.

Reads commands from stdin, a line each, and answers each with a line of JSON on stdout:
``rate BATCH ROWS``, ``memory BATCH``, ``values``; the first line it writes is its first prediction
of the 64 rows in FOLDER. LOOP is "reference", "profiled", "sgemm", or an engine and a precision
("torch-bf16"). Only what a loop needs is imported, for its cold start is measured, too.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS_FILE, MODEL_FILE, PLAIN_FILE = "rows.pt", "model.safetensors", "plain.pt"
FIRST_ROWS = 64
IMAGE_GFLOP = 0.2215  # multiplications and additions for one image in the plain model's layers
SGEMM_SIZE = 2048

Loop = Callable[[int, int], Any]
"""Predicts so many rows in batches of a size; returns z_phot."""


def reference(threads: int, folder: Path, profiled: bool = False) -> tuple[Loop, float]:
    """The loop as the reference has it, written from its description: plain model, DataLoader."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.data import DataLoader, TensorDataset

    imported = private_mb()
    torch.set_num_threads(threads)
    model = torch.load(folder / PLAIN_FILE, weights_only=False).eval()
    data = torch.load(folder / ROWS_FILE, weights_only=False)

    def plain(batch: int, rows: int) -> Any:
        again = -(-rows // len(data))
        tensors = [tensor.repeat(again, *[1] * (tensor.ndim - 1))[:rows] for tensor in data.tensors]
        found = []
        with torch.no_grad():
            for images, magnitudes, _ in DataLoader(TensorDataset(*tensors), batch_size=batch):
                found.append(model(images, magnitudes))
                if profiled:
                    gc.collect()
        return torch.cat(found).numpy()

    def observed(batch: int, rows: int) -> Any:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            found = plain(batch, rows)
        seen.key_averages().total_average()  # its record of the run
        return found

    return observed if profiled else plain, imported


def ours(name: str, threads: int, folder: Path) -> tuple[Loop, float]:
    engine, _, precision = name.partition("-")
    if engine == "torch":
        import lambda_worker.torch_engine  # noqa: F401
    import numpy as np

    from lambda_worker.engine import open_engine
    from lambda_worker.reading import Shard
    from lambda_worker.shard import Piece

    imported = private_mb()
    options: Any = {"engine": engine, "precision": precision, "threads": threads}
    predict = open_engine(folder / MODEL_FILE, **options)
    shard = Shard([Piece(str(folder / ROWS_FILE), 0, FIRST_ROWS)], folder)
    rows = shard.batch(0, FIRST_ROWS)

    def loop(batch: int, count: int) -> Any:
        again = -(-count // FIRST_ROWS)
        images, magnitudes = (
            np.concatenate([array.astype(np.float32, copy=False)] * again)[:count]
            for array in rows[:2]
        )
        starts = range(0, count, batch)
        return np.concatenate(
            [predict(images[n : n + batch], magnitudes[n : n + batch]) for n in starts]
        )

    return loop, imported


def sgemm(threads: int) -> tuple[Loop, float]:
    """As many rows as the operations of large matrix products would do: the bound."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE)
    out = torch.empty_like(left)
    each = 2 * SGEMM_SIZE**3 / 1e9 / IMAGE_GFLOP

    def loop(batch: int, rows: int) -> Any:
        for _ in range(max(1, round(rows / each))):
            torch.mm(left, right, out=out)
        return out[0].numpy()

    return loop, 0.0


def private_mb() -> float:
    """Private memory of this process (unique set size), 10^6 bytes."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Priv")) / 1e3


def largest_mb(work: Callable[[], Any]) -> float:
    """Largest private memory while `work` runs, looked at every 20 ms."""
    seen, done = [private_mb()], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            seen.append(private_mb())

    watcher = threading.Thread(target=look)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(seen)


def main(name: str, threads: int, folder: Path) -> None:
    if name == "sgemm":
        loop, imported = sgemm(threads)
    elif name in ("reference", "profiled"):
        loop, imported = reference(threads, folder, name == "profiled")
    else:
        loop, imported = ours(name, threads, folder)
    loop(FIRST_ROWS, FIRST_ROWS)
    answer({"ready": name})
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "rate":
            batch, rows = map(int, numbers)
            loop(batch, min(batch, rows))  # of another size than before: oneDNN makes its kernels
            start = time.perf_counter()
            loop(batch, rows)
            answer(time.perf_counter() - start)
        elif command == "memory":
            batch = int(numbers[0])
            answer(largest_mb(lambda: loop(batch, 2 * batch)) - imported)  # noqa: B023
        elif command == "values":
            answer([float(z) for z in loop(FIRST_ROWS, FIRST_ROWS)])


def answer(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
