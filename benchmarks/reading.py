"""Ways to read a partition of 100 MB: ``python -m benchmarks.reading [--rounds 5]``.

Prints a Markdown table. Each reading is a process of its own, which has imported what it needs and
then reads all rows once and looks at every number: milliseconds, growth of the peak of resident
memory, bytes fetched. The file is in the page cache; the S3 server is nanio on this machine, so
that what a network costs is not in here.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

ROWS = 5113
BATCH = 128
KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret"}
WAYS = {
    "reference": "whole file into a BytesIO, `torch.load`, as the reference does",
    "torch": "`torch.load` of a path (from S3: downloaded first)",
    "ours": "ours, all rows",
    "quarter": "ours, a quarter of the rows",
}


def main(rounds: Annotated[int, typer.Option(min=1)] = 5) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        bucket = Path(name, "bucket")
        bucket.mkdir()
        make(bucket / "a.pt")
        there, here = multiprocessing.Pipe()
        server = multiprocessing.Process(target=serve, args=(name, there), daemon=True)
        server.start()
        environment = {"AWS_ENDPOINT_URL": here.recv(), "AWS_DEFAULT_REGION": "us-east-1", **KEYS}
        places = {"file": str(bucket / "a.pt"), "S3": "s3://bucket/a.pt"}
        results: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(rounds):
            for place, url in places.items():
                for way in WAYS:
                    results.setdefault((place, way), []).append(run(way, url, environment))
        server.terminate()
        size = (bucket / "a.pt").stat().st_size
    print(f"{size / 1e6:.0f} MB, {ROWS:,} rows; {rounds} rounds, median (lowest … highest).\n")
    print(table(results))


def make(path: Path) -> None:
    """A partition of random rows with the number formats of real ones."""
    import torch
    from torch.utils.data import TensorDataset

    magnitudes, redshift = torch.rand(ROWS, 5).double(), torch.rand(ROWS).double()
    torch.save(TensorDataset(torch.rand(ROWS, 5, 32, 32), magnitudes, redshift), path)


def serve(folder: str, pipe: Any) -> None:
    import uvicorn
    from nanio.app import build_app
    from nanio.auth.credentials import EnvCredentialResolver
    from nanio.config import Settings

    names = zip(("NANIO_ACCESS_KEY", "NANIO_SECRET_KEY"), KEYS.values(), strict=True)
    os.environ.update(names)
    app = build_app(Settings(data_dir=Path(folder), credentials=EnvCredentialResolver()))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(f"http://127.0.0.1:{listener.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none")
        uvicorn.Server(config).run([listener])


def run(way: str, url: str, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-c", f"import benchmarks.reading as r; r.measure({way!r}, {url!r})"]
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(way: str, url: str) -> None:
    """Read in one way, in this process, and print what it took."""
    read = {"reference": _reference, "torch": _torch}.get(way) or _ours(way)
    if way in ("reference", "torch"):
        import_module("torch.utils.data")
    if url.startswith("s3:"):
        from lambda_worker.storage import s3

        s3.client()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins now
    before, start = _peak(), time.perf_counter()
    fetched = read(url)
    seconds = time.perf_counter() - start
    print(json.dumps({"ms": seconds * 1e3, "MB": _peak() - before, "fetched": fetched / 1e6}))


def _reference(url: str) -> int:
    import torch

    from lambda_worker import storage

    data = storage.read(url)
    _look(torch.load(io.BytesIO(data), weights_only=False).tensors)
    return len(data)


def _torch(url: str) -> int:
    import torch

    from lambda_worker import storage

    with tempfile.TemporaryDirectory() as folder:
        path = storage.fetch(url, Path(folder))
        _look(torch.load(path, weights_only=False).tensors)
        return path.stat().st_size


def _ours(way: str) -> Callable[[str], int]:
    from lambda_worker.reading import Shard
    from lambda_worker.shard import Piece

    start, stop = (0, ROWS) if way == "ours" else (ROWS // 4, ROWS // 2)

    def read(url: str) -> int:
        shard = Shard([Piece(url, start, stop)], Path())
        for _, _, rows in shard.batches(BATCH):
            _look(rows)
        return shard.bytes_read

    return read


def _look(columns: Any) -> None:
    for column in columns:
        assert float(column.sum()) > 0


def _peak() -> float:
    from lambda_worker.records import memory

    return memory("VmHWM")


def table(results: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """The results in Markdown."""
    lines = ["| from | how | ms | peak memory, MB | fetched, MB |", "|---|---|---:|---:|---:|"]
    for (place, way), several in results.items():
        ms, memory, fetched = (sorted(one[key] for one in several) for key in several[0])
        cells = [
            place,
            WAYS[way],
            f"{statistics.median(ms):.0f} ({ms[0]:.0f} … {ms[-1]:.0f})",
            f"+{statistics.median(memory):.0f}",
            f"{statistics.median(fetched):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
