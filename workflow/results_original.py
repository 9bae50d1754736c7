"""The original project's files (UVA-MLSys/AI-for-Astronomy): records of ranks, and one process's.

Its "MB" and "GB" are 2^20 and 2^30 bytes, and stay as its paths write them: "25MB", "12.6GB".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from workflow.results import Finding, Rank, Read, Run
from workflow.results_files import Fields, plain

__all__ = ["BITS_PER_ROW", "Label", "Original", "accuracy", "combined", "label", "totals"]

BITS_PER_ROW = 5 * 32 * 32 * 32 + 5 * 64
"""An image of 5 x 32 x 32 float32 and 5 magnitudes of float64: exact in every record."""

CPU = "total_cpu_time (seconds)"
ELAPSED = "total_execution_time (seconds)"
WHOLE_GB = 12.6  # what the original calls "total"


class Label(NamedTuple):
    """What a path of the original's results says.

    ``name`` begins at "result-partition-…". ``size`` is the text, ``data_gb`` its meaning;
    ``batch_size`` is known where it was varied; ``run`` counts from 1. ``kind`` is what else the
    file's name says ("combined_data_1"), or empty.
    """

    name: str
    partition_mb: float
    size: str
    data_gb: float | None
    batch_size: int | None
    run: int | None
    kind: str = ""

    @property
    def varied(self) -> bool:
        """Whether it is one of the runs that vary the batch size."""
        return self.batch_size is not None

    @property
    def data(self) -> str:
        """The data for people."""
        known = f"{self.data_gb:g}GB" if self.data_gb is not None else self.size
        return f"{self.partition_mb:g}MB partitions, {known}"

    @property
    def partitions(self) -> int | None:
        """How many partitions make up ``data_gb``: the original's own rule."""
        if self.data_gb is None or not self.partition_mb:
            return None
        return math.ceil(1024 * self.data_gb / self.partition_mb)


def label(path: str) -> Label | None:
    """Read a place or a result path, by the rule of the original's collect_logs; None: neither."""
    found = re.search(r"(?:^|/)(result-partition-(\d{1,5})MB/(.+))$", path.rstrip("/"))
    if not found:
        return None
    parts = found[3].split("/")
    file = parts.pop() if parts[-1].endswith(".json") else ""
    back = -4 if "Batches" in parts else -2
    run = re.fullmatch(r"(?:run )?(\d{1,5})", parts[-1]) if parts else None
    if len(parts) < -back or not run:
        return None
    batch = re.fullmatch(r"\d{1,6}", parts[-2]) if back == -4 else None
    if back == -4 and not batch:
        return None
    return Label(
        name=plain(f"result-partition-{found[2]}MB/" + "/".join(parts)),
        partition_mb=float(found[2]),
        size=plain(parts[back], 40),
        data_gb=gigabytes(parts[back]),
        batch_size=int(batch[0]) if batch else None,
        run=int(run[1]),
        kind="" if file in ("", "combined_data.json") else file.removesuffix(".json"),
    )


def gigabytes(size: str) -> float | None:
    """What "1GB", "total", "total256GB" or "1TB" mean, in the original's GB."""
    if size in ("total", "timing"):  # the latter are runs on all data that time S3, too
        return WHOLE_GB
    found = re.fullmatch(r"(?:total)?(\d{1,6}(?:\.\d{1,3})?)(GB|TB)?", size)
    return float(found[1]) * (1000 if found[2] == "TB" else 1) if found else None


@dataclass(frozen=True)
class Original:
    """A run of the original, what its place says, and what path its records name.

    ``written`` is None without a path of a known form; ``named`` says whether there is a path.
    """

    run: Run
    place: Label | None
    written: Label | None
    named: bool


def combined(path: Path, records: Sequence[Mapping[str, Any]]) -> tuple[Original, list[Finding]]:
    """Read a list of records, one per rank: combined_data.json in any of its schemas."""
    fields = [Fields(record) for record in records]
    ranks = tuple(map(_rank, fields))
    paths = {each for f in fields for each in f.words("result_path")}
    written = next(filter(None, map(label, sorted(paths))), None)
    place = label(path.as_posix()) or written
    sizes = {f.count("batch_size") for f in fields}
    run = Run(
        place=plain(path),
        source="original",
        name=_name(place, path),
        on="aws",
        data=place.data if place else "unknown",
        partition_mb=place.partition_mb if place else None,
        data_gb=place.data_gb if place else None,
        world_size=len(ranks),
        batch_size=sizes.pop() if len(sizes) == 1 else None,
        repeat=place.run or 1 if place else 1,
        engine="torch",
        precision="fp32",
        ranks=ranks,
        rows=_sum([rank.rows for rank in ranks]),
        bits=_sum([rank.bits for rank in ranks]),
    )
    return Original(run, place, written, bool(paths)), _odd(run, fields)


