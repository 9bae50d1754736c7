"""What stands on the page of a report, as plain values that its templates need only place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from workflow.configurations import COLUMNS, Configuration, Spread, Value, row
from workflow.published import Published
from workflow.report_parts import name_of
from workflow.results import Finding, Run
from workflow.table import short

__all__ = ["Cell", "Column", "Table", "configuration_table", "environments", "failures"]
__all__ += [
    "findings",
    "number",
    "published_table",
    "run_table",
    "short",
    "terms",
]

_DASH = "–"  # noqa: RUF001
_SHOWN_FINDINGS = 50
_SHOWN_FAILURES = 200
_SHOWN_ROWS = 2_000
_GBIT = 1e-9

# How a column is headed and its unit; those that are in neither list are text.
_HEADS: dict[str, tuple[str, str]] = {
    "world_size": ("world size", "ranks"),
    "ranks_recorded": ("ranks recorded", ""),
    "partition_mb": ("partition", "MB"),
    "data_gb": ("data", "GB"),
    "batch_size": ("batch size", "rows"),
    "repeat": ("repeat", ""),
    "runs": ("runs", ""),
    "incomplete": ("of them incomplete", ""),
    "tabled": ("of them by table", ""),
    "cpu_s": ("profiler's time", "s, mean rank"),
    "ok": ("runs ok", ""),
    "failed": ("not ok", ""),
    "rows": ("rows", ""),
    "bits": ("bits", ""),
    "total_s": ("whole run", "s"),
    "init_s": ("init", "s, slowest"),
    "join_s": ("join", "s, slowest"),
    "load_s": ("load", "s, slowest"),
    "inference_s": ("inference", "s, slowest"),
    "collective_s": ("collective", "s, slowest"),
    "rank_p50_s": ("inference p50", "s, ranks"),
    "rank_p95_s": ("inference p95", "s, ranks"),
    "straggler_ratio": ("straggler ratio", "slowest ÷ median"),
    "rank_cpu_p50_s": ("CPU time p50", "s, ranks"),
    "peak_memory_mb": ("peak memory", "MB"),
    "memory_limit_mb": ("memory limit", "MB"),
    "rows_per_s_wall_clock": ("wall-clock", "rows/s"),
    "rows_per_s_sum_of_ranks": ("sum of ranks", "rows/s"),
    "bits_per_s_wall_clock": ("wall-clock", "Gbit/s"),
    "bits_per_s_sum_of_ranks": ("sum of ranks", "Gbit/s"),
    "bits_per_s_end_to_end": ("end to end", "Gbit/s"),
    "speedup": ("speed-up", "×"),  # noqa: RUF001
    "efficiency": ("efficiency", "%"),
    "mae": ("MAE", ""),
    "mse": ("MSE", ""),
    "bias": ("bias", ""),
    "nmad": ("NMAD", ""),
    "r2": ("R²", ""),
    "cost_usd": ("cost", "USD"),
}
_SCALE = {"Gbit/s": _GBIT, "%": 100.0}
_OF_CONFIGURATIONS = (
    *("total_s", "inference_s", "straggler_ratio"),
    *("rows_per_s_wall_clock", "rows_per_s_sum_of_ranks"),
    *("bits_per_s_wall_clock", "bits_per_s_sum_of_ranks"),
    *("speedup", "efficiency", "rank_cpu_p50_s", "peak_memory_mb", "nmad", "r2", "cost_usd"),
)
_MINOR = {
    *("partition_mb", "data_gb", "ranks_recorded", "bits", "rank_p50_s", "rank_p95_s"),
    *("rank_cpu_p50_s", "memory_limit_mb", "mae", "mse", "bias"),
}
_RATES = ("rows_per_s_wall_clock", "rows_per_s_sum_of_ranks")
_BITS = ("bits_per_s_wall_clock", "bits_per_s_sum_of_ranks")
_THREE_RATES = (*reversed(_BITS), "bits_per_s_end_to_end")
_NOT_OF_RUNS = {"run", "error", "place", "rank_max_s"}


class Cell(NamedTuple):
    """One cell: ``raw`` is the number itself, "" where it is unknown."""

    text: str
    raw: str = ""
    number: bool = False
    range: str = ""
    bad: bool = False


class Column(NamedTuple):
    """The head of a column; ``key`` is its name in the CSV; on paper there is no room for minor."""

    key: str
    head: str
    unit: str
    number: bool
    minor: bool = False


@dataclass
class Table:
    """A table to sort and filter; the first cell of a row names it."""

    id: str
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    hint: str = "words, or e.g. world_size=4"
    notes: list[str] = field(default_factory=list)


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Write a number for people, with so many digits that count; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return _DASH
    if isinstance(value, int):
        return f"{value:,}"
    scaled = value * _SCALE.get(unit, 1.0)
    if scaled and abs(scaled) < 1e-6 and not unit.startswith("s"):
        return f"{scaled:.3g}"
    places = digits - 1 - math.floor(math.log10(abs(scaled))) if scaled else 0
    # Of seconds, milliseconds are all that means anything.
    return f"{scaled:,.{min(max(places, 0), 3 if unit.startswith('s') else 9)}f}"


def _cell(value: Value, unit: str, spread: Spread | None = None, told: str = "") -> Cell:
    known = value if isinstance(value, int | float) else None
    span = told
    if spread is not None and spread.min != spread.max:
        between = f"{number(spread.min, unit)} to {number(spread.max, unit)}"
        span = f"{between}, {told}" if told else between
    return Cell(number(known, unit), "" if known is None else repr(known), True, span)


def _column(key: str) -> Column:
    head, unit = _HEADS.get(key, (key.replace("_", " "), ""))
    return Column(key, head, unit, key in _HEADS)


# -- tables -------------------------------------------------------------------------------------


def configuration_table(configurations: Sequence[Configuration]) -> Table:
    """Make the table of configurations: medians, with least and greatest where repeats differ."""
    rows = [_configuration(c) for c in configurations[:_SHOWN_ROWS]]
    keys = [k for k in rows[0] if any(line[k] is not None for line in rows)] if rows else []
    # The unit that a project is used to: rows/s are ours, bit/s the original's.
    theirs = (*_BITS, "rank_cpu_p50_s")
    sources = {c.source.startswith("original") for c in configurations}
    keys = [k for k in keys if (k in theirs) in sources or k not in (*theirs, *_RATES)]
    columns = [Column("configuration", "configuration", "", False), *map(_column, keys)]
    cells = [
        [
            Cell(name_of(c, configurations) or c.data),
            *(
                _cell(_middle(line[k]), _HEADS[k][1], _spread(line[k]), told.get(k, ""))
                for k in keys
            ),
        ]
        for c, line, told in zip(configurations, rows, map(_told, configurations), strict=False)
    ]
    table = Table("configurations", "Configurations", columns, cells)
    table.notes = [
        "Medians over the runs that are ok, below them least to greatest where they differ. "
        "configurations.csv has every measure.",
        *_cut(len(rows), len(configurations), "configurations.csv"),
    ]
    return table


def _configuration(c: Configuration) -> dict[str, float | Spread | None]:
    values: dict[str, float | Spread | None] = {
        "world_size": c.world_size,
        "batch_size": c.batch_size,
        "ok": c.ok,
        "failed": c.failed + c.incomplete,
    }
    single = {"speedup": c.speedup, "efficiency": c.efficiency}
    return values | {k: single.get(k, c.measures.get(k)) for k in _OF_CONFIGURATIONS}


def _told(c: Configuration) -> dict[str, str]:
    """Say which measures are of fewer runs than are ok: other runs' files do not tell them."""
    rows = [row(run) for run in c.runs if run.status == "ok"]
    counts = {k: sum(line[k] is not None for line in rows) for k in c.measures}
    return {k: f"{n} of {len(rows)} runs" for k, n in counts.items() if n < len(rows)}


