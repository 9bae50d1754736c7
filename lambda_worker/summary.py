"""A run's files, and the merging of its ranks' into one result.

In the folder of a run: `<rank>.json` (a record, as `records` describes it), `combined_data.json` (a
list of all of them in rank order), `summary.json`, `predictions.npz` (z_spec and z_phot float32,
z_phot NaN where a row is excluded from the metrics; `row` is the row within `files[file_index]`).
Ranks that work without a rendezvous also leave `<rank>.npz`; rank 0 of a job leaves `merged.json`.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lambda_worker import metrics, storage
from lambda_worker.events import RunInfo
from lambda_worker.records import Table, pack, to_json
from lambda_worker.versions import versions

# What json and numpy raise about bytes that are not what they expect.
DAMAGE = (ValueError, LookupError, EOFError, OSError, TypeError, zipfile.BadZipFile, zlib.error)


class SummaryError(RuntimeError):
    """The run is not complete, or a file of it is damaged.

    The text names the ranks that are missing, or the file.
    """


def write_merged(
    folder: str, init_id: str | None, parts: Sequence[Mapping[str, Any]], total: Any
) -> None:
    """Rank 0 of a job: write the predictions, and the records and metrics of all ranks.

    Args:
        folder: URL of the run's folder.
        parts: each rank's record and table, in rank order.
        total: the ranks' sums, allreduced.
    """
    rows = _join([part["table"] for part in parts])
    merged = metrics.from_sums(total, metrics.nmad(rows["z_phot"], rows["z_spec"]))
    storage.write(f"{folder}/predictions.npz", _pack_final(rows))
    content = {"init_id": init_id, "metrics": merged, "records": [p["record"] for p in parts]}
    storage.write(f"{folder}/merged.json", to_json(content))


def summarize(run: RunInfo) -> dict[str, Any]:
    """Merge a run; see `handlers.summarize`."""
    _check_complete(run)
    if run.fmi_enabled:
        (merged,) = _read(run, ["merged.json"], _merged)
        records, numbers = merged["records"], merged["metrics"]
        _check_current(run, [*records, merged])
    else:
        records, numbers = _merge_files(run)
    result = {
        "combined_data": f"{run.results}/combined_data.json",
        "summary_path": f"{run.results}/summary.json",
        "predictions": f"{run.results}/predictions.npz",
        "summary": _summary(run, records, numbers),
        "records": records,
    }
    storage.write(result["combined_data"], to_json(records))
    storage.write(result["summary_path"], to_json(result["summary"]))
    _remove_strays(run)
    if run.ranks_file:  # for a state machine, whose states hold 256 KiB: records of some 200 ranks
        del result["records"]
    return result


def _remove_strays(run: RunInfo) -> None:
    """Remove what an earlier run of this name, of another size or kind, left beside ours."""
    keep = {f"{rank}.json" for rank in range(run.world_size)}
    if not run.fmi_enabled:
        keep |= {f"{rank}.npz" for rank in range(run.world_size)}
    strays = []
    for name in storage.names(run.results):
        stray = bool(re.fullmatch(r"\d+\.(json|npz)", name)) and name not in keep
        theirs = name in ("redshift.png", "run.json")  # by whoever started the earlier run
        if stray or theirs or (name == "merged.json" and not run.fmi_enabled):
            strays.append(f"{run.results}/{name}")
    storage.in_parallel(storage.remove, strays)


def _check_complete(run: RunInfo) -> None:
    there = set(storage.names(run.results))
    missing = [rank for rank in range(run.world_size) if f"{rank}.json" not in there]
    if missing:
        raise SummaryError(
            f"run {run.run}: no record of rank {_ranks(missing)} (of {run.world_size}) in "
            f"{run.results}: it failed or has not finished; see that rank's own error"
        )
    if run.fmi_enabled and "merged.json" not in there:
        raise SummaryError(
            f"run {run.run}: no merged.json in {run.results}, which rank 0 writes: "
            "did the ranks work without the rendezvous (fmi_enabled: false)?"
        )


def _check_current(run: RunInfo, records: Sequence[Mapping[str, Any]]) -> None:
    old = [r.get("rank", 0) for r in records if r.get("init_id") != run.init_id]
    if old:
        raise SummaryError(
            f"run {run.run}: files of rank {_ranks(old)} in {run.results} are of an earlier run "
            "of that name: the rank failed or has not finished in this one"
        )


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:10])) + (", ..." if len(ranks) > 10 else "")


def _merge_files(run: RunInfo) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Records, and metrics of all rows, of ranks that worked without a rendezvous."""
    ranks = range(run.world_size)
    records = _read(run, [f"{rank}.json" for rank in ranks], _record)
    _check_current(run, records)
    rows = _join(_read(run, [f"{rank}.npz" for rank in ranks], _unpack))
    storage.write(f"{run.results}/predictions.npz", _pack_final(rows))
    return records, metrics.compute(rows["z_phot"], rows["z_spec"])


