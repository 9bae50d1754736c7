"""Drawings of a report that look into runs: stages, the timeline of one, its predictions."""

from __future__ import annotations

import io
import math
import statistics
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence

from workflow import report_plots as plots
from workflow.configurations import Configuration
from workflow.report_parts import Drawing, Section, drawable, few, name_of
from workflow.report_plots import Axis, Bar, Picture, Track
from workflow.results import Rank, Run

__all__ = ["choose", "redshift", "split"]

# More bars or ranks than these cannot be told apart.
_BARS = 40
_RANKS = 40
_STAGES_SHOWN = 100  # a rank has some six
# Of a predictions file: more than 20 million galaxies.
_MAX_PREDICTIONS = 500_000_000

# What numpy, zipfile and storage raise of a file that is no predictions file, or not there.
_UNREADABLE = (
    *(ValueError, LookupError, EOFError, OSError, RuntimeError, TypeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
_STAGES = ("init", "join", "load", "inference", "collective")


def choose(runs: Iterable[Run]) -> Run | None:
    """Return the run to show in detail: the median one of the largest world that has spans."""
    usable = [run for run in runs if run.status == "ok" and (run.spans or run.predictions)]
    with_spans = [run for run in usable if run.spans] or usable
    largest = max((run.world_size or 0 for run in with_spans), default=0)
    of_it = [run for run in with_spans if (run.world_size or 0) == largest]
    of_it.sort(key=lambda run: (run.total_s or math.inf, run.name))
    return of_it[(len(of_it) - 1) // 2] if of_it else None


def split(
    configurations: Sequence[Configuration], chosen: Run | None, step: Callable[[str], None]
) -> Section:
    section = Section("split", "Where the time goes")
    known = [(c, parts) for c in configurations if (parts := _stages(c))]
    if known:
        step("plot: time by stage")
        shown = few(known, _BARS)
        among = [c for c, _ in known]
        rows = [Bar(name_of(c, among), parts) for c, parts in shown]
        picture = plots.bars(rows, Axis("time of a rank (s), mean over ranks and repeats"))
        text = "Means over all ranks of all repeats. Collective includes waiting for others."
        if len(shown) < len(known):
            text += f" {len(shown)} of {len(known)} configurations are shown."
        title = "Time of a rank by stage"
        section.drawings.append(
            Drawing("stages", title, _bars_alt(title, rows), text, picture, tall=True)
        )
    else:
        section.omitted.append("No plot of time by stage: the files do not tell stages' times.")
    if chosen is not None and _by_rank(chosen):
        step(f"plot: timeline of {chosen.name}")
        section.drawings.append(_timeline(chosen))
    else:
        whose = f"{chosen.name} has" if chosen else "these files have"
        section.omitted.append(f"No timeline: {whose} no record of when each stage began.")
    return section


def _stages(c: Configuration) -> dict[str, float]:
    """Mean seconds of each stage; what the ranks' wall time has beyond them is "other"."""
    ranks = [rank for run in c.runs if run.status == "ok" for rank in run.ranks]
    found = {}
    for stage in _STAGES:
        known = [v for rank in ranks if drawable(v := getattr(rank, f"{stage}_s"))]
        if known and max(known) > 0:
            found[stage] = statistics.fmean(known)
    if not found.keys() - {"inference"}:
        return {}  # a loop alone is no split
    rest = [v for rank in ranks if (v := _other(rank)) is not None and drawable(v)]
    if rest and (other := statistics.fmean(rest)) > 0:
        found["other"] = other
    return found


def _other(rank: Rank) -> float | None:
    known = [getattr(rank, f"{stage}_s") or 0.0 for stage in _STAGES if stage != "init"]
    return max(rank.wall_s - sum(known), 0.0) if rank.wall_s is not None else None


def _bars_alt(title: str, rows: Sequence[Bar]) -> str:
    said = []
    for row in rows[:20]:
        parts = ", ".join(f"{stage} {seconds:.3g} s" for stage, seconds in row.parts.items())
        said.append(f"{plots.label(row.name)}: {parts}")
    return f"{title}. " + "; ".join(said)


def _by_rank(run: Run) -> dict[int | None, list[tuple[str, float, float]]]:
    """Stages of each rank, None: the launcher, in seconds from the start of the run."""
    spans = [s for s in run.spans if drawable(s.start) and drawable(s.seconds)]
    zero = min((s.start for s in spans), default=0.0)
    found: dict[int | None, list[tuple[str, float, float]]] = {}
    for span in spans:
        stages = found.setdefault(span.rank, [])
        if len(stages) < _STAGES_SHOWN:
            stages.append((span.name, span.start - zero, span.seconds))
    return found


def _with_start(
    spans: Sequence[tuple[str, float, float]], seconds: float | None
) -> list[tuple[str, float, float]]:
    """A rank's stages, before them the start of its process, if it was a new one."""
    first = min(begin for _, begin, _ in spans)
    begun = (
        [("init", max(first - seconds, 0.0), min(seconds, first))]
        if seconds and drawable(seconds)
        else []
    )
    return [*begun, *spans]


def _timeline(run: Run) -> Drawing:
    by_rank = _by_rank(run)
    ends = {r: max(b + s for _, b, s in of_it) for r, of_it in by_rank.items() if r is not None}
    ranks = sorted(few(sorted(ends, key=lambda r: (ends[r], r)), _RANKS))
    tracks = [Track("launcher", by_rank[None])] if None in by_rank else []
    begins = {rank.rank: rank.init_s for rank in run.ranks}
    tracks += [Track(f"rank {r}", _with_start(by_rank[r], begins.get(r))) for r in ranks]
    title = f"Timeline of {plots.label(run.name, 60)}"
    text = (
        "The launcher's steps, and what each rank did when; init of a rank is the start of its "
        "process."
    )
    if len(ranks) < len(ends):
        text += f" {len(ranks)} of {len(ends):,} ranks are shown: evenly, by when they finished."
    if run.on == "aws":
        text += " Each worker has its own clock."
    last = max(ends, key=lambda r: ends[r], default=None)
    alt = f"{title}: {len(ends)} ranks"
    if last is not None:
        alt += f"; rank {last} is the last to finish, {ends[last]:.2f} s after the start"
    picture = plots.timeline(tracks, Axis("time since the start of the run (s)"))
    return Drawing("timeline", title, alt, text, picture, tall=True)


# -- predictions --------------------------------------------------------------------------------


def redshift(
    configurations: Sequence[Configuration], chosen: Run | None, step: Callable[[str], None]
) -> Section:
    section = Section("redshift", "Predicted against spectroscopic redshift")
    runs = [chosen] if chosen is not None and chosen.predictions else []
    others = [run for c in configurations for run in c.runs if run.predictions]
    runs += [run for run in (choose(others),) if run is not None and not runs]
    if not runs:
        section.omitted.append("No plot of redshifts: there are no predictions beside these files.")
        return section
    run = runs[0]
    step(f"plot: redshifts of {run.name}")
    try:
        section.drawings.append(_galaxies(run))
    except _UNREADABLE as error:
        why = plots.label(f"{type(error).__name__}: {error}", 200)
        section.omitted.append(f"No plot of redshifts: {run.predictions} cannot be read ({why}).")
    return section


def _galaxies(run: Run) -> Drawing:
    import numpy as np

    from lambda_worker import storage
    from workflow.plot import redshift_png

    content = io.BytesIO(storage.read(run.predictions or ""))
    with zipfile.ZipFile(content) as packed:
        if sum(entry.file_size for entry in packed.infolist()) > _MAX_PREDICTIONS:
            raise ValueError(f"more than {_MAX_PREDICTIONS:,} bytes")
    with np.load(content, allow_pickle=False) as rows:
        z_spec, z_phot = (np.asarray(rows[n], np.float64) for n in ("z_spec", "z_phot"))
    if z_spec.ndim != 1 or z_spec.shape != z_phot.shape:
        raise ValueError(f"z_spec {z_spec.shape} and z_phot {z_phot.shape} are not one each a row")
    used = np.isfinite(z_phot) & np.isfinite(z_spec) & (z_spec > -1)
    if not used.any():
        raise ValueError("no row has both redshifts")
    numbers = {name: run.metrics.get(name) for name in ("nmad", "bias", "r2")}
    png = redshift_png(z_spec[used], z_phot[used], numbers)
    width, height = plots.png_size(png)
    title = f"Redshifts of {plots.label(run.name, 60)}"
    alt = f"{title}: predicted against spectroscopic, as density of {int(used.sum()):,} galaxies"
    text = "Above: all galaxies of the run. Below: what is off, scaled by 1 + z_spec."
    return Drawing("redshift", title, alt, text, Picture(png, None, width // 2, height // 2), True)
