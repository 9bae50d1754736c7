"""The report of ``cosmic infer`` for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from workflow.table import calibration_note, excluded_note, precision_note, print_wide, short

if TYPE_CHECKING:
    from workflow.infer import Json

__all__ = ["print_report"]

Line = tuple[str, ...]

_DASH = "–"  # noqa: RUF001


def print_report(report: Json) -> None:
    """Print a report, as `workflow.infer.infer` returns it, as tables on stdout."""
    profile, calibration = report["profile"], report["calibration"]
    _print("Inference", _inference(report), "lrll")
    _print("Accuracy", _accuracy(report), "lrll")
    _print("Environment", _environment(report), "ll")
    if profile:
        title = f"Profile: {profile['rows']:,} rows once more, in batches of the same size"
        _print(title, _profile(profile), "lrrr")
    notes = calibration_note(calibration) if calibration else []
    notes += precision_note(report)
    notes += excluded_note(report) if report["rows_excluded"] else []
    if notes:
        print(*notes, "", sep="\n")
    trace = profile["trace"] if profile else None
    places = {"predictions": report["predictions"], "plot": report["plot"], "trace": trace}
    for label, url in places.items():
        if url:
            print(f"{label + ':':<13}{short(url)}")


def _print(title: str, lines: Iterable[Line], columns: str) -> None:
    """Print aligned lines; `columns` says of each column whether it is aligned left or right."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for side in columns:
        table.add_column(justify="right" if side == "r" else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.print(title, style="bold", highlight=False)
    print_wide(console, Padding(table, (0, 0, 0, 2), expand=False))
    print()


def _inference(report: Json) -> Iterator[Line]:
    seconds, each = report["seconds"], report["batch_seconds"]
    excluded = report["rows_excluded"]
    yield "rows", f"{report['rows']:,}", "", f"{excluded:,} excluded" if excluded else ""
    yield "batches", f"{report['batches']:,}", "", f"of {report['batch_size']:,} rows"
    yield "total time", f"{seconds['inference']:.3f}", "s", f"loading {seconds['load']:.3f} s"
    p50, p95 = (_number(each[name], ",.1f", 1000) for name in ("p50", "p95"))
    spread = f"mean; p50 {p50}, p95 {p95}"
    yield "time per batch", _number(each["mean"], ",.1f", 1000), "ms", spread
    yield "throughput", f"{report['rows_per_second']:,.1f}", "rows/s", ""
    yield "", f"{report['bits_per_second'] / 1e6:,.2f}", "Mbit/s", "of images and magnitudes"
    yield "memory", f"{report['memory_mb']['peak']:,.1f}", "MB", "peak"
    yield "", f"{report['memory_mb']['beyond_imports']:,.1f}", "MB", "of these beyond the imports"


def _accuracy(report: Json) -> Iterator[Line]:
    values = report["metrics"]
    yield "MAE", _number(values["mae"], ".5f"), "", "mean |z_phot - z_spec|"
    yield "MSE", _number(values["mse"], ".6f"), "", "mean (z_phot - z_spec)²"
    yield (
        "bias",
        _number(values["bias"], "+.5f"),
        "",
        "mean Δz, Δz = (z_phot - z_spec)/(1 + z_spec)",
    )
    yield "NMAD", _number(values["nmad"], ".5f"), "", "precision: 1.48 median |Δz - median Δz|"
    yield "R²", _number(values["r2"], ".4f"), "", ""


def _environment(report: Json) -> Iterator[Line]:
    where = report["environment"]
    cores = f"{where['cores_usable']} of {where['cores']} cores usable"
    yield "CPU", f"{where['cpu']}, {where['architecture']}, {cores}"
    yield "RAM", f"{where['ram_gb']:.1f} GB"
    yield "system", where["platform"]
    yield "engine", f"{report['engine']}, {report['precision']}, threads: {where['threads']}"
    versions = [f"{name} {number}" for name, number in where["versions"].items() if number]
    yield "versions", ", ".join(versions[:3])
    yield "", ", ".join(versions[3:])


def _profile(profile: Json) -> Iterator[Line]:
    yield "operation", "calls", "self ms", "share"
    for each in profile["operations"]:
        own, share = f"{each['self_cpu_ms']:,.1f}", f"{each['share']:.1%}"
        yield _short_name(each["name"]), f"{each['calls']:,}", own, share


def _short_name(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:39]}…"


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return _DASH if value is None else f"{value * scale:{form}}"