def _read(run: RunInfo, names: Sequence[str], parse: Callable[[bytes], Table]) -> list[Table]:
    """What `parse` makes of each of a run's files.

    Raises:
        SummaryError: it cannot, and which file that is.
    """
    urls = [f"{run.results}/{name}" for name in names]
    contents = []
    for url, data in zip(urls, storage.read_all(urls), strict=True):
        try:
            contents.append(parse(data))
        except DAMAGE as error:
            what = f"{url} is damaged ({len(data)} bytes; {type(error).__name__}: {error})"
            raise SummaryError(
                f"run {run.run}: {what}: was it changed since? Run again under the same name"
            ) from error
    return contents


def _record(data: bytes) -> Table:
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a record")
    return content


def _merged(data: bytes) -> Table:
    content = _record(data)
    if not isinstance(content["records"], list) or not isinstance(content["metrics"], dict):
        raise ValueError("holds something else than records and metrics")
    return content


def _unpack(data: bytes) -> Table:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        content = {name: arrays[name] for name in ("z_phot", "z_spec", "row", "file_index")}
        return {**content, "files": arrays["files"].tolist()}


def _pack_final(rows: Table) -> bytes:
    return pack({**rows, "z_spec": rows["z_spec"].astype(np.float32)})


def _join(tables: Sequence[Table]) -> Table:
    """Tables one after the other, with one list of files."""
    files = list(dict.fromkeys(file for content in tables for file in content["files"]))
    number = {file: index for index, file in enumerate(files)}
    renumbered = [
        np.array([number[f] for f in content["files"]], np.int32)[content["file_index"]]
        for content in tables
    ]
    columns = {
        key: np.concatenate([content[key] for content in tables])
        for key in ("z_phot", "z_spec", "row")
    }
    return {**columns, "file_index": np.concatenate(renumbered), "files": files}


def _summary(
    run: RunInfo, records: Sequence[Mapping[str, Any]], numbers: Mapping[str, float | None]
) -> dict[str, Any]:
    rows, bits = (sum(r[key] for r in records) for key in ("rows", "bits"))
    wall, inference, join, load = (
        max(r[f"{name}_time (seconds)"] for r in records)
        for name in ("wall", "inference", "join", "load")
    )
    rates = {
        "rows_per_second": (rows, "sample_persec"),
        "bits_per_second": (bits, "throughput_bps"),
    }
    links = [r["links"] for r in records]
    deviations = [r["precision_max_dz"] for r in records if r["precision_max_dz"] is not None]
    sizes = {r["batch_size"] for r in records}
    return {
        "run": run.run,
        "rows": rows,
        "rows_excluded": sum(r["rows_excluded"] for r in records),
        "excluded_rows": [row for r in records for row in r["excluded_rows"]][: metrics.NAMED],
        "world_size": run.world_size,
        # Without a rendezvous each rank chooses for itself; then records tell what it used.
        "batch_size": sizes.pop() if len(sizes) == 1 else None,
        "batch_size_asked": run.batch_size,
        "batches": sum(r["num_batches"] for r in records),
        # Seconds are those of the slowest rank.
        "wall_seconds": wall,
        "inference_seconds": inference,
        "join_seconds": join,
        "load_seconds": load,
        # Three rates that differ, and that are easily mistaken for each other.
        **{
            name: {
                "wall_clock": amount / inference if inference else 0.0,
                "end_to_end": amount / wall if wall else 0.0,
                "sum_of_ranks": sum(r[key] for r in records),
            }
            for name, (amount, key) in rates.items()
        },
        "engine": records[0]["engine"],
        "precision": records[0]["precision"],
        "precision_max_dz": max(deviations, default=None),
        "precision_rows": sum(r["precision_rows"] for r in records),
        "peak_memory_mb": max(r["peak_memory (MB)"] for r in records),
        "metrics": dict(numbers),
        "links": {kind: sum(link[kind] for link in links) for kind in ("direct", "relay")},
        "model": run.model,
        "data": run.data,
        "versions": versions(("cosmic-fmi", "numpy", "torch", "onnxruntime", "openvino")),
    }
