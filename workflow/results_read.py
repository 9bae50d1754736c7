"""Find what paths hold, have each file read by whom it concerns, and read nothing twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lambda_worker import storage
from workflow import results_checks as checks
from workflow import results_original as original
from workflow import results_ours as ours
from workflow.results import Finding, Rank, Read, Results, ResultsError, Run
from workflow.results_files import Tree, Unreadable, load, plain
from workflow.results_original import CPU, ELAPSED, Original
from workflow.results_tables import Tables

__all__ = ["gather"]

# Files of the original's and of ours that are no results, known by a key.
_INPUTS = {"file_limit", "GPU Info", "model_type", "init_id"}
_SHOWN = 3


def gather(paths: Sequence[str]) -> Results:
    """Read files and folders; see `results.read`."""
    reader = _Reader()
    roots = [_root(path) for path in paths]
    for root in _outermost(roots, reader.findings):
        reader.read(root)
    return reader.finish()


def _root(path: str) -> Path:
    try:
        local = storage.local_path(path)
    except storage.StorageError as error:
        raise ResultsError(str(error)) from None
    if local is None:
        raise ResultsError(f"{path}: only files of this machine are read; download it first")
    try:
        if not local.exists():
            raise ResultsError(f"{local} does not exist")
    except OSError as error:
        raise ResultsError(f"cannot read {plain(local)}: {error.strerror}") from None
    return local


def _outermost(roots: Sequence[Path], findings: list[Finding]) -> Iterator[Path]:
    """Leave out what lies in another of them, and what is given twice."""
    real = [root.resolve() for root in roots]
    for index, root in enumerate(real):
        same = root in real[:index]
        inside = any(other != root and root.is_relative_to(other) for other in real)
        if same or inside:
            text = "It is given twice, or lies in another path that is given: read once."
            findings.append(Finding(plain(roots[index]), "given twice", text))
        else:
            yield roots[index]


@dataclass
class _Reader:
    """Collects what files hold; judges in the end, when all is known."""

    runs: list[Run] = field(default_factory=list)
    originals: list[Original] = field(default_factory=list)
    tables: Tables = field(default_factory=Tables)
    findings: list[Finding] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    done: set[Path] = field(default_factory=set)  # folders that were read as a whole

    # -- reading ----------------------------------------------------------------------------------

    def read(self, root: Path) -> None:
        tree = Tree(root)
        numbered: dict[Path, list[Path]] = {}
        # A folder's own file comes first: what lies in a sweep or a run is part of it.
        for path in sorted(tree.files(), key=lambda p: (len(p.parts), _rank_of(p), p)):
            if any(folder in self.done for folder in path.parents):
                continue
            if re.fullmatch(r"\d{1,6}\.json", path.name) and path != root:
                numbered.setdefault(path.parent, []).append(path)
            else:
                self._read_file(path, alone=path == root)
        for folder, paths in numbered.items():
            self._read_numbered(folder, paths)
        self.findings += tree.findings

    def _read_file(self, path: Path, alone: bool) -> None:
        try:
            if path.name == "sweep.json":
                self._take(path.parent, ours.sweep(path.parent))
            elif not self._known(path, alone) and (alone or path.suffix in (".json", ".csv")):
                self.unknown.append(plain(path))
        except Unreadable as error:
            self.findings.append(Finding(plain(path), "not readable", f"{error}."))

    def _known(self, path: Path, alone: bool) -> bool:
        """Read a file if its form is known; of a file that is given by itself no name is asked."""
        if path.suffix == ".csv":
            return self.tables.add(path)
        if path.suffix in (".txt", ".log"):
            if self.tables.add_log_text(path):
                return True
            with suppress(Unreadable):
                return alone and self._read_json(path, load(path))
            return False
        return self._read_json(path, load(path))

    def _read_json(self, path: Path, content: Any) -> bool:
        if isinstance(content, list):
            return self._read_list(path, content)
        if not isinstance(content, Mapping):
            return False
        if path.name in ("summary.json", "run.json") and self._run_folder(path):
            return True
        if ours.is_summary(content):
            self._add(ours.summary(path, content))
        elif ours.is_report(content):
            self._add(ours.infer_report(plain(path), content))
        elif ours.is_record(content) or CPU in content:
            return self._read_list(path, [content])
        elif "MAE" in content and "R2" in content:
            self._add(original.accuracy(path, content))
        else:
            return not _INPUTS.isdisjoint(content)
        return True

    def _read_list(self, path: Path, content: Sequence[Any]) -> bool:
        records = [each for each in content if isinstance(each, Mapping)]
        if any(map(ours.is_record, records)):
            if path.name == "combined_data.json" and self._run_folder(path):
                return True
            self._add(ours.records(path, [r for r in records if ours.is_record(r)]))
        elif any(CPU in record for record in records):
            self._add_original(path, [r for r in records if CPU in r], len(content))
        elif any(ELAPSED in record for record in records):
            self._add(original.totals(path, [r for r in records if ELAPSED in r]))
        else:
            return not content and path.name != "combined_data.json"
        return True

    def _run_folder(self, path: Path) -> bool:
        read = ours.run_folder(path.parent)
        if read is None:
            return False
        self._take(path.parent, read)
        return True

    def _add_original(self, path: Path, records: list[Any], entries: int) -> None:
        found, odd = original.combined(path, records)
        self.originals.append(found)
        self.findings += odd
        if entries > len(records):
            text = f"{entries - len(records)} of {entries} entries are no records of ranks."
            self.findings.append(Finding(plain(path), "not readable", text))

    def _read_numbered(self, folder: Path, paths: Sequence[Path]) -> None:
        """Ranks' own files, of a run that was never summarized; else the summary has them."""
        if folder in self.done or any(parent in self.done for parent in folder.parents):
            return
        whole = any(Path(each.run.place).parent == folder for each in self.originals)
        if whole:
            return
        contents = []
        for path in sorted(paths, key=lambda p: int(p.stem)):
            try:
                contents.append(load(path))
            except Unreadable as error:
                self.findings.append(Finding(plain(path), "not readable", f"{error}."))
        if any(map(ours.is_record, contents)):
            if read := ours.run_folder(folder):
                self._take(folder, read)
        elif not contents or not self._read_list(folder / "combined_data.json", contents):
            self.unknown += map(plain, paths)

    def _take(self, folder: Path, read: Read) -> None:
        self.done.add(folder)
        self._add(read)

    def _add(self, read: Read) -> None:
        self.runs += read.runs
        self.findings += read.findings

    # -- judging ----------------------------------------------------------------------------------

    def finish(self) -> Results:
        self._once()
        judged = [self._judge(each) for each in self.originals]
        runs = [*self.tables.timed(judged), *self.runs]
        self.findings += [*self.tables.compare(judged), *_other_paths(judged), *_cpu_time(runs)]
        if self.unknown:
            named = ", ".join(self.unknown[:_SHOWN]) + (", …" if len(self.unknown) > _SHOWN else "")
            text = f"Left out, as they have no form that is known: {len(self.unknown)} ({named})."
            self.findings.append(Finding(self.unknown[0], "not read", text))
        runs.sort(key=lambda run: (run.source, _natural(run.name)))
        tabled = tuple(self.tables.tabled(judged))
        return Results(tuple(runs), tuple(dict.fromkeys(self.findings)), tabled)

    def _judge(self, each: Original) -> Original:
        planned = self.tables.worlds.get(each.run.name)
        run, found = checks.original(each.run, each.place, planned)
        self.findings += found
        return replace(each, run=run)

    def _once(self) -> None:
        """Drop runs whose records were all read from another file; name those that share some."""
        seen: dict[Rank, str] = {}
        keep = {id(run) for run in self._distinct(self.runs, seen)}
        self.runs = [run for run in self.runs if id(run) in keep]
        keep = {id(run) for run in self._distinct([e.run for e in self.originals], seen)}
        self.originals = [each for each in self.originals if id(each.run) in keep]

    def _distinct(self, runs: Sequence[Run], seen: dict[Rank, str]) -> Iterator[Run]:
        for run in runs:
            timed = [r for r in run.ranks if r.cpu_s is not None or r.inference_s is not None]
            places = {seen[rank] for rank in timed if rank in seen}
            count = sum(rank in seen for rank in timed)
            if count and count == len(timed):
                text = f"The same records are in {min(places)}: read once."
                self.findings.append(Finding(run.place, "given twice", text))
                continue
            if count:
                text = f"{count} of {len(run.ranks)} records are in {min(places)} as well."
                self.findings.append(Finding(run.place, "records twice", text))
            seen.update((rank, run.place) for rank in timed)
            yield run