def _middle(value: float | Spread | None) -> float | None:
    return value.median if isinstance(value, Spread) else value


def _spread(value: float | Spread | None) -> Spread | None:
    return value if isinstance(value, Spread) else None


def run_table(runs: Sequence[Run]) -> Table:
    """Make the table of runs; what is the same in all of them is said once, below it."""
    lines = [row(run) for run in runs]
    keys, same = [], []
    for key in (k for k in COLUMNS if k not in _NOT_OF_RUNS):
        found = {line[key] for line in lines}
        if len(found) == 1 and key not in _HEADS and len(lines) > 1 and found != {None}:
            same.append(f"{key.replace('_', ' ')} {next(iter(found))}")
        elif found != {None}:
            keys.append(key)
    columns = [Column("run", "run", "", False), *map(_column, keys)]
    minor = {*_MINOR, *(_BITS if "rows_per_s_sum_of_ranks" in keys else ())}
    columns = [column._replace(minor=column.key in minor) for column in columns]
    cells = [
        [Cell(run.name), *(_run_cell(key, line[key]) for key in keys)]
        for run, line in zip(runs[:_SHOWN_ROWS], lines, strict=False)
    ]
    table = Table("runs", "Runs", columns, cells, "words, or e.g. status=ok batch_size>=32")
    if same:
        table.notes.append(f"The same in all runs: {', '.join(same)}.")
    table.notes += _cut(len(cells), len(runs), "results.csv")
    return table


