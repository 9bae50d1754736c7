"""Our own files: a sweep's folder, a run's folder, its records or summary, what `infer` reports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from workflow import results_checks as checks
from workflow.results import METRICS, Finding, Rank, Read, Run, Source
from workflow.results_files import Fields, Unreadable, load, plain
from workflow.spans import launcher_spans, rank_spans

__all__ = [
    "infer_report",
    "is_record",
    "is_report",
    "is_summary",
    "records",
    "run_folder",
    "short_data",
    "summary",
    "sweep",
]


def is_record(value: object) -> bool:
    """Whether this is a rank's record of ours: the original's have no rank."""
    return isinstance(value, Mapping) and "rank" in value and "total_cpu_time (seconds)" in value


def is_report(value: object) -> bool:
    """Whether this is what `cosmic infer --json` writes."""
    return isinstance(value, Mapping) and "batch_seconds" in value and "seconds" in value


def is_summary(value: object) -> bool:
    """Whether this is a summary.json."""
    return isinstance(value, Mapping) and "inference_seconds" in value and "world_size" in value


def short_data(place: str | None) -> str:
    """Return the data's name for people: "small" of the demo data, else the last of its path."""
    if not place:
        return "unknown"
    name = place.rstrip("/").rpartition("/")[2]
    demo = re.match(r"demo-([a-z]+)-", name)
    return demo[1] if demo else plain(name, 80)


# -- a run ----------------------------------------------------------------------------------------


def run_folder(folder: Path) -> Read | None:
    """Read the folder of a `cosmic run`, whether it ended well or not; None if it is not one."""
    told: list[Finding] = []
    records = _records(folder, told)
    main = _object(folder / "run.json", told)
    totals = _object(folder / "summary.json", told)
    failed = (folder / "failed").is_dir()
    if not records and not is_summary(totals) and "plan" not in main:
        return Read([], told) if told else None
    run, odd = _run(folder, records, Fields(main), Fields(totals))
    if failed and not totals:
        run = replace(run, status="failed", error=_last_word(folder / "failed"))
    elif not totals and not main:
        run = replace(run, status="incomplete")
    run, found = checks.ours(run, sum(f.count("rows_excluded") or 0 for f in map(Fields, records)))
    return Read([run], [*told, *odd, *found, *_conflict(run, totals)])


def _records(folder: Path, told: list[Finding]) -> list[Mapping[str, Any]]:
    """The records of all ranks together, or where the run came to no end, each one's own."""
    whole = folder / "combined_data.json"
    if _own(whole):
        return _list(whole, told)
    numbered = [p for p in folder.glob("*.json") if re.fullmatch(r"\d{1,6}", p.stem) and _own(p)]
    found = []
    for path in sorted(numbered, key=lambda p: int(p.stem)):
        found += _list(path, told)
    return found


def _list(path: Path, told: list[Finding]) -> list[Mapping[str, Any]]:
    try:
        content = load(path)
    except Unreadable as error:
        told.append(Finding(plain(path), "not readable", f"{error}."))
        return []
    records = content if isinstance(content, list) else [content]
    found = [record for record in records if is_record(record)]
    if len(found) < len(records):
        text = f"{len(records) - len(found)} of {len(records)} entries are no records of ranks."
        told.append(Finding(plain(path), "not readable", text))
    return found


def _object(path: Path, told: list[Finding]) -> Mapping[str, Any]:
    if not _own(path):
        return {}
    try:
        content = load(path)
    except Unreadable as error:
        told.append(Finding(plain(path), "not readable", f"{error}."))
        return {}
    if isinstance(content, Mapping):
        return content
    told.append(Finding(plain(path), "not readable", "It holds something else than an object."))
    return {}


def _own(path: Path) -> bool:
    """Whether it is a file of the folder: a link may lead anywhere."""
    return path.is_file() and not path.is_symlink()


def _run(
    folder: Path, records: Sequence[Mapping[str, Any]], main: Fields, totals: Fields
) -> tuple[Run, list[Finding]]:
    fields = [Fields(record) for record in records]
    plan, first = main.inner("plan"), fields[0] if fields else Fields({})
    ranks = tuple(map(_rank, fields))
    sizes = {f.count("batch_size") for f in fields}
    numbers = totals.inner("metrics")
    spans = [*launcher_spans(main.content), *(s for r in records for s in rank_spans(r))]
    predictions = folder / "predictions.npz"
    run = Run(
        place=plain(folder),
        source="cosmic run",
        name=main.word("run") or totals.word("run") or first.word("run") or plain(folder.name),
        on=main.word("on") or "local",
        data=short_data(plan.word("data") or totals.word("data") or _data(ranks)),
        world_size=plan.count("world_size")
        or totals.count("world_size")
        or first.count("world_size"),
        batch_size=sizes.pop() if len(sizes) == 1 else totals.count("batch_size"),
        engine=first.word("engine") or totals.word("engine") or plan.word("engine"),
        precision=first.word("precision") or totals.word("precision") or plan.word("precision"),
        ranks=ranks,
        rows=_sum(ranks, "rows") if ranks else totals.count("rows"),
        bits=_sum(ranks, "bits"),
        total_s=main.amount("seconds"),
        inference_s=totals.amount("inference_seconds") or _most(ranks, "inference_s"),
        metrics={name: numbers.number(name) for name in METRICS},
        spans=tuple(s._replace(name=plain(s.name, 40)) for s in spans),
        predictions=str(predictions) if predictions.is_file() else None,
        environment=main.inner("environment").content,
    )
    odd = {name for f in (*fields, main, totals, plan, numbers) for name in f.odd}
    return run, _odd(run.place, odd)


