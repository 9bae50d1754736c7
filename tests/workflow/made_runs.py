"""Runs that nobody has made, of any size, for tests of what comes after the reading.

All numbers follow from the arguments: two calls with the same arguments give the same runs.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from workflow.plan import Span
from workflow.results import Finding, Rank, Results, Run

ROWS = 1253
BITS_PER_ROW = 164_160
BEGAN = 1_790_000_000.0
METRICS = {"mae": 0.0162, "mse": 0.00071, "bias": 0.0004, "nmad": 0.0127, "r2": 0.935}
ENVIRONMENT = {
    "cpu": "Some Processor @ 2.50GHz",
    "architecture": "x86_64",
    "cores": 8,
    "cores_usable": 4,
    "threads": 1,
    "ram_gb": 16.4,
    "platform": "Linux-6.1",
    "versions": {"python": "3.12.1", "numpy": "2.1.0", "torch": "2.9.0", "onnxruntime": None},
}


def made_run(
    world: int = 4, batch: int = 32, repeat: int = 1, galaxies: int = ROWS, **fields: Any
) -> Run:
    """Make a run of `world` ranks that went well; `fields` replace what it says."""
    dice = random.Random(f"{world} {batch} {repeat} {galaxies}")
    shares = [galaxies // world + (rank < galaxies % world) for rank in range(world)]
    ranks = tuple(made_rank(r, rows, batch, dice) for r, rows in enumerate(shares))
    inference = max(r.inference_s or 0.0 for r in ranks)
    total = 1.3 + max(r.wall_s or 0.0 for r in ranks)
    usual: dict[str, Any] = {
        "place": f"/results/runs/w{world}-b{batch}-small-r{repeat}",
        "source": "cosmic run",
        "name": f"w{world}-b{batch}-small-r{repeat}",
        "data": "small",
        "world_size": world,
        "batch_size": batch,
        "repeat": repeat,
        "engine": "torch",
        "precision": "fp32",
        "ranks": ranks,
        "rows": galaxies,
        "bits": float(galaxies * BITS_PER_ROW),
        "total_s": total,
        "inference_s": inference,
        "metrics": METRICS,
        "spans": (*launcher_spans(total), *(s for r in ranks for s in rank_spans(r))),
        "environment": ENVIRONMENT,
    }
    return Run(**usual | fields)


def made_rank(rank: int, rows: int, batch: int, dice: random.Random) -> Rank:
    """Make the record of a rank; larger batches are faster, up to a point."""
    batches = -(-rows // batch)
    inference = (0.0009 * rows + 0.004 * batches + 0.00001 * batch) * dice.uniform(0.95, 1.25)
    init, join, load, collective = (
        base * dice.uniform(0.8, 1.3) for base in (0.45, 0.12, 0.5, 0.06)
    )
    bits = float(rows * BITS_PER_ROW)
    return Rank(
        rank=rank,
        rows=rows,
        batches=batches,
        bits=bits,
        init_s=init,
        join_s=join,
        load_s=load,
        inference_s=inference,
        collective_s=collective,
        read_s=inference / 20,
        wall_s=join + load + collective + inference + 0.02,
        cpu_s=inference * 0.97,
        rows_per_s=rows / inference if rows else 0.0,
        bits_per_s=bits / inference if rows else 0.0,
        peak_memory_mb=310 + 0.8 * batch + dice.uniform(0, 9),
        memory_limit_mb=2048.0,
        data=("small.pt",),
    )


def launcher_spans(total: float) -> tuple[Span, ...]:
    """Return the launcher's steps of a run that took `total` seconds."""
    ends = {"server": 0.3, "init": 0.7, "infer": total - 0.4, "summarize": total}
    starts = [0.0, *ends.values()]
    steps = zip(ends.items(), starts, strict=False)
    return tuple(Span(None, name, BEGAN + start, end - start) for (name, end), start in steps)


def rank_spans(rank: Rank) -> tuple[Span, ...]:
    """Return what a rank did, one after the other."""
    barrier = 0.8 * (rank.collective_s or 0.0)
    stages = {
        "join": rank.join_s,
        "load": rank.load_s,
        "barrier": barrier,
        "infer": rank.inference_s,
        "allreduce": (rank.collective_s or 0.0) - barrier,
    }
    now, spans = BEGAN + 0.7 + (rank.init_s or 0.0), []
    for name, seconds in stages.items():
        spans.append(Span(rank.rank, name, now, seconds or 0.0))
        now += seconds or 0.0
    return tuple(spans)


def failed_run(world: int = 4, batch: int = 32, repeat: int = 1, **fields: Any) -> Run:
    """Make a run that left nothing but its error."""
    nothing = {"ranks": (), "rows": None, "bits": None, "inference_s": None, "metrics": {}}
    error = {"status": "failed", "error": "rank 2: MemoryError: no memory left", "spans": ()}
    return made_run(world, batch, repeat, **nothing | error | fields)


def made_sweep(
    worlds: Iterable[int] = (1, 2, 3, 4),
    batches: Iterable[int] = (8, 16, 32, 64, 128),
    repeats: int = 2,
    failed: Iterable[tuple[int, int, int]] = (),
    **fields: Any,
) -> Results:
    """Make all configurations, those (world, batch, repeat) in `failed` without success."""
    out = set(failed)
    keys = product(worlds, batches, range(1, repeats + 1))
    runs = [(failed_run if key in out else made_run)(*key, **fields) for key in keys]
    return Results(tuple(runs), ())


def original_run(
    partition: int = 25, data_gb: float = 1.0, repeat: int = 1, batch: int = 512, **fields: Any
) -> Run:
    """Make a run as the original's files tell it: CPU time only, no wall clock, no spans."""
    world = max(1, round(data_gb * 1024 / partition))
    dice = random.Random(f"{partition} {data_gb} {repeat}")
    rows = partition * 51
    cpu = [0.2 * partition * dice.uniform(0.9, 1.3) for _ in range(world)]
    bits = float(rows * BITS_PER_ROW)
    ranks = tuple(
        Rank(rows=rows, bits=bits, cpu_s=s, rows_per_s=rows / s, bits_per_s=bits / s) for s in cpu
    )
    usual: dict[str, Any] = {
        "place": f"result-partition-{partition}MB/{data_gb:g}GB/{repeat}/combined_data.json",
        "source": "original",
        "name": f"result-partition-{partition}MB/{data_gb:g}GB/{repeat}",
        "on": "aws",
        "data": f"{partition}MB partitions, {data_gb:g}GB",
        "partition_mb": float(partition),
        "data_gb": data_gb,
        "world_size": world,
        "batch_size": batch,
        "repeat": repeat,
        "ranks": ranks,
        "rows": rows * world,
        "bits": bits * world,
    }
    return Run(**usual | fields)


def many_findings(kinds: int = 3, each: int = 100) -> tuple[Finding, ...]:
    """Make as many findings of several kinds as nobody would read."""
    return tuple(
        Finding(f"/results/{n}.json", f"kind {kind}", f"rank {n} is missing")
        for kind in range(kinds)
        for n in range(each if kind == 0 else 2)
    )


def save_predictions(path: Path, rows: int = 2000) -> str:
    """Write a predictions.npz as `summarize` does, and return where."""
    import numpy as np

    dice = np.random.default_rng(0)
    z_spec = dice.gamma(3, 0.05, rows).astype(np.float32)
    z_phot = (z_spec + dice.normal(0, 0.013, rows)).astype(np.float32)
    z_phot[::100] = np.nan
    np.savez(path, z_spec=z_spec, z_phot=z_phot)
    return str(path)
