"""The original's tables: durations by Step Functions' log, and what it has calculated from records.

Tables say nothing of ranks. A run gets its wall-clock times from them if the result path that its
records name has a row; what is calculated is compared, and never used.
"""

from __future__ import annotations

import ast
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from workflow.results import Finding, Run, Tabled
from workflow.results_checks import trimmed_mean
from workflow.results_files import Fields, plain, table, text
from workflow.results_original import Original, gigabytes

__all__ = ["Key", "Tables", "key"]

_HALF = 0.0051  # of the last printed digit, and how floats are rounded
_SHOWN = 3
# Tables of that repository that are of other machines, or written by hand.
# Of a function's log: an event of some hundred bytes, of each of 10,000 ranks, for several runs.
_EVENT = re.compile(r"received:\s+(\{.{1,4000}\})\s*$")
_LONGEST = 5000
_MOST_EVENTS = 100_000
_MOST_TABLED = 1000
_OURS = {"results.csv", "configurations.csv"}
_OTHER = {"Processor", "job_id"}


class Key(NamedTuple):
    """A run of the original in its tables: ``size`` is in GB, or a word such as "timing"."""

    partition_mb: float
    size: str
    run: int
    batch_size: int
    varied: bool


class Timing(NamedTuple):
    """A row of state_machine_logs.csv: seconds of the whole execution, and of the Map state."""

    place: str
    total_s: float | None
    inference_s: float | None


def key(found: Original) -> Key | None:
    """Return where the tables have this run: by the path that its records name, if they do."""
    place = found.written if found.named else found.place
    batch = found.run.batch_size
    if place is None or place.run is None or batch is None:
        return None
    return Key(place.partition_mb, _size(place.size), place.run, batch, place.varied)


def _size(word: str) -> str:
    """12.6 for "total", but "timing" stays: these are executions of their own."""
    gb = None if word == "timing" else gigabytes(word)
    return word if gb is None else f"{gb:g}"


