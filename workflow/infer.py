"""What ``cosmic infer`` does: one process, one model, one dataset, and all that it took.

The original project's third step. The loop is the ranks' own (`lambda_worker.inference`), without a
rendezvous and without records; numbers about accuracy are those of ``cosmic run``.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lambda_worker import (
    batching,
    dataset,
    exported,
    inference,
    metrics,
    planning,
    records,
    storage,
)
from lambda_worker.engine import DEMO_MODEL, LIBRARIES, Engine, Precision, Predict, open_engine
from lambda_worker.events import Payload
from lambda_worker.reading import Shard
from lambda_worker.shard import Piece
from workflow import environment, predictions, profiling
from workflow.plot import redshift_png

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lambda_worker.inference import Inferred
    from workflow.progress import View

__all__ = ["InferPlan", "infer"]

Json = dict[str, Any]


@dataclass(frozen=True)
class InferPlan:
    """What to do. All places are paths or URLs; None: not wanted, or for ``model`` the demo model.

    ``profile`` is a folder on this machine. ``threads`` None is all cores that this process may
    use.
    """

    data: str
    model: str | None = None
    batch_size: int | Literal["auto"] = 32
    engine: Engine = "torch"
    precision: Precision = "fp32"
    threads: int | None = None
    strict: bool = False
    predictions: str | None = None
    plot: str | None = None
    profile: str | None = None


@dataclass(frozen=True)
class _Loaded:
    engine: Engine  # that of the plan, or what its "auto" has become
    model: Path
    predict: Predict
    shard: Shard
    seconds: float
    imported: float  # MB in memory when all was imported, and nothing loaded


def infer(plan: InferPlan, view: View) -> Json:
    """Predict all rows, write what is asked for, and return the report (docs/infer.md).

    Raises:
        DatasetError, ModelError, StorageError: a file cannot be used or written; with ``strict``
            also for rows that are not finite. None of the plan's files is then half written.
        EngineError: this machine has not the engine, or not the precision.
    """
    with tempfile.TemporaryDirectory(prefix="cosmic-", ignore_cleanup_errors=True) as folder:
        view.step("load: engine, model and data")
        loaded = _load(plan, Path(folder))
        batch_size, calibration = _batch_size(plan, loaded, view)
        inferred = _infer(loaded, batch_size, view)
        peak = records.memory("VmHWM")
        inference.judge(inferred, loaded.shard.pieces, plan.strict)
        deviation = inference.deviation(
            loaded.model,
            loaded.engine,
            plan.precision,
            plan.threads,
            loaded.shard,
            inferred.z_phot,
        )
        numbers = metrics.compute(inferred.z_phot, inferred.z_spec)
        written = _write(plan, loaded.shard.pieces, inferred, numbers, view)
        profile = _profile(plan, loaded, batch_size, view)
    return {
        "data": plan.data,
        "model": plan.model or str(DEMO_MODEL),
        "device": "cpu",
        "engine": loaded.engine,
        "precision": plan.precision,
        "precision_max_dz": deviation.max_dz if deviation else None,
        "precision_rows": deviation.rows if deviation else 0,
        "batch_size": batch_size,
        "batch_size_asked": plan.batch_size,
        "calibration": calibration,
        **_rows(loaded.shard.pieces, inferred),
        **_speed(inferred, loaded.seconds),
        "memory_mb": {"peak": peak, "beyond_imports": max(peak - loaded.imported, 0.0)},
        "metrics": numbers,
        **written,
        "profile": profile,
        "environment": environment.describe(plan.threads, loaded.engine),
    }


def _load(plan: InferPlan, folder: Path) -> _Loaded:
    engine, place = exported.choose(plan.engine, plan.precision, plan.model or str(DEMO_MODEL))
    with suppress(ModuleNotFoundError):  # `open_engine` says what to install
        importlib.import_module(LIBRARIES[engine])
    imported = records.memory("VmRSS")
    began = time.perf_counter()
    files = planning.dataset_files(Payload(data=plan.data))
    pieces = [Piece(file, 0, dataset.count(file)) for file in files]
    model = storage.fetch(place, folder)
    predict = open_engine(model, engine=engine, precision=plan.precision, threads=plan.threads)
    shard = Shard(pieces, folder)
    return _Loaded(engine, model, predict, shard, time.perf_counter() - began, imported)


def _batch_size(plan: InferPlan, loaded: _Loaded, view: View) -> tuple[int, Json | None]:
    if plan.batch_size != "auto":
        return plan.batch_size, None
    view.step("tune: trying batch sizes")
    trials = batching.calibrate(loaded.predict, len(loaded.shard))
    return batching.choose(trials.rates), batching.report(trials, trials.rates)


def _infer(loaded: _Loaded, batch_size: int, view: View) -> Inferred:
    view.step(f"infer: {len(loaded.shard):,} rows, {batch_size:,} at a time")
    view.update("rows", "infer", 0, len(loaded.shard))
    return inference.run(
        loaded.predict,
        loaded.shard,
        batch_size,
        lambda done, of: view.update("rows", "infer", done, of),
    )


def _rows(pieces: Sequence[Piece], inferred: Inferred) -> Json:
    return {
        "rows": len(inferred.z_phot),
        "rows_excluded": len(inferred.excluded),
        "excluded_rows": [row._asdict() for row in inferred.named(pieces)],
    }


def _speed(inferred: Inferred, load: float) -> Json:
    each, seconds = inferred.batch_seconds, inferred.wall_seconds
    known = len(each) > 0
    return {
        "batches": inferred.batches,
        "seconds": {"load": load, "inference": seconds, "cpu": inferred.cpu_seconds},
        "batch_seconds": {
            "mean": float(each.mean()) if known else None,
            "p50": float(np.percentile(each, 50)) if known else None,
            "p95": float(np.percentile(each, 95)) if known else None,
        },
        "rows_per_second": len(inferred.z_phot) / seconds if known else 0.0,
        "bits_per_second": inferred.bits / seconds if known else 0.0,
    }


def _write(
    plan: InferPlan,
    pieces: Sequence[Piece],
    inferred: Inferred,
    numbers: dict[str, float | None],
    view: View,
) -> Json:
    written: Json = {"predictions": None, "plot": None}
    if plan.predictions:
        view.step(f"predictions: {plan.predictions}")
        predictions.save(plan.predictions, records.table(pieces, inferred), inferred.flaws)
        written["predictions"] = plan.predictions
    used = metrics.used(inferred.z_phot)
    if plan.plot and not used.any():
        view.step("no plot: there is no row to draw")
    elif plan.plot:
        view.step(f"plot: {plan.plot}")
        picture = redshift_png(inferred.z_spec[used], inferred.z_phot[used], numbers)
        storage.write(plan.plot, picture)
        written["plot"] = plan.plot
    return written


def _profile(plan: InferPlan, loaded: _Loaded, batch_size: int, view: View) -> Json | None:
    """Run a few batches once more, in the profiler: it would slow down what is timed.

    On one thread: the profiler sees no thread but the one that starts it.
    """
    if plan.profile is None or not len(loaded.shard):
        return None
    view.step(f"profile: {profiling.BATCHES} batches once more, inside torch's profiler")
    predict = open_engine(loaded.model, precision=plan.precision, threads=1)
    return profiling.profile(predict, loaded.shard, batch_size, Path(plan.profile))
