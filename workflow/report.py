"""The report of what was measured: one page that needs nothing else, and its pictures and tables.

Names, errors and numbers may come from strangers: the page escapes all text, and its policy lets
nothing run or load but what is written here.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lambda_worker import storage
from lambda_worker.versions import installed
from workflow import report_page
from workflow.configurations import COLUMNS, MEASURES, Configuration, Value, row, summarise
from workflow.cost import load_prices, priced
from workflow.published import published
from workflow.report_details import choose
from workflow.report_figures import sections
from workflow.report_headlines import headlines
from workflow.report_parts import Drawing, Section
from workflow.table import short

if TYPE_CHECKING:
    from jinja2 import Environment

    from workflow.cost import Prices
    from workflow.results import Results, Run

__all__ = ["NoSuchRun", "Report", "write"]

# What an earlier report may have left in plots/, and would be taken for this one's.
_OURS = re.compile(
    r"(throughput|time|memory)-(world-\d|batch-\d|data)|(speedup|efficiency|cost)-\d"
    r"|stages|timeline|redshift"
)


class NoSuchRun(ValueError):
    """A run was asked for that is not among the results."""


@dataclass(frozen=True)
class Report:
    """What was written: URLs, the page first; and how many findings are on it."""

    folder: str
    paths: tuple[str, ...]
    findings: int


def write(
    results: Results,
    folder: str,
    title: str | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    origin: Sequence[str] = (),
    run: str | None = None,
    prices: Prices | None = None,
    memory_mb: int | None = None,
) -> Report:
    """Write report.html, report.md, results.csv, configurations.csv and plots/*.png.

    Args:
        folder: URL of the folder; it is made, and files of an earlier report are replaced.
        title: of the page; None: after where the results are from.
        progress: told in a few words what is being done.
        origin: where the results were read from; default: the folder that all have in common.
        run: name of the run to draw in detail; None: the median one of the largest world.
        prices: of AWS; None: those that come with the package.
        memory_mb: configured size of the functions, for the costs; None: as `cost.of_run` has it.

    Raises:
        NoSuchRun: there is none of this name.
        StorageError, OSError: a file cannot be written.
        PricesError: the prices cannot be read.
    """
    step = progress or (lambda text: None)
    runs, assumed = priced(results.runs, prices or load_prices(), memory_mb)
    results = replace(results, runs=tuple(runs))
    configurations = summarise(runs)
    drawn = sections(configurations, pick(runs, run), step)
    places = [short(p) for p in origin or [common(runs)]]
    page = _page(results, configurations, assumed, places, title)
    step("report: page and tables")
    drawings = [drawing for section in drawn for drawing in section.drawings]
    files: dict[str, bytes] = {
        "report.html": _html(page, drawn),
        "report.md": _markdown(page, drawn),
        "results.csv": _csv(COLUMNS, map(row, runs)),
        "configurations.csv": _configurations_csv(configurations),
        **{f"plots/{drawing.name}.png": drawing.picture.png for drawing in drawings},
    }
    for name, content in reversed(files.items()):  # the page last: it says that the rest is there
        storage.write(f"{folder}/{name}", content)
    _remove_old(folder, {drawing.name for drawing in drawings})
    return Report(folder, tuple(f"{folder}/{name}" for name in files), len(results.findings))


def pick(runs: Sequence[Run], name: str | None) -> Run | None:
    """Return the run of this name, or without a name the one that `choose` finds.

    Raises:
        NoSuchRun: there is none; the text names some that there are.
    """
    if name is None:
        return choose(runs)
    found = [run for run in runs if run.name == name]
    if found:
        return found[0]
    names = ", ".join(run.name for run in runs[:5]) + (", ..." if len(runs) > 5 else "")
    raise NoSuchRun(f"no run is called {name}; there is {names or 'none at all'}")


def common(runs: Sequence[Run]) -> str:
    """Return the folder that all runs were read from, as far as there is one."""
    places = [run.place.split("/") for run in runs]
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*places, strict=False))
    return "/".join(parts[0] for parts in alike) or "several places"


def _remove_old(folder: str, names: set[str]) -> None:
    for name in storage.names(f"{folder}/plots") if names else ():
        stem = name.removesuffix(".png")
        if stem not in names and _OURS.fullmatch(stem) and name != stem:
            storage.remove(f"{folder}/plots/{name}")


# -- page ---------------------------------------------------------------------------------------


def _page(
    results: Results,
    configurations: Sequence[Configuration],
    assumed: Sequence[str],
    places: Sequence[str],
    title: str | None,
) -> dict[str, Any]:
    runs = results.runs
    shown, more = report_page.failures(runs)
    return {
        "title": title or f"Report of {os.path.basename(places[0].rstrip('/')) or 'results'}",
        "counts": _counts(runs, configurations),
        "version": installed("cosmic-fmi") or "(not installed)",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "origin": places,
        "findings": report_page.findings(results.findings),
        "headlines": headlines(configurations),
        "published": report_page.published_table(published(runs, results.tabled)),
        "tables": [
            report_page.configuration_table(configurations),
            report_page.run_table(runs),
        ],
        "failures": shown,
        "more_failures": more,
        "environments": report_page.environments(runs),
        "terms": report_page.terms(assumed),
    }


def _counts(runs: Sequence[Run], configurations: Sequence[Configuration]) -> str:
    bad = sum(run.status != "ok" for run in runs)
    said = f", {bad:,} of them failed or incomplete" if bad else ""
    return f"{_many(len(runs), 'run')} of {_many(len(configurations), 'configuration')}{said}."


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _html(page: Mapping[str, Any], drawn: Sequence[Section]) -> bytes:
    from markupsafe import Markup

    jinja = _jinja(escape=True)
    assert jinja.loader is not None
    style, script = (
        jinja.loader.get_source(jinja, name)[0] for name in ("report.css", "report.js")
    )
    found = [_section(section, _inline) for section in drawn]
    contents = [
        ("warnings", "Warnings"),
        ("headline", "Headline figures"),
        *([("published", page["published"].title)] if page["published"] else ()),
        *((s["id"], s["title"]) for s in found if s["figures"]),
        *((f"{table.id}-section", table.title) for table in page["tables"]),
        ("failures", "Failures"),
        ("environment", "Environment"),
        ("reading", "How to read the numbers"),
    ]
    text = jinja.get_template("report.html.j2").render(
        page={**page, "sections": found, "contents": contents},
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return text.encode(errors="replace")


def _markdown(page: Mapping[str, Any], drawn: Sequence[Section]) -> bytes:
    found = [_section(section, lambda drawing: "") for section in drawn]
    template = _jinja(escape=False).get_template("report.md.j2")
    return template.render(page={**page, "sections": found}).encode(errors="replace")


def _jinja(escape: bool) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("workflow"),
        autoescape=escape,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    made.filters["md"] = _plain_markdown
    return made


def _plain_markdown(text: object) -> str:
    """Text that Markdown takes as it is: no markup, no HTML, one line."""
    line = " ".join(str(text).split())
    escaped = re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _section(section: Section, source: Callable[[Drawing], str]) -> dict[str, Any]:
    figures = [
        {
            "title": drawing.title,
            "alt": drawing.alt,
            "caption": drawing.caption,
            "tall": drawing.tall,
            "width": drawing.picture.width,
            "height": drawing.picture.height,
            "file": f"plots/{drawing.name}.png",
            "source": source(drawing),
        }
        for drawing in section.drawings
    ]
    return {**vars(section), "figures": figures}


def _inline(drawing: Drawing) -> str:
    """A picture as data: in an <img>, where SVG can neither run nor load anything."""
    picture = drawing.picture
    kind, content = ("svg+xml", picture.svg) if picture.svg else ("png", picture.png)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# -- tables -------------------------------------------------------------------------------------


_KEYS = (
    *("source", "on", "data", "world_size", "batch_size", "engine", "precision"),
    *("ok", "failed", "incomplete", "speedup", "efficiency", "total_speedup"),
)


def _configurations_csv(configurations: Iterable[Configuration]) -> bytes:
    """Each measure has three columns: its median under its own name, then _min and _max."""
    names = [*_KEYS, *(f"{name}{end}" for name in MEASURES for end in ("", "_min", "_max"))]
    return _csv(names, map(_configuration, configurations))


def _configuration(c: Configuration) -> dict[str, Value]:
    line: dict[str, Value] = {name: getattr(c, name) for name in _KEYS}
    for name, spread in c.measures.items():
        line |= {name: spread.median, f"{name}_min": spread.min, f"{name}_max": spread.max}
    return line


def _csv(names: Sequence[str], lines: Iterable[Mapping[str, Value]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _safe(value) for name, value in line.items()} for line in lines)
    return text.getvalue().encode(errors="replace")


def _safe(value: Value) -> Value:
    """A stranger's text is no formula to the spreadsheet that opens the file."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value