def _rank(f: Fields) -> Rank:
    return Rank(
        rank=f.count("rank"),
        rows=f.count("rows"),
        batches=f.count("num_batches"),
        bits=f.amount("bits"),
        init_s=f.amount("init_time (seconds)"),
        join_s=f.amount("join_time (seconds)"),
        load_s=f.amount("load_time (seconds)"),
        inference_s=f.amount("inference_time (seconds)"),
        collective_s=f.amount("collective_time (seconds)"),
        read_s=f.amount("read_time (seconds)"),
        wall_s=f.amount("wall_time (seconds)"),
        cpu_s=f.amount("total_cpu_time (seconds)"),
        rows_per_s=f.amount("sample_persec"),
        bits_per_s=f.amount("throughput_bps"),
        peak_memory_mb=f.amount("peak_memory (MB)"),
        memory_limit_mb=f.amount("memory_limit (MB)"),
        data=f.words("data_path"),
    )


def _data(ranks: Sequence[Rank]) -> str | None:
    files = {file for rank in ranks for file in rank.data}
    if len(files) == 1:
        return files.pop()
    folders = {file.rpartition("/")[0] for file in files}
    return folders.pop() if len(folders) == 1 else None


def _sum(ranks: Sequence[Rank], name: str) -> Any:
    values = [getattr(rank, name) for rank in ranks]
    return None if not values or None in values else sum(values)


def _most(ranks: Sequence[Rank], name: str) -> float | None:
    return max((v for rank in ranks if (v := getattr(rank, name)) is not None), default=None)


def _odd(place: str, names: set[str]) -> list[Finding]:
    if not names:
        return []
    what = ", ".join(plain(name, 60) for name in sorted(names)[:4])
    return [Finding(place, "values not usable", f"Left out, as they cannot be used: {what}.")]


def _last_word(failed: Path) -> str | None:
    """What the first failed rank of the last attempt says, as its record does."""
    attempts = [p for p in failed.iterdir() if p.is_dir() and re.fullmatch("[0-9]+", p.name)]
    for attempt in sorted(attempts, key=lambda p: -int(p.name[:9])):
        words = [Fields(_object(path, [])) for path in sorted(attempt.glob("*.json"))[:100]]
        own = [f for f in words if f.word("type") and f.content.get("blamed") is None]
        for f in own or words:
            return f"rank {f.count('rank')}: {f.word('type')}: {f.word('message')}"
    return None


def _conflict(run: Run, totals: Mapping[str, Any]) -> list[Finding]:
    """The summary is made of the records, so they agree unless one was changed."""
    rows = Fields(totals).count("rows")
    if rows is None or run.rows is None or rows == run.rows:
        return []
    text = f"summary.json counts {rows:,} rows, the records {run.rows:,}; the records' are shown."
    return [Finding(run.place, "conflict", text)]


def records(path: Path, content: Sequence[Mapping[str, Any]]) -> Read:
    """Read records of ranks whose run's folder is not here."""
    run, odd = _run(path.parent, content, Fields({}), Fields({}))
    run = replace(run, place=plain(path))
    run, found = checks.ours(run, sum(f.count("rows_excluded") or 0 for f in map(Fields, content)))
    return Read([run], [*odd, *found])


def summary(path: Path, content: Mapping[str, Any]) -> Read:
    """Read a summary.json that stands alone: the sums are known, the ranks are not."""
    run, found = _run(path.parent, [], Fields({}), Fields(content))
    text = "Only summary.json is here: ranks, and the time of the whole run, are not known."
    run = replace(run, place=plain(path), bits=None, world_size=Fields(content).count("world_size"))
    return Read([run], [*found, Finding(run.place, "records missing", text)])