def _rank_of(path: Path) -> int:
    """Which file of a folder says best what the folder is."""
    order = ("sweep.json", "combined_data.json", "summary.json", "run.json")
    return order.index(path.name) if path.name in order else len(order)


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d{1,15})", name)
    return [(int(p), "") if p.isascii() and p.isdigit() else (-1, p) for p in parts]


def _other_paths(originals: Sequence[Original]) -> list[Finding]:
    """Say once where records name another place than the one they lie in."""
    other = [each for each in originals if each.place and each.named and not _here(each)]
    if not other:
        return []
    first = other[0]
    text = (
        f"The records of {len(other)} of {len(originals)} files name another result path than "
        f"the file's place, such as {first.run.name}: they were moved or renamed. The place gives "
        "the run's name here, the result path its times, where a table has them."
    )
    return [Finding(first.run.place, "moved", text)]


def _here(each: Original) -> bool:
    return bool(each.place and each.written and each.place.name == each.written.name)


def _cpu_time(runs: Sequence[Run]) -> list[Finding]:
    theirs = [run for run in runs if run.source == "original"]
    if not theirs:
        return []
    timed = sum(run.inference_s is not None for run in theirs)
    text = (
        "The original's records have CPU time by torch's profiler, not elapsed time: all "
        "operations of the main thread added up, those within others again. Rates of a rank are "
        "bits over it, and their sum is no rate that a clock has seen. Wall-clock times are the "
        f"state machine's: inference_s is known of {timed} of {len(theirs)} runs."
    )
    return [Finding(theirs[0].place, "CPU time", text)]
