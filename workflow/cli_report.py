"""The command line of reports: ``cosmic report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workflow.cli_base import AsJson, fail, wrong

if TYPE_CHECKING:
    from workflow.progress import View
    from workflow.results import Results

__all__ = ["EXAMPLES", "report"]

EXAMPLES = """\b
Examples:
  cosmic report results/night                          a sweep, or a run
  cosmic report results/a results/b --out compared
  cosmic report AI-for-Astronomy/aws --out original    the original's files
  cosmic report results/a --trace trace.json           for ui.perfetto.dev

\b
Exit code: 0 done, 1 it failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""


def report(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Folders or files of results.")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the report  [default: report in the folder that PATH names, or that "
            "its file is in; with several PATHs: ./report]",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Title of the page.")] = None,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run to draw in detail and to trace  [default: median run of the largest world]",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write that run's trace, for Perfetto or Chrome."),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prices of AWS, TOML  [default: the package's]"),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="MB",
            min=128,
            max=10_240,
            help="Size of the functions, for the cost  [default: by what the runs used]",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a page, pictures and tables of what was measured.

    Reads what cosmic sweep, run and infer have written, and the result files
    of the original project. The page (report.html) is one file that needs no
    network. Beside it: report.md, results.csv (every run), configurations.csv
    and plots/*.png.
    """
    _check(paths, prices)
    from lambda_worker.storage import StorageError
    from workflow.cost import PricesError, load_prices
    from workflow.progress import open_view
    from workflow.report import write

    try:
        with open_view() as view:
            results = _read(paths, view)
            traced = _trace(results, run, trace) if trace else []
            known = load_prices(str(prices)) if prices else None
            folder = out or _beside(paths)
            made = write(
                results,
                folder,
                title,
                view.step,
                origin=paths,
                run=run,
                prices=known,
                memory_mb=memory,
            )
    except (PricesError, StorageError, ValueError, OSError) as error:
        fail(error, as_json)
    written = [*made.paths, *traced]
    if as_json:
        found = [finding._asdict() for finding in results.findings]
        print(json.dumps({"report": made.paths[0], "written": written, "findings": found}))
        return
    _show(results, written)


def _check(paths: list[str], prices: Path | None) -> None:
    """Refuse what is not there before anything is read."""
    for path in paths:
        if "://" not in path and not Path(path).exists():
            raise wrong("PATH", f"{path} does not exist; name a folder or a file of results")
    if prices is not None and not prices.is_file():
        raise wrong("--prices", f"{prices}: no such file; leave it out for the package's prices")


def _read(paths: list[str], view: View) -> Results:
    from workflow.results import read

    view.step(f"reading {', '.join(paths)}")
    results = read(paths)
    folders = any(Path(path).is_dir() for path in paths)  # whose findings may be worth a page
    if not (results.runs or results.tabled or (folders and results.findings)):
        why = f" ({results.findings[0].text.removesuffix('.')})" if results.findings else ""
        raise ValueError(
            f"there are no results in {', '.join(paths)}{why}; name what cosmic sweep, run or "
            "infer has written, or the original project's records"
        )
    return results


def _beside(paths: list[str]) -> str:
    """Where the report goes by itself."""
    if len(paths) > 1:
        return "report"
    place = paths[0].rstrip("/")
    if Path(place).is_file():
        place = place.rpartition("/")[0] or "."
    return f"{place}/report"


def _trace(results: Results, run: str | None, path: Path) -> list[str]:
    """Write the trace of the run that the report shows in detail, and return where."""
    from lambda_worker.atomic import replacing
    from workflow.report import pick
    from workflow.trace import chrome_trace

    chosen = pick(results.runs, run)
    if chosen is None or not chosen.spans:
        whose = f"run {chosen.name} has" if chosen else "these results have"
        raise ValueError(f"no trace: {whose} no record of when each stage began")
    with replacing(path) as partial:
        partial.write_text(json.dumps(chrome_trace(chosen)))
    return [str(path)]


def _show(results: Results, written: list[str]) -> None:
    from workflow.table import short

    pictures = [path for path in written if path.endswith(".png")]
    for path in written:
        if path not in pictures:
            print(short(path))
    if pictures:
        print(f"{short(pictures[0].rpartition('/')[0])}/: {len(pictures)} pictures")
    bad = sum(run.status != "ok" for run in results.runs)
    failed = f", {bad:,} failed or incomplete" if bad else ""
    print(f"\nRuns: {len(results.runs):,}{failed}. Warnings: {len(results.findings):,}", end="")
    kinds: dict[str, int] = {}
    for finding in results.findings:
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    print(f" ({', '.join(f'{kind} {n:,}' for kind, n in kinds.items())})" if kinds else "")