def _name(place: Label | None, path: Path) -> str:
    if place is None:
        return plain(path.parent.name or path.stem)
    return f"{place.name}/{plain(place.kind, 60)}" if place.kind else place.name


def _rank(f: Fields) -> Rank:
    """A rank; its rates are per CPU time, and so bits are exactly rate times time."""
    cpu, rate, samples = (
        f.amount(CPU),
        f.amount("throughput_bps"),
        f.amount("sample_persec"),
    )
    bits = cpu * rate if cpu is not None and rate is not None else None
    rows = whole_rows(bits)
    return Rank(
        rows=rows,
        batches=f.count("num_batches"),
        bits=float(rows * BITS_PER_ROW) if rows is not None else bits,
        cpu_s=cpu,
        rows_per_s=samples,
        bits_per_s=rate,
        data=f.words("data_path"),
    )


def whole_rows(bits: float | None) -> int | None:
    """How many rows these bits are; None if it is no whole number of them."""
    if bits is None:
        return None
    rows = round(bits / BITS_PER_ROW)
    return rows if math.isclose(rows * BITS_PER_ROW, bits, rel_tol=1e-9, abs_tol=1e-3) else None


def _sum(values: Sequence[Any]) -> Any:
    return None if not values or None in values else sum(values)


def totals(path: Path, records: Sequence[Mapping[str, Any]]) -> Read:
    """Read total.json: one process that tells after each gigabyte what it took so far.

    Its time is elapsed time (perf_counter), its "sample_persec" a list of one. The last state is
    that of the whole run.
    """
    fields = [Fields(record) for record in records]
    run = _total(path, max(fields, key=lambda f: f.amount("GB_processed") or 0.0))
    found = _odd(run, fields)
    if len(fields) > 1:
        text = f"{len(fields):,} states of one process, from its start on: the last is shown."
        found.insert(0, Finding(run.place, "one process", text))
    return Read([run], found)


def _total(path: Path, f: Fields) -> Run:
    seconds, rate, rows_per_s = (
        f.amount(ELAPSED),
        f.amount("throughput_bps"),
        f.amount("sample_persec"),
    )
    bits = seconds * rate if seconds is not None and rate is not None else None
    gb = f.amount("GB_processed")
    device = f.word("device") or "?"
    rank = Rank(
        rank=0,
        rows=whole_rows(bits),
        batches=f.count("num_batches"),
        bits=bits,
        inference_s=seconds,
        rows_per_s=rows_per_s,
        bits_per_s=rate,
    )
    return Run(
        place=plain(path),
        source="original, one process",
        name=f"{plain(path.parent.name)}/{plain(path.stem)}",
        data=(f"{gb:g}GB" if gb else "unknown") + ("" if device == "cpu" else f", {device}"),
        data_gb=gb,
        world_size=1,
        batch_size=f.count("batch_size"),
        engine="torch",
        precision="fp32",
        ranks=(rank,),
        rows=rank.rows,
        bits=bits,
        inference_s=seconds,
    )


def accuracy(path: Path, content: Mapping[str, Any]) -> Read:
    """Read Results.json or inference.png_Results.json: metrics, and what one process took.

    What it calls precision is our NMAD. Whether its time is elapsed or CPU time it does not say, so
    that it is neither here; its rate is as recorded.
    """
    f = Fields(content)
    rate, seconds = f.amount("throughput"), f.amount("total execution time")
    bits = seconds * rate if seconds is not None and rate is not None else None
    rank = Rank(
        rank=0,
        rows=whole_rows(bits),
        batches=f.count("number of batches"),
        bits=bits,
        bits_per_s=rate,
    )
    names = {"mae": "MAE", "mse": "MSE", "bias": "Bias", "nmad": "Precision", "r2": "R2"}
    run = Run(
        place=plain(path),
        source="original, one process",
        name=plain(path.stem),
        data="unknown",
        world_size=1,
        batch_size=f.count("batch size"),
        engine="torch",
        precision="fp32",
        ranks=(rank,),
        rows=rank.rows,
        bits=bits,
        metrics={ours: f.number(theirs) for ours, theirs in names.items()},
    )
    found = _odd(run, [f])
    if seconds is not None:
        text = f'"total execution time" ({seconds:.1f} s) may be CPU time, so no time is shown.'
        found.append(Finding(run.place, "time of unknown kind", text))
    return Read([run], found)


def _odd(run: Run, fields: Sequence[Fields]) -> list[Finding]:
    """Name values that are not what their key says."""
    names = sorted({name for f in fields for name in f.odd})
    if not names:
        return []
    count = sum(bool(f.odd) for f in fields)
    what = ", ".join(plain(name, 60) for name in names[:4])
    text = f"{count} of {len(fields)} records have values that cannot be used: {what}."
    return [Finding(run.place, "values not usable", text)]
