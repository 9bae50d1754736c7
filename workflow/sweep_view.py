"""The end of a sweep: a line per configuration, what its numbers mean, what failed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from workflow.configurations import summarise
from workflow.cost import load_prices, priced
from workflow.results import METRICS
from workflow.sweep import Record, Sweep, error_line
from workflow.table import print_wide, short

if TYPE_CHECKING:
    from workflow.configurations import Configuration, Spread
    from workflow.plan import Json
    from workflow.results import Results, Run

__all__ = ["End"]

_DASH = "–"  # noqa: RUF001
_COST = "USD: what it would cost on AWS in the same seconds (docs/cost.md)."
_FAILURES = 20
# Rounding differs with the shape of a batch; more than this is no rounding.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}


class _Column(NamedTuple):
    head: str
    form: str
    value: Callable[[Json], float | None]


@dataclass(frozen=True)
class End:
    """What a sweep has come to.

    Attributes:
        results: its runs as the reader sees them.
        page: path of its report, or None.
        warnings: what is to be said beside what the numbers say.
        again: the command that goes on with it.
    """

    sweep: Sweep
    results: Results
    page: str | None
    warnings: Sequence[str]
    again: str

    def show(self) -> None:
        """Print it for people, to stdout."""
        if self.sweep.manifest.kind == "infer":
            _print_infers(self._records(), self._runs)
        else:
            here = self.sweep.plan.on == "local"
            cores = self.sweep.manifest.environment.get("cores_usable") if here else None
            _print_runs(summarise(self._runs), cores)
        print(*self._all_warnings(), sep="\n", end="\n" * bool(self._all_warnings()))
        _print_failures(self.sweep, self.again)
        if remarks := [f for f in self.results.findings if f.kind != "runs failed"]:
            print(
                f"The report has {len(remarks)} remark{'s' * (len(remarks) > 1)} on these runs.\n"
            )
        for label, place in {"runs": self.sweep.folder, "report": self.page}.items():
            if place:
                print(f"{label + ':':<9}{short(str(Path(place).absolute()))}")

    def as_json(self) -> str:
        """Return it for programs, as one JSON object."""
        plain = {
            "name": self.sweep.folder.name,
            "folder": str(self.sweep.folder.absolute()),
            "report": self.page and str(Path(self.page).absolute()),
            "plan": self.sweep.plan.model_dump(mode="json"),
            "configurations": [_plain(each) for each in summarise(self._runs)],
            "runs": [record.model_dump(mode="json") for record in self._records()],
            "failed": len(self.sweep.failed),
            "findings": [finding._asdict() for finding in self.results.findings],
            "warnings": self._all_warnings(),
        }
        return json.dumps(plain)

    def _records(self) -> list[Record]:
        return [self.sweep.records[item.key] for item in self.sweep.items]

    @cached_property
    def _runs(self) -> list[Run]:
        return priced(self.results.runs, load_prices())[0]

    def _all_warnings(self) -> list[str]:
        return [*self.warnings, *_accuracy_warnings(self.results.runs)]


# -- runs of several ranks -----------------------------------------------------------------------


def _print_runs(found: Sequence[Configuration], cores: int | None) -> None:
    """Print the table of a sweep, and what its columns mean, to stdout.

    Args:
        cores: of this machine, if the runs were on it.
    """
    several = len({each.data for each in found}) > 1
    repeated = any(len(each.runs) > 1 for each in found)
    table = _table()
    heads = (
        "world",
        "batch",
        "ok",
        "infer s",
        "total s",
        "rows/s",
        "speed-\nup",
        "peak\nMB",
        "USD",
    )
    for head in ("data", *heads) if several else heads:
        table.add_column(head, justify="right", no_wrap=True)
    for each in found:
        cells = _run_cells(each, repeated)
        table.add_row(*((each.data, *cells) if several else cells))
    print_wide(Console(), table)
    print("", *_run_notes(found, repeated, cores), "", sep="\n")


def _run_cells(each: Configuration, repeated: bool) -> list[str]:
    get = each.measures.get
    return [
        _text(each.world_size, ",d"),
        _text(each.batch_size, ",d"),
        f"{each.ok}/{len(each.runs)}",
        _spread(get("inference_s"), repeated),
        _median(get("total_s"), ",.2f"),
        _median(get("rows_per_s_wall_clock"), ",.0f"),
        _text(each.speedup, ".2f"),
        _text(peak.max if (peak := get("peak_memory_mb")) else None, ",.0f"),
        _median(get("cost_usd"), ".6f"),
    ]


def _run_notes(found: Sequence[Configuration], repeated: bool, cores: int | None) -> list[str]:
    lines = [
        "infer s: inference of the slowest rank. total s: from init to the end of",
        "summarize. rows/s: wall-clock, all rows over infer s. speed-up: infer s of",
        "1 rank over this. peak MB: of the largest rank.",
    ]
    if repeated:
        lines.append("Of several runs: median (least-most) of those that are ok.")
    if any("cost_usd" in each.measures for each in found):
        lines.append(_COST if cores else "USD: what the run costs on AWS (docs/cost.md).")
    if cores:
        lines.append(
            f"All ranks share this machine's {cores} cores, and 1 rank alone has them all: this\n"
            "speed-up is not that of ranks on machines of their own, as on Lambda."
        )
    return lines


# -- runs of `cosmic infer` ----------------------------------------------------------------------

_SPEED = (
    _Column("batches", ",.0f", lambda report: report["batches"]),
    _Column("time s", ",.3f", lambda report: report["seconds"]["inference"]),
    _Column("ms/batch", ",.1f", lambda report: _thousand(report["batch_seconds"]["mean"])),
    _Column("rows/s", ",.0f", lambda report: report["rows_per_second"]),
    _Column("Mbit/s", ",.1f", lambda report: report["bits_per_second"] / 1e6),
    _Column("peak MB", ",.0f", lambda report: report["memory_mb"]["peak"]),
)
_ACCURACY = (
    _Column("R²", ".6f", lambda report: report["metrics"]["r2"]),
    _Column("MAE", ".6f", lambda report: report["metrics"]["mae"]),
    _Column("MSE", ".7f", lambda report: report["metrics"]["mse"]),
    _Column("bias", "+.6f", lambda report: report["metrics"]["bias"]),
    _Column("NMAD", ".6f", lambda report: report["metrics"]["nmad"]),
)


def _print_infers(records: Iterable[Record], runs: Iterable[Run]) -> None:
    """Print the tables of a sweep of `cosmic infer`: speed and accuracy by batch size."""
    ok = (run for run in runs if run.status == "ok")
    costs = {run.name: run.cost_usd for run in ok if run.cost_usd is not None}
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.data, record.batch_size)):
        groups.setdefault((record.data, record.batch_size), []).append(record)
    several = len({data for data, _ in groups}) > 1
    money = [("USD", lambda of_it: _cost(of_it, costs))] if costs else []
    _print_columns("Speed", groups, _SPEED, several, money)
    _print_columns("Accuracy", groups, _ACCURACY, several, [])
    print("Medians of the runs that are ok; each is a process of its own. time s: of the")
    print("inference loop. NMAD is what the original project calls precision.")
    if costs:
        print(_COST)
    print()


def _print_columns(
    title: str,
    groups: Mapping[tuple[str, int], Sequence[Record]],
    columns: Sequence[_Column],
    several: bool,
    more: Sequence[tuple[str, Callable[[Sequence[Record]], str]]],
) -> None:
    table = _table()
    heads = [*(["data"] if several else []), "batch", "ok", *(c.head for c in columns)]
    for head in [*heads, *(name for name, _ in more)]:
        table.add_column(head, justify="right", no_wrap=True)
    for (data, batch), runs in groups.items():
        reports = [run.report for run in runs if run.status == "ok" and run.report]
        cells = [f"{batch:,}", f"{len(reports)}/{len(runs)}", *_medians(columns, reports)]
        table.add_row(*([data] if several else []), *cells, *(cell(runs) for _, cell in more))
    console = Console()
    console.print(title, style="bold", highlight=False)
    print_wide(console, table)
    print()


def _medians(columns: Sequence[_Column], reports: Sequence[Json]) -> list[str]:
    cells = []
    for column in columns:
        values = [v for report in reports if (v := column.value(report)) is not None]
        cells.append(_text(statistics.median(values) if values else None, column.form))
    return cells


def _cost(records: Sequence[Record], costs: Mapping[str, float]) -> str:
    known = [costs[record.key] for record in records if record.key in costs]
    return _text(statistics.median(known) if known else None, ".6f")


# -- what people must not miss -------------------------------------------------------------------


def _accuracy_warnings(runs: Iterable[Run]) -> list[str]:
    """Warn where the accuracy depends on the configuration: it must not, except for rounding."""
    groups: dict[tuple[str, str], list[Mapping[str, float | None]]] = {}
    for run in runs:
        groups.setdefault((run.data, run.precision or ""), []).append(run.metrics)
    lines = []
    for (data, precision), several in groups.items():
        for name in METRICS:
            values = [v for each in several if (v := each.get(name)) is not None]
            limit = _TOLERANCE.get(precision, max(_TOLERANCE.values()))
            if values and max(values) - min(values) > limit:
                lines.append(
                    f"Warning: {name} on {data} is {min(values):.6f} to {max(values):.6f}: the "
                    "same data and model gave\ndifferent predictions; look for changed data, or a "
                    "machine that computes wrongly."
                )
    return lines


def _print_failures(sweep: Sweep, again: str) -> None:
    """Print a table of the runs that failed, and how to do them again."""
    if failed := sweep.failed:
        runs = "run" if len(sweep.items) == 1 else "runs"
        print(f"{len(failed):,} of {len(sweep.items):,} {runs} failed:")
        table = Table(box=None, padding=(0, 2, 0, 2), pad_edge=True, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for record in failed[:_FAILURES]:
            table.add_row(record.key, Text(error_line(record)))
        Console(highlight=False).print(table)
        if (more := len(failed) - _FAILURES) > 0:
            print(f"  and {more:,} more; see runs/*.json")
        print(f"Do them again: {again}\n")


def _table() -> Table:
    return Table(box=box.SIMPLE, padding=0, show_edge=False)


def _thousand(value: float | None) -> float | None:
    return None if value is None else value * 1000


def _text(value: float | None, form: str) -> str:
    return _DASH if value is None else f"{value:{form}}"


def _median(spread: Spread | None, form: str) -> str:
    return _text(spread.median if spread else None, form)


def _spread(spread: Spread | None, repeated: bool) -> str:
    if spread is None or not repeated:
        return _median(spread, ",.2f")
    return f"{spread.median:,.2f} ({spread.min:,.2f}-{spread.max:,.2f})"


def _plain(each: Configuration) -> Json:
    """A configuration for programs; `runs` counts them."""
    names = ("on", "data", "world_size", "batch_size", "engine", "precision", "ok", "failed")
    measures = {name: spread._asdict() for name, spread in each.measures.items()}
    cost = measures.pop("cost_usd", None)
    return {
        **{name: getattr(each, name) for name in names},
        "runs": len(each.runs),
        "measures": measures,
        "speedup": each.speedup,
        "efficiency": each.efficiency,
        "cost_usd": cost and cost["median"],
    }
