"""The result of a run as a table for people: one line per rank, and the total."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

if TYPE_CHECKING:
    from workflow.plan import RunResult

__all__ = [
    "calibration_note",
    "excluded_note",
    "notes",
    "precision_note",
    "print_result",
    "print_wide",
    "rank_table",
    "short",
]

# More would push the total off the screen; combined_data.json has them all.
_SHOWN_RANKS = 32
_NO_LIMIT = 10_000
# Key in a summary's metrics: name in a record, format.
_METRICS = {
    "mae": ("MAE", ".4f"),
    "mse": ("MSE", ".5f"),
    "bias": ("bias", "+.4f"),
    "nmad": ("NMAD", ".4f"),
    "r2": ("R2", ".3f"),
}


def print_result(result: RunResult, plot: str | None) -> None:
    """Print the table of ``result``, what its rates mean, and where its files are, to stdout."""
    print_wide(Console(), rank_table(result))
    print("", *notes(result), "", sep="\n")
    for label, url in {"results": result.combined_data, "plot": plot}.items():
        if url:
            print(f"{label + ':':<9}{short(url)}")


def print_wide(console: Console, table: RenderableType) -> None:
    """Print a table whose numbers are never cut: what does not fit makes the lines longer."""
    wide = console.options.update(max_width=_NO_LIMIT)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)


def rank_table(result: RunResult) -> Table:
    """Return the table; it fits 80 columns, with each rank's own numbers and the job's."""
    table = Table(box=box.SIMPLE, padding=0, show_edge=False, show_footer=True)
    summary = result.summary
    total = _cells(
        "total",
        summary["rows"],
        summary["batches"],
        summary["inference_seconds"],
        summary["rows_per_second"]["wall_clock"],
        summary["peak_memory_mb"],
        summary["metrics"],
    )
    metrics = (name.replace("R2", "R²") for name, _ in _METRICS.values())
    heads = ("rank", "rows", "batches", "seconds", "rows/s", "peak\nMB", *metrics)
    for head, foot in zip(heads, total, strict=True):
        table.add_column(head, foot, justify="right", no_wrap=True)
    for record in result.records[:_SHOWN_RANKS]:
        table.add_row(*_rank_cells(record))
    if len(result.records) > _SHOWN_RANKS:
        table.add_row("…")
    return table


def notes(result: RunResult) -> list[str]:
    """Return what to know about the numbers: three rates are easily mistaken for one another."""
    summary = result.summary
    rates = summary["rows_per_second"]
    lines = [
        f"Total rows/s is wall-clock: all rows in the {summary['inference_seconds']:.2f} s of the "
        "slowest rank.",
        f"The ranks' own rates add up to {rates['sum_of_ranks']:,.0f} rows/s; with joining and "
        f"loading it is {rates['end_to_end']:,.0f}.",
    ]
    if summary["engine"] != "torch":
        lines.append(f"Predicted by engine {summary['engine']}.")
    lines += precision_note(summary)
    lines += _batch_note(result.records)
    if summary["rows_excluded"]:
        lines += excluded_note(summary)
    if (hidden := len(result.records) - _SHOWN_RANKS) > 0:
        lines.append(f"Ranks that are not shown here, but in combined_data.json: {hidden:,}.")
    return lines


def _batch_note(records: Sequence[Mapping[str, Any]]) -> list[str]:
    sizes = sorted({record["batch_size"] for record in records})
    if records[0]["calibration"] is None:
        return []
    if len(sizes) > 1:
        chosen = ", ".join(map(str, sizes))
        return [f"Batch size auto: {chosen}, as each rank chose for itself; see its record."]
    return calibration_note(records[0]["calibration"])


def calibration_note(calibration: Mapping[str, Any]) -> list[str]:
    """Say which batch size was chosen, and out of what."""
    rates = calibration["rows_per_second"].items()
    tried = [f"{size}: {rate:,.0f}" for size, rate in rates if rate is not None]
    return [
        f"Batch size auto: {calibration['chosen']} rows, after {calibration['seconds']:.1f} s of "
        "trials; rows/s were",
        f"  {', '.join(tried) or '(none: there are no rows)'}",
    ]


def precision_note(summary: Mapping[str, Any]) -> list[str]:
    """Say what a lower precision than fp32 costs."""
    if (off := summary["precision_max_dz"]) is None:
        return []
    twice = f"{summary['precision_rows']:,} rows predicted twice"
    precision = summary["precision"]
    return [f"Precision {precision}: z_phot is at most {off:.1e} from fp32's, on {twice}."]


def excluded_note(summary: Mapping[str, Any]) -> list[str]:
    """Warn of rows that no metric counts: how many of `rows`, and the first few by name."""
    excluded, named = summary["rows_excluded"], summary["excluded_rows"]
    lines = [
        f"Warning: no metric counts {excluded:,} of {summary['rows']:,} rows, as what stands in "
        "brackets is not",
        "finite (or z_spec not above -1); --strict makes that an error:",
        *(f"  {short(row['file'])} row {row['row']} ({row['part']})" for row in named),
    ]
    return [*lines, "  ..."] if excluded > len(named) else lines


def _rank_cells(record: Mapping[str, Any]) -> list[str]:
    return _cells(
        str(record["rank"]),
        record["rows"],
        record["num_batches"],
        record["inference_time (seconds)"],
        record["sample_persec"],
        record["peak_memory (MB)"],
        {key: record[name] for key, (name, _) in _METRICS.items()},
    )


def _cells(
    name: str,
    rows: int,
    batches: int,
    seconds: float,
    rate: float,
    memory: float,
    metrics: Mapping[str, float | None],
) -> list[str]:
    """Format one line; a metric that has no value (no rows, say) shows as a dash."""
    values = ((metrics[key], form) for key, (_, form) in _METRICS.items())
    shown = ["–" if value is None else f"{value:{form}}" for value, form in values]  # noqa: RUF001
    return [
        name,
        f"{rows:,}",
        f"{batches:,}",
        f"{seconds:.2f}",
        f"{rate:,.0f}",
        f"{memory:,.0f}",
        *shown,
    ]


def short(url: str) -> str:
    """Return a path below the current folder relative to it, anything else as it is."""
    return os.path.relpath(url) if Path(url).is_relative_to(Path.cwd()) else url