def infer_report(place: str, content: Mapping[str, Any], total_s: float | None = None) -> Read:
    """Read what `cosmic infer --json` writes; ``total_s`` is of its process, if known."""
    f = Fields(content)
    seconds, memory, numbers = f.inner("seconds"), f.inner("memory_mb"), f.inner("metrics")
    loop, rate = seconds.amount("inference"), f.amount("bits_per_second")
    rank = Rank(
        rank=0,
        rows=f.count("rows"),
        batches=f.count("batches"),
        bits=float(round(loop * rate)) if loop is not None and rate is not None else None,
        load_s=seconds.amount("load"),
        inference_s=loop,
        cpu_s=seconds.amount("cpu"),
        rows_per_s=f.amount("rows_per_second"),
        bits_per_s=rate,
        peak_memory_mb=memory.amount("peak"),
        data=f.words("data"),
    )
    run = Run(
        place=place,
        source="cosmic infer",
        name=Path(place).stem,
        data=short_data(f.word("data")),
        world_size=1,
        batch_size=f.count("batch_size"),
        engine=f.word("engine"),
        precision=f.word("precision"),
        ranks=(rank,),
        rows=rank.rows,
        bits=rank.bits,
        total_s=total_s,
        inference_s=loop,
        metrics={name: numbers.number(name) for name in METRICS},
        environment=f.inner("environment").content,
    )
    odd = {name for each in (f, seconds, memory, numbers) for name in each.odd}
    _, found = checks.ours(run, f.count("rows_excluded") or 0)
    return Read([run], [*_odd(place, odd), *found])


# -- a sweep --------------------------------------------------------------------------------------


def sweep(folder: Path) -> Read:
    """Read the folder of a `cosmic sweep` or `cosmic infer --batch-sizes`: docs/sweep.md."""
    told: list[Finding] = []
    manifest = Fields(_object(folder / "sweep.json", told))
    runs: list[Run] = []
    for path in sorted((folder / "runs").glob("*.json")):
        record = _object(path, told)
        if record:
            run, found = _attempt(path, Fields(record), manifest)
            runs.append(run)
            told += found
    return Read(runs, [*told, *_left_to_do(folder, manifest, runs), *_failures(folder, runs)])


def _attempt(path: Path, f: Fields, manifest: Fields) -> tuple[Run, list[Finding]]:
    report = f.content.get("report")
    failed = f.word("status") != "ok"
    folder = path.with_suffix("")
    beside = run_folder(folder) if folder.is_dir() and not folder.is_symlink() else None
    if isinstance(report, Mapping) and not failed:
        read = infer_report(plain(path), report, f.amount("seconds"))
    elif beside and beside.runs:
        read = beside
    else:
        one = manifest.word("kind") == "infer"
        source: Source = "cosmic infer" if one else "cosmic run"
        text = "The record says that it went well, but the run's own files are not here."
        lost = [] if failed else [Finding(plain(path), "records missing", text)]
        found = [*(beside.findings if beside else []), *lost]
        read = Read([Run(place=plain(path), source=source, name="", data="unknown")], found)
    run = _as_planned(read.runs[0], path, f, manifest)
    if failed:
        error = f.inner("error")
        words = (f"{error.word(name)}" for name in ("who", "type", "message") if error.word(name))
        return replace(run, status="failed", error=": ".join(words) or "unknown"), []
    return run, read.findings


def _as_planned(run: Run, path: Path, f: Fields, manifest: Fields) -> Run:
    """The record names what was asked for, also of a run that came to no end."""
    environment = run.environment or manifest.inner("environment").content
    return replace(
        run,
        name=f.word("key") or plain(path.stem),
        on=f.word("on") or run.on,
        data=short_data(f.word("data")) if f.word("data") else run.data,
        world_size=f.count("world_size") or run.world_size,
        batch_size=f.count("batch_size") or run.batch_size,
        repeat=f.count("repeat") or 1,
        engine=run.engine or f.word("engine"),
        precision=run.precision or f.word("precision"),
        total_s=run.total_s if run.total_s is not None else f.amount("seconds"),
        environment=environment,
    )


def _left_to_do(folder: Path, manifest: Fields, runs: Sequence[Run]) -> list[Finding]:
    plan = manifest.inner("plan")
    lists = [plan.content.get(name) for name in ("world_sizes", "batch_sizes", "data_sizes")]
    sizes = [len(each) for each in lists if isinstance(each, list) and each]
    if len(sizes) < 2 - (manifest.word("kind") == "infer"):
        return []
    planned = (plan.count("repeat") or 1) * _product(sizes)
    if planned <= len(runs):
        return []
    text = f"{len(runs)} of {planned} runs are done: the sweep has not come to its end."
    return [Finding(plain(folder), "runs missing", text)]


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def _failures(folder: Path, runs: Sequence[Run]) -> list[Finding]:
    failed = [run for run in runs if run.status == "failed"]
    if not failed:
        return []
    named = "; ".join(f"{run.name}: {run.error}" for run in failed[:3])
    more = "; …" if len(failed) > 3 else ""
    text = f"{len(failed)} of {len(runs)} runs failed, and are in no median: {named}{more}"
    return [Finding(plain(folder), "runs failed", plain(text, 600))]