@dataclass
class Tables:
    """All tables of a tree, and the findings of reading them."""

    log: dict[Key, Timing] = field(default_factory=dict)
    totals: dict[Key, Timing] = field(default_factory=dict)
    worlds: dict[str, int] = field(default_factory=dict)  # by result path
    calculated: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    # -- reading ----------------------------------------------------------------------------------

    def add(self, path: Path) -> bool:
        """Read a CSV file; False if it is of no known form.

        Raises:
            Unreadable: see `results_files.table`.
        """
        # "data (GB)" in one table is "data(GB)" in another.
        rows = [
            {re.sub(r"\s*\(", " (", name): value for name, value in row.items()}
            for row in table(path)
        ]
        head = set(rows[0]) if rows else set()
        if path.name in _OURS and {"world_size", "batch_size"} <= head:
            return True  # of a report, which is made of the files themselves
        if head & _OTHER or ("result_stats" in path.name and "total_bits" not in head):
            why = "A table of other machines, or made by hand: known, and not used."
            self.findings.append(Finding(plain(path), "not used", why))
        elif "inference_duration (s)" in head and "total_bits" not in head:
            self._add_log(plain(path), rows)
        elif "duration" in head and "partition (MB)" in head:
            self._add_totals(plain(path), rows)
        elif "total_bits" in head:
            adjusted = "inference_duration (s)" in head
            self.calculated += [] if adjusted else [(plain(path), row) for row in rows]
        else:
            return not rows
        return True

    def _add_log(self, place: str, rows: Sequence[Mapping[str, str]]) -> None:
        other = 0
        for row in rows:
            found = _row_key(row)
            f = Fields(row)
            timing = Timing(
                place, f.amount("total_duration (s)"), f.amount("inference_duration (s)")
            )
            if found and self.log.setdefault(found, timing)[1:] != timing[1:]:
                other += 1
        if other:
            text = f"{other} rows differ from those of the same runs in another log: not used."
            self.findings.append(Finding(place, "conflict", text))

    def _add_totals(self, place: str, rows: Sequence[Mapping[str, str]]) -> None:
        for row in rows:
            found = _row_key(row)
            if found:
                self.totals.setdefault(found, Timing(place, _clock(row.get("duration", "")), None))

    def add_log_text(self, path: Path) -> bool:
        """Read a function's log for the world sizes that invocations tell; False: it has none.

        Raises:
            Unreadable: see `results_files.text`.
        """
        seen = False
        events = 0
        for line in io.StringIO(text(path)):
            found = _EVENT.search(line) if len(line) < _LONGEST else None
            events += found is not None
            event = _event(found[1]) if found and events <= _MOST_EVENTS else None
            seen = seen or event is not None or "REPORT RequestId:" in line
            size = Fields(event).count("WORLD_SIZE") if event else None
            result = event.get("RESULT_PATH") if event else None
            if size and isinstance(result, str):
                self.worlds[plain(result)] = size
        return seen

    # -- using ------------------------------------------------------------------------------------

    def timed(self, originals: Sequence[Original]) -> list[Run]:
        """Return the runs with the wall-clock times that the log tells of them.

        Where several files name the same path, an execution was repeated there, and its row may be
        of any of them: none gets it. Without a row in the log, the table of durations is taken.
        """
        keys = Counter(map(key, originals))
        runs, shared, rough = [], [], []
        for each in originals:
            run, k = each.run, key(each)
            timing = (self.log.get(k) or self.totals.get(k)) if k else None
            if timing is None:
                runs.append(run)
            elif keys[k] > 1:
                shared.append(run)
                runs.append(run)
            else:
                rough += [] if k in self.log else [run]
                runs.append(replace(run, total_s=timing.total_s, inference_s=timing.inference_s))
        self._tell(shared, rough)
        return runs

    def _tell(self, shared: Sequence[Run], rough: Sequence[Run]) -> None:
        if shared:
            text = (
                f"{len(shared)} files share their result path with another one ({shared[0].name}, "
                "…): each is an execution of its own, the tables have one row for each path, and "
                "which of them it timed is not known. So no time is shown."
            )
            self.findings.append(Finding(shared[0].place, "time not known", text))
        if rough:
            place = next(iter(self.totals.values())).place
            text = (
                f"total_s of {len(rough)} runs is from this table, for want of a log. In the "
                "original's repository some of its rows differ from the log, as if they were of an "
                "earlier execution."
            )
            self.findings.append(Finding(place, "time of a table", text))

    def tabled(self, originals: Sequence[Original]) -> list[Tabled]:
        """Return the scaling runs that `calculated` has and that have no records here."""
        there = {_place_key(each) for each in originals}
        found: dict[Key, Tabled] = {}
        for place, row in self.calculated:
            k = None if "batch_size" in row else _row_key(row)
            if len(found) == _MOST_TABLED:
                break
            if k is None or k in there or not (gb := Fields({"": k.size}).amount("")):
                continue
            timing = self.log.get(k) or self.totals.get(k) or Timing(place, None, None)
            f = Fields(row)
            mine = Tabled(
                place,
                k.partition_mb,
                gb,
                k.run,
                cpu_s=f.amount("total_cpu_time (seconds)"),
                bits=f.amount("total_bits"),
                bits_per_s_sum_of_ranks=f.amount("throughput_bps"),
                total_s=timing.total_s,
                inference_s=timing.inference_s,
            )
            found.setdefault(k, mine)
        return list(found.values())

    def compare(self, originals: Sequence[Original]) -> list[Finding]:
        """Compare the tables with the records, and with each other."""
        return [*self.findings, *self._durations(), *self._calculated(originals)]

    def _durations(self) -> list[Finding]:
        """Two tables of durations; ours are the log's, from which the other was made once."""
        both = [
            (k, self.totals[k].total_s, self.log[k].total_s) for k in self.totals if k in self.log
        ]
        other = [
            (k, a, b) for k, a, b in both if a is not None and b is not None and not _same(a, b)
        ]
        if not other:
            return []
        other.sort(key=lambda each: -abs(each[1] - each[2]))
        named = "; ".join(
            f"{k.partition_mb:g} MB, {k.size} GB, run {k.run}: {a:.2f} s, log {b:.2f} s"
            for k, a, b in other[:_SHOWN]
        )
        place = next(iter(self.totals.values())).place
        text = (
            f"{len(other)} of {len(both)} durations differ from those in the state machine's log, "
            f"which are used: {named}."
        )
        return [Finding(place, "conflict", text)]

    def _calculated(self, originals: Sequence[Original]) -> list[Finding]:
        by_key = {k: each.run for each in originals if (k := _place_key(each))}
        groups: dict[str, list[str]] = {}
        checked: dict[str, int] = {}
        for place, row in self.calculated:
            k = _row_key(row, varied="batch_size" in row)
            if k and k in by_key:
                checked[place] = checked.get(place, 0) + 1
                if differing := _differing(row, by_key[k]):
                    groups.setdefault(place, []).append(f"{by_key[k].name}: {differing}")
        found = []
        for place, names in groups.items():
            named = "; ".join(names[:_SHOWN]) + ("; …" if len(names) > _SHOWN else "")
            text = (
                f"{len(names)} of {checked[place]} rows differ from what their records give, "
                f"which is used: {named}."
            )
            found.append(Finding(place, "conflict", text))
        return found


