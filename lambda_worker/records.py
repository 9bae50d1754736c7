"""What a rank leaves of its part: a record, and a table of its rows' predictions."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lambda_worker import metrics
from lambda_worker.cgroups import memory_limit
from lambda_worker.shard import Piece

if TYPE_CHECKING:
    from lambda_worker.events import RankTask
    from lambda_worker.inference import Deviation, Inferred
    from lambda_worker.reading import Shard
    from lambda_worker.timing import Stopwatch

MB = 1e6
METRIC_NAMES = {"mae": "MAE", "mse": "MSE", "bias": "bias", "nmad": "NMAD", "r2": "R2"}

Table = dict[str, Any]


def record(
    task: RankTask,
    rows: Shard,
    inferred: Inferred,
    deviation: Deviation | None,
    batch: Mapping[str, Any],
    clock: Stopwatch,
    baseline: float,
    stats: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A rank's record: the reference's ten keys, and ours.

    The ten, as they are meant here (rates are per elapsed time, never per CPU time):

    * total_cpu_time (seconds): CPU time of this process during the inference loop, all threads
    * total_cpu_memory (MB): peak resident memory above that before model and data were loaded
    * execution_time (seconds/batch): elapsed time of the loop over the number of batches
    * num_batches, batch_size, device
    * throughput_bps: bits of images and magnitudes over the loop's elapsed time
    * sample_persec: rows over the loop's elapsed time
    * result_path: folder of the run; data_path: file, list of files, or null without rows

    Args:
        deviation: what a lower precision than fp32 costs, or None.
        batch: the batch_size that was used, and the calibration that chose it, or None.
        clock: this rank's stages up to the record: "join", "load" and others.
        baseline: resident memory (MB) before loading.
        stats: the communicator's, or None.
    """
    wall, files = inferred.wall_seconds, list(dict.fromkeys(p.file for p in rows.pieces))
    peak = memory("VmHWM")
    own = metrics.compute(inferred.z_phot, inferred.z_spec)
    return {
        "total_cpu_time (seconds)": inferred.cpu_seconds,
        "total_cpu_memory (MB)": max(peak - baseline, 0.0),
        "execution_time (seconds/batch)": wall / inferred.batches if inferred.batches else 0.0,
        "num_batches": inferred.batches,
        **batch,
        "device": "cpu",
        "throughput_bps": inferred.bits / wall if inferred.bits else 0.0,
        "sample_persec": len(rows) / wall if len(rows) else 0.0,
        "result_path": task.results_url,
        "data_path": files if len(files) > 1 else (files[0] if files else None),
        "rank": task.rank,
        "world_size": task.world_size,
        "rows": len(rows),
        "rows_excluded": len(inferred.excluded),
        "excluded_rows": [row._asdict() for row in inferred.named(rows.pieces)],
        "bits": inferred.bits,
        "engine": task.engine,
        "precision": task.precision,
        "precision_max_dz": deviation and deviation.max_dz,
        "precision_rows": deviation.rows if deviation else 0,
        "init_time (seconds)": clock.init,
        "wall_time (seconds)": clock.total,
        "join_time (seconds)": clock.seconds("join"),
        "load_time (seconds)": clock.seconds("load"),
        "collective_time (seconds)": stats["collective_seconds"] if stats else 0.0,
        "inference_time (seconds)": wall,
        "read_time (seconds)": inferred.read_seconds,
        "bytes_read": rows.bytes_read,
        "read_requests": rows.requests,
        "spans": [list(span) for span in clock.spans],
        "peak_memory (MB)": peak,
        "memory_limit (MB)": memory_limit(),
        **{name: own[key] for key, name in METRIC_NAMES.items()},
        "links": _link_kinds(stats),
        "run": task.run,
        "init_id": task.init_id,
    }


def memory(field: str) -> float:
    """Resident memory of this process in MB (10^6 bytes): now ("VmRSS") or at most ("VmHWM")."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    with open("/proc/self/status") as status:
        found = next(line for line in status if line.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024 / MB


def table(pieces: Sequence[Piece], inferred: Inferred) -> Table:
    """Predictions of a shard, row by row, as the predictions file holds them."""
    files = list(dict.fromkeys(piece.file for piece in pieces))
    lengths = [piece.stop - piece.start for piece in pieces]
    ranges = [np.arange(piece.start, piece.stop, dtype=np.int64) for piece in pieces]
    return {
        "z_phot": inferred.z_phot,
        "z_spec": inferred.z_spec,
        "row": np.concatenate([np.empty(0, np.int64), *ranges]),
        "file_index": np.repeat(np.array([files.index(p.file) for p in pieces], np.int32), lengths),
        "files": files,
    }


def pack(content: Table) -> bytes:
    """A table as the bytes of an .npz file."""
    buffer = io.BytesIO()
    names = np.array(content["files"], dtype=np.str_)
    np.savez(buffer, **{**content, "files": names})
    return buffer.getvalue()


def to_json(value: object) -> bytes:
    """JSON for people and programs; refuses NaN, which is not JSON."""
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


def _link_kinds(stats: Mapping[str, Any] | None) -> dict[str, int]:
    kinds = [link["kind"] for link in stats["links"].values()] if stats else []
    return {kind: kinds.count(kind) for kind in ("direct", "relay")}