def _run_cell(key: str, value: Value) -> Cell:
    if key in _HEADS:
        return _cell(value, _HEADS[key][1])
    return Cell(_DASH if value is None else str(value), bad=value in ("failed", "incomplete"))


def _cut(shown: int, there: int, where: str) -> list[str]:
    if shown >= there:
        return []
    return [f"The first {shown:,} of {there:,} rows are shown; {where} has all."]


def published_table(found: Sequence[Published]) -> Table | None:
    """Make the table of the figures that the original has published; None if there are none."""
    if not found:
        return None
    keys = ("runs", "incomplete", "tabled", "cpu_s", *_THREE_RATES)
    rows = [[Cell(p.data), *(_exact(getattr(p, key), key) for key in keys)] for p in found]
    columns = [Column("data", "data", "", False), *map(_column, keys)]
    table = Table("published-rates", "Published figures", columns, rows, "words, or e.g. runs=3")
    table.notes = [
        "The original project publishes the sum of ranks: each rank's bits over its own time in "
        "torch's profiler, whenever that was, added up. Wall-clock divides all bits by the time of "
        "the Map state, in which all ranks start, load and work; end to end by that of the whole "
        "execution: a dash, unless each run is whole and timed.",
        "Means over the runs that are here, as published: also of incomplete ones, of which the "
        "sum is of the ranks that are there. Profiler's time: mean of the ranks without outliers. "
        "Runs by table: their records are not here, and the figures are as the original's own "
        "tables print them.",
    ]
    return table


def _exact(value: float | None, key: str) -> Cell:
    """A number with as many digits as it is published: 18.04."""
    unit = _HEADS[key][1]
    return _cell(value, unit)._replace(text=number(value, unit, digits=4 if "bit" in unit else 3))


# -- findings and failures ------------------------------------------------------------------------


def findings(found: Sequence[Finding], shown: int = _SHOWN_FINDINGS) -> list[dict[str, Any]]:
    """Group findings by kind, the rarest first: many of one kind do not bury another."""
    groups: dict[str, list[Finding]] = {}
    for finding in found:
        groups.setdefault(finding.kind, []).append(finding)
    return [
        {
            "kind": kind,
            "count": len(of_it),
            "same": len({finding.text for finding in of_it}) == 1,
            "shown": [f._replace(place=short(f.place)) for f in of_it[:shown]],
            "more": max(len(of_it) - shown, 0),
        }
        for kind, of_it in sorted(groups.items(), key=lambda item: len(item[1]))
    ]