def _place_key(each: Original) -> Key | None:
    """Calculated tables go by the place of a file, as the original's stats.py does."""
    place = each.place
    if place is None or place.run is None or place.kind:
        return None
    size = _size("total" if place.size == "timing" else place.size)
    batch = place.batch_size or 512
    return Key(place.partition_mb, size, place.run, batch, place.varied)


def _row_key(row: Mapping[str, str], varied: bool = False) -> Key | None:
    f = Fields({name: value.removesuffix("MB") for name, value in row.items()})
    # stats.py varies the batch size on 1 GB in partitions of 25 MB only.
    partition = f.amount("partition (MB)") or (25.0 if varied else None)
    run, batch = f.count("run"), f.count("batch_size") or 512
    size = row.get("data (GB)") or ("1GB" if varied else "")
    if partition is None or run is None or not size:
        return None
    varied = varied or row.get("batch_varying", "").lower() == "true"
    return Key(partition, _size(size), run, batch, varied)


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 2 * _HALF


def _clock(text: str) -> float | None:
    """Seconds of "00:26.642" or "0:05:26"."""
    found = re.fullmatch(r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2}(?:\.\d{1,6})?)", text)
    if not found:
        return None
    return int(found[1] or 0) * 3600 + int(found[2]) * 60 + float(found[3])


def _event(text: str) -> Mapping[str, object] | None:
    """The event of a log line, which is Python's print of a dictionary."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for whoever wrote the text as a program
            found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _differing(row: Mapping[str, str], run: Run) -> str | None:
    """Name the first value of a row that is not, to its printed digits, what the records give."""
    f = Fields(row)
    cpu = [rank.cpu_s for rank in run.ranks if rank.cpu_s is not None]
    rates = [rank.bits_per_s for rank in run.ranks if rank.bits_per_s is not None]
    ours: Iterable[tuple[str, float | None]] = (
        ("total_cpu_time (seconds)", trimmed_mean(cpu)),
        ("throughput_bps", math.fsum(rates)),
        ("total_bits", run.bits),
    )
    for name, value in ours:
        printed = f.number(name)
        if printed is None or value is None:
            continue
        if not math.isclose(printed, value, rel_tol=1e-12, abs_tol=_HALF):
            return f"{name} {printed:,.2f}, records {value:,.2f}"
    return None