def failures(runs: Sequence[Run]) -> tuple[list[dict[str, str]], int]:
    """Return runs that failed or are incomplete, and how many more there are than is shown."""
    bad = [run for run in runs if run.status != "ok"]
    shown = [
        {
            "name": run.name,
            "status": run.status,
            "error": run.error or _lacking(run),
            "place": short(run.place),
        }
        for run in bad[:_SHOWN_FAILURES]
    ]
    return shown, len(bad) - len(shown)


def _lacking(run: Run) -> str:
    if run.status == "failed":
        return "no error was recorded"
    planned = f"{run.world_size:,}" if run.world_size else "an unknown number of"
    return f"{len(run.ranks):,} of {planned} ranks left a record"


# -- environment and definitions ------------------------------------------------------------------


def environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the different environments, and in how many runs each was."""
    groups: list[tuple[Mapping[str, Any], int]] = []
    for run in runs:
        for i, (known, count) in enumerate(groups):
            if known == run.environment:
                groups[i] = (known, count + 1)
                break
        else:
            if run.environment:
                groups.append((run.environment, 1))
    return [
        {
            "heading": f"{count:,} of {len(runs):,} runs" if count < len(runs) else "All runs",
            "lines": list(_lines(known)),
        }
        for known, count in groups[:10]
    ]


def _lines(environment: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
        elif isinstance(value, float):
            value = number(value)
        if value is not None:
            name = key.replace("_", " ").removesuffix(" gb")
            yield name, f"{value} GB" if key.endswith("_gb") else str(value)


def terms(assumed: Sequence[str]) -> list[tuple[str, str]]:
    """Return the definitions, with what the costs assume."""
    more = f" Assumed here: {'; '.join(assumed[:6])}." if assumed else ""
    return [*_TERMS[:-1], (_TERMS[-1][0], _TERMS[-1][1] + more)]


_TERMS = (
    (
        "Wall-clock rate",
        "All rows (or bits) over the time of the inference of all ranks together: that of the "
        "slowest rank's loop; for the original project's runs, of the Map state. Unknown where "
        "nobody timed it.",
    ),
    (
        "Sum of ranks",
        "Each rank's rate by its own clock, added up. Ours are per elapsed second. The original's "
        "are per second in torch's profiler, which adds up all operations of the main thread, and "
        "those that are part of another one again. Neither falls when ranks start late or wait: "
        "it is never what somebody waited for.",
    ),
    ("Whole run", "From the start of init to the end of summarize: with loading and joining."),
    (
        "init, join, load, inference, collective",
        "Start of a rank's process to its first call; until all ranks had joined; imports, model "
        "and opening of the data; the loop that predicts; barrier and allreduce, waiting included. "
        "In the tables it is the rank that took longest for it; of the original project's runs, "
        "inference is the whole Map state, in which the functions start and load, too.",
    ),
    (
        "Straggler ratio",
        "Inference time of the slowest rank over the median rank's: 1 is balanced.",
    ),
    (
        "Speed-up, efficiency",
        "Inference time of one rank over that of W ranks, same data, batch size, engine and place; "
        "and that over W.",
    ),
    ("Peak memory", "Resident memory of the rank that took most; MB are 10⁶ bytes."),
    (
        "MAE, MSE, bias, NMAD, R²",
        "Of z_phot against z_spec, dimensionless. With Δz = (z_phot − z_spec) / (1 + z_spec): bias "  # noqa: RUF001
        "is its mean, NMAD is 1.48 · median |Δz − median Δz|.",  # noqa: RUF001
    ),
    (
        "Median, range",
        "Over the repeats of a configuration that are ok; failed runs count nowhere.",
    ),
    (
        "Cost",
        "USD at AWS's list prices, without free tiers, of the seconds that the ranks took; for "
        "runs elsewhere, what these seconds would cost there.",
    ),
)
