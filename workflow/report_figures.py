"""Which drawings a report has, of which configurations; and why one is left out, if it is."""

from __future__ import annotations

import io
import math
import statistics
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from workflow import report_plots as plots
from workflow.configurations import Configuration, Spread
from workflow.report_plots import Axis, Bar, Curve, Dot, Picture, Point, Track
from workflow.results import Rank, Run

__all__ = ["Costs", "Drawing", "Section", "choose", "name_of", "sections"]

Item = TypeVar("Item")

Costs = Mapping[int, float]
"""What runs cost, in USD, by the id() of the run; runs whose cost is not known are not in it."""

# More lines of the same kind, bars or ranks than these cannot be told apart.
_PANELS = 4
_LINES = 10
_BARS = 40
_RANKS = 40
# Of a predictions file: more than 20 million galaxies.
_MAX_PREDICTIONS = 500_000_000
_GBIT = 1e-9

_WORLD = Axis("world size (ranks)")
_BATCH = Axis("batch size (rows per call of the model)", log=True)
_STAGES = ("init", "join", "load", "inference", "collective")
_COLOURS = {
    "server": "#CFCFCF",
    "init": "#ABABAB",
    "join": "#FF800E",
    "load": "#A2C8EC",
    "tune": "#FFBC79",
    "barrier": "#C85200",
    "infer": "#006BA4",
    "allreduce": "#595959",
    "summarize": "#5F9ED1",
}
_RATES = ("wall-clock", "sum of ranks (thin)")
_TIMES = ("whole run", "inference only (thin)")
_RATES_TEXT = (
    "Thick: all rows over the time of the slowest rank. Thin: the ranks' own rates added up, which "
    "is never what one waits for. Bars: least to greatest of the repeats."
)
_TIMES_TEXT = (
    "Thick: from the start of the run to its end. Thin: the inference of the slowest rank. "
    "Bars: least to greatest of the repeats."
)


class Drawing(NamedTuple):
    """A picture in the report; ``name`` is that of its file."""

    name: str
    title: str
    alt: str
    caption: str
    picture: Picture
    tall: bool = False


@dataclass
class Section:
    """Drawings under one heading, and a sentence for each that has no data."""

    id: str
    title: str
    drawings: list[Drawing] = field(default_factory=list)
    omitted: list[str] = field(default_factory=list)


class _Panel(NamedTuple):
    """Configurations that differ in world and batch size only."""

    title: str
    configurations: Sequence[Configuration]


def sections(
    configurations: Sequence[Configuration],
    costs: Costs,
    chosen: Run | None,
    step: Callable[[str], None],
) -> list[Section]:
    """Draw everything that there are data for.

    Args:
        chosen: the run to draw in detail.
        step: told what is being drawn.
    """
    ours = [c for c in configurations if not c.source.startswith("original")]
    theirs = [c for c in configurations if c.source.startswith("original")]
    found = []
    if theirs:
        found.append(_data_size(theirs, step))
    if ours or not theirs:
        found.append(_world_size(ours, step))
    found.append(_batch_size(configurations, step))
    if ours or not theirs:
        found.append(_speedup(ours, step))
    found.append(_cost(configurations, costs, step))
    found.append(_split(configurations, chosen, step))
    found.append(_redshift(configurations, chosen, step))
    return found


def choose(runs: Iterable[Run]) -> Run | None:
    """Return the run to show in detail: the median one of the largest world that has spans."""
    usable = [run for run in runs if run.status == "ok" and (run.spans or run.predictions)]
    with_spans = [run for run in usable if run.spans] or usable
    largest = max((run.world_size or 0 for run in with_spans), default=0)
    of_it = [run for run in with_spans if (run.world_size or 0) == largest]
    of_it.sort(key=lambda run: (run.total_s or math.inf, run.name))
    return of_it[(len(of_it) - 1) // 2] if of_it else None


def name_of(c: Configuration, among: Iterable[Configuration] = ()) -> str:
    """Name a configuration, by what tells it from the others ``among`` which it is."""
    ranks = f"{c.world_size:,} rank{'s' if c.world_size != 1 else ''}" if c.world_size else ""
    batch = f"batch {c.batch_size:,}" if c.batch_size else ""
    return ", ".join(part for part in (ranks, batch, _context(c, among)) if part)


def _context(c: Configuration, among: Iterable[Configuration]) -> str:
    others = list(among)
    names = ("data", "engine", "precision", "source", "on")
    parts = [getattr(c, n) for n in names if len({getattr(o, n) for o in others}) > 1]
    return ", ".join(str(part) for part in parts if part)


# -- panels and curves ------------------------------------------------------------------------


def _panels(configurations: Sequence[Configuration]) -> list[_Panel]:
    """Split by what must be the same for a comparison; the largest first."""
    groups: dict[tuple[object, ...], list[Configuration]] = {}
    for c in configurations:
        groups.setdefault((c.source, c.on, c.data, c.engine, c.precision), []).append(c)
    panels = [_Panel(_context(g[0], configurations), g) for g in groups.values()]
    return sorted(panels, key=lambda panel: -len(panel.configurations))


def _shown(
    section: Section, what: str, panels: Sequence[_Panel], axis: str, measures: Sequence[str]
) -> Iterator[tuple[int, _Panel]]:
    """Yield the panels that have something to draw over this axis, and say what is left out."""
    usable = []
    for panel in panels:
        of_it = [c for c in panel.configurations if any(m in c.measures for m in measures)]
        known = {value for c in of_it if (value := getattr(c, axis)) is not None}
        if len(known) > 1:
            usable.append(_Panel(panel.title, of_it))
    if not usable:
        words = axis.replace("_", " ")
        section.omitted.append(f"No plot of {what}: there are not two {words}s of the same data.")
    elif len(usable) > _PANELS:
        left = ", ".join(plots.label(panel.title, 60) for panel in usable[_PANELS : _PANELS + 20])
        text = f"{what.capitalize()} is drawn for {_PANELS} of {len(usable)} data sets; left out: {left}."
        section.omitted.append(text)
    yield from enumerate(usable[:_PANELS], 1)


def _curves(
    panel: _Panel, by: str, over: str, measures: tuple[str, str | None], text: str
) -> list[Curve]:
    """One curve for each value of ``by``, over ``over``: thick the first measure, thin the second."""
    values = sorted({v for c in panel.configurations if (v := getattr(c, by)) is not None})
    lines = []
    for value in _few(values, _LINES):
        of_it = [c for c in panel.configurations if getattr(c, by) == value]
        thick, thin = (_points(of_it, over, name) if name else [] for name in measures)
        if thick or thin:
            lines.append(Curve(text.format(value), thick, thin))
    return lines


def _points(
    configurations: Iterable[Configuration], over: str, name: str, scale: float = 1.0
) -> list[Point]:
    known = [
        (getattr(c, over), c.measures[name])
        for c in configurations
        if getattr(c, over) is not None and name in c.measures
    ]
    return [_point(x, spread, scale) for x, spread in sorted(known)]


def _point(x: float, spread: Spread, scale: float = 1.0) -> Point:
    return Point(x, *(value * scale for value in spread))


def _few(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Take at most so many, evenly, first and last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _draw(
    section: Section,
    step: Callable[[str], None],
    name: str,
    title: str,
    panel: str,
    lines: Sequence[Curve],
    axes: tuple[Axis, Axis],
    caption: str,
    meanings: tuple[str, str] | None = None,
    ideal: str | None = None,
) -> None:
    full = f"{title}: {panel}" if panel else title
    step(f"plot: {full}")
    both = meanings if any(line.thin for line in lines) else None
    picture = plots.curves(lines, *axes, both, ideal)
    section.drawings.append(Drawing(name, full, _alt(full, lines, axes), caption, picture))


def _alt(title: str, lines: Sequence[Curve], axes: tuple[Axis, Axis]) -> str:
    """Say in words what the curves show, for those who do not see them."""
    said = []
    for line in lines:
        points = line.thick or line.thin
        if points:
            first, last = points[0], points[-1]
            ends = f"{first.y:,.4g} at {first.x:,g} to {last.y:,.4g} at {last.x:,g}"
            said.append(f"{plots.label(line.name)}: {ends}")
    return f"{title}. {axes[1].text} against {axes[0].text}. " + "; ".join(said)


def _world_axis(panel: _Panel) -> Axis:
    sizes = [c.world_size for c in panel.configurations if c.world_size]
    return _WORLD._replace(log=max(sizes) > 12 * min(sizes))


# -- the sections -----------------------------------------------------------------------------


def _world_size(ours: Sequence[Configuration], step: Callable[[str], None]) -> Section:
    section = Section("world", "Against the world size")
    panels = _panels(ours)
    rates = ("rows_per_s_wall_clock", "rows_per_s_sum_of_ranks")
    for n, panel in _shown(section, "throughput against world size", panels, "world_size", rates):
        lines = _curves(panel, "batch_size", "world_size", rates, "batch {:,}")
        axes = (_world_axis(panel), Axis("throughput (rows/s)"))
        title = "Throughput against world size"
        name = f"throughput-world-{n}"
        _draw(section, step, name, title, panel.title, lines, axes, _RATES_TEXT, _RATES)
    times = ("total_s", "inference_s")
    for n, panel in _shown(section, "time against world size", panels, "world_size", times):
        lines = _curves(panel, "batch_size", "world_size", times, "batch {:,}")
        axes = (_world_axis(panel), Axis("time (s)"))
        title = "Time against world size"
        _draw(section, step, f"time-world-{n}", title, panel.title, lines, axes, _TIMES_TEXT, _TIMES)
    return section


def _batch_size(all_of_them: Sequence[Configuration], step: Callable[[str], None]) -> Section:
    section = Section("batch", "Against the batch size")
    panels = _panels(all_of_them)
    plural = "{:,} ranks"
    rates = ("rows_per_s_wall_clock", "rows_per_s_sum_of_ranks")
    for n, panel in _shown(section, "throughput against batch size", panels, "batch_size", rates):
        lines = _curves(panel, "world_size", "batch_size", rates, plural)
        axes = (_BATCH, Axis("throughput (rows/s)"))
        title, name = "Throughput against batch size", f"throughput-batch-{n}"
        _draw(section, step, name, title, panel.title, lines, axes, _RATES_TEXT, _RATES)
    times = ("total_s", "inference_s")
    for n, panel in _shown(section, "time against batch size", panels, "batch_size", times):
        lines = _curves(panel, "world_size", "batch_size", times, plural)
        axes = (_BATCH, Axis("time (s)"))
        title, name = "Time against batch size", f"time-batch-{n}"
        _draw(section, step, name, title, panel.title, lines, axes, _TIMES_TEXT, _TIMES)
    memory = ("peak_memory_mb",)
    for n, panel in _shown(section, "memory against batch size", panels, "batch_size", memory):
        lines = _curves(panel, "world_size", "batch_size", ("peak_memory_mb", None), plural)
        axes = (_BATCH, Axis("peak memory (MB)"))
        title, name = "Memory against batch size", f"memory-batch-{n}"
        text = "Peak resident memory of the rank that took most. MB are 10⁶ bytes."
        _draw(section, step, name, title, panel.title, lines, axes, text)
    return section


def _data_size(theirs: Sequence[Configuration], step: Callable[[str], None]) -> Section:
    """The original's plots: by data size, one line per partition size."""
    section = Section("data", "Against the data size")
    kinds = {
        "throughput": (
            ("bits_per_s_wall_clock", "bits_per_s_sum_of_ranks"), _GBIT, "throughput (Gbit/s)",
            "Thick: all bits over the time of the Map state. Thin: the ranks' own rates, per second "
            "of CPU time, added up. Bars: least to greatest of the repeats.", _RATES,
        ),
        "time": (
            ("total_s", "inference_s"), 1.0, "time (s)",
            "Thick: the whole execution. Thin: the Map state, in which all ranks work. Bars: least "
            "to greatest of the repeats.", _TIMES,
        ),
    }  # fmt: skip
    for name, (measures, scale, text, caption, meanings) in kinds.items():
        lines = _by_partition(theirs, measures, scale)
        title = f"{name.capitalize()} against data size"
        if not lines:
            section.omitted.append(f"No plot of {name} against data size: no file tells both.")
            continue
        axes = (Axis("data (GB)"), Axis(text))
        xs = [p.x for line in lines for p in (*line.thick, *line.thin)]
        axes = (Axis("data (GB)", log=max(xs) > 20 * min(xs) > 0), axes[1])
        _draw(section, step, f"{name}-data", title, "", lines, axes, caption, meanings)
    return section


def _by_partition(
    theirs: Sequence[Configuration], measures: tuple[str, str], scale: float
) -> list[Curve]:
    groups: dict[tuple[float, int], dict[float, Configuration]] = {}
    for c in theirs:
        partition, gb = c.runs[0].partition_mb, c.runs[0].data_gb
        if partition is not None and gb is not None:
            groups.setdefault((partition, c.batch_size or 0), {})[gb] = c
    most = _largest_batches(groups)
    lines = []
    for (partition, batch), by_size in sorted(groups.items()):
        if batch != most[partition]:
            continue  # batch sizes have a section of their own
        thick, thin = (
            [
                _point(gb, c.measures[name], scale)
                for gb, c in sorted(by_size.items())
                if name in c.measures
            ]
            for name in measures
        )
        if thick or thin:
            lines.append(Curve(f"{partition:g} MB partitions", thick, thin))
    return lines


def _largest_batches(groups: Mapping[tuple[float, int], Mapping[float, object]]) -> dict[float, int]:
    """By partition size, the batch size with which most data sizes were tried."""
    best: dict[float, int] = {}
    for (partition, batch), by_size in groups.items():
        known = groups.get((partition, best.get(partition, -1)), {})
        if len(by_size) > len(known):
            best[partition] = batch
    return best


def _speedup(ours: Sequence[Configuration], step: Callable[[str], None]) -> Section:
    section = Section("scaling", "Speed-up and efficiency")
    for n, panel in enumerate(_panels(ours)[:_PANELS], 1):
        known = [c for c in panel.configurations if c.speedup is not None]
        if len({c.world_size for c in known}) < 2:
            continue
        for name, title, text, scale, caption, ideal in _SCALING:
            lines = _scaling_curves(known, name, scale)
            axes = (_world_axis(panel), Axis(text))
            slug = f"{name}-{n}"
            both = ("inference", "whole run (thin)")
            _draw(section, step, slug, title, panel.title, lines, axes, caption, both, ideal)
    if not section.drawings:
        text = "No plot of speed-up: there is no run of one rank to compare with, or nothing else."
        section.omitted.append(text)
    return section


_SCALING = (
    (
        "speedup",
        "Speed-up",
        "speed-up (times one rank's)",
        1.0,
        "Median time of the inference by one rank over that by W ranks, all else equal.",
        "ideal: W ranks, W times as fast",
    ),
    (
        "efficiency",
        "Parallel efficiency",
        "efficiency (%)",
        100.0,
        "Speed-up over world size; 100 % is ideal. Ranks on one machine share its cores and its "
        "memory's bandwidth.",
        None,
    ),
)


def _scaling_curves(known: Sequence[Configuration], name: str, scale: float) -> list[Curve]:
    lines = []
    for batch in _few(sorted({c.batch_size or 0 for c in known}), _LINES):
        of_it = sorted(
            (c for c in known if (c.batch_size or 0) == batch), key=lambda c: c.world_size or 0
        )
        thick = [_flat(c, getattr(c, name), scale) for c in of_it]
        thin = [
            _flat(c, c.total_speedup / (c.world_size or 1 if name == "efficiency" else 1), scale)
            for c in of_it
            if c.total_speedup is not None
        ]
        lines.append(Curve(f"batch {batch:,}" if batch else "batch unknown", thick, thin))
    return lines


def _flat(c: Configuration, value: float, scale: float) -> Point:
    return Point(c.world_size or 0, *(value * scale,) * 3)


def _cost(
    configurations: Sequence[Configuration], costs: Costs, step: Callable[[str], None]
) -> Section:
    section = Section("cost", "Cost against time")
    groups: dict[tuple[str, str, str], list[Configuration]] = {}
    for c in configurations:
        groups.setdefault((c.source, c.on, c.data), []).append(c)
    number = 0
    for group in sorted(groups.values(), key=len, reverse=True):
        points = _dots(group, costs, configurations)
        if len(points) < 2:
            continue
        number += 1
        if number > _PANELS:
            text = f"Cost against time is drawn for the {_PANELS} data sets with most configurations."
            section.omitted.append(text)
            break
        context = _context(group[0], configurations)
        title = f"Cost against time: {context}" if context else "Cost against time"
        step(f"plot: {title}")
        axes = (Axis("time of the whole run (s)"), Axis("cost of one run (USD)"))
        picture = plots.dots(points, *axes, "world size", "frontier: none is cheaper and faster")
        section.drawings.append(
            Drawing(f"cost-{number}", title, _dots_alt(title, points), _COST_TEXT, picture)
        )
    if not number:
        section.omitted.append("No plot of cost against time: fewer than two costs are known.")
    return section


_COST_TEXT = (
    "Medians of the repeats. What was run on this machine has the price that its seconds would "
    "have on AWS Lambda, where they would be other seconds; see the definitions below."
)


def _dots(
    group: Sequence[Configuration], costs: Costs, among: Sequence[Configuration]
) -> list[Dot]:
    known = []
    for c in group:
        usd = [costs[id(run)] for run in c.runs if run.status == "ok" and id(run) in costs]
        if usd and "total_s" in c.measures:
            known.append((c.measures["total_s"].median, statistics.median(usd), c))
    same = [c for _, _, c in known]
    return [
        Dot(
            x, y, name_of(c, same), f"{c.world_size}" if c.world_size else "unknown",
            not any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in known),
        )
        for x, y, c in known
    ]  # fmt: skip


def _dots_alt(title: str, points: Sequence[Dot]) -> str:
    best = sorted(p for p in points if p.frontier)
    said = [f"{plots.label(p.name)}: {p.x:,.3g} s, {p.y:.2g} USD" for p in best[:12]]
    return f"{title}, of {len(points)} configurations. On the frontier: " + "; ".join(said)


# -- what time went into ------------------------------------------------------------------------


def _split(
    configurations: Sequence[Configuration], chosen: Run | None, step: Callable[[str], None]
) -> Section:
    section = Section("split", "Where the time goes")
    known = [(c, parts) for c in configurations if (parts := _stages(c))]
    if known:
        step("plot: time by stage")
        shown = _few(known, _BARS)
        among = [c for c, _ in known]
        rows = [Bar(name_of(c, among), parts) for c, parts in shown]
        picture = plots.bars(rows, Axis("time of a rank (s), mean over ranks and repeats"))
        text = "Means over all ranks of all repeats that are ok. Collective includes waiting for others."
        if len(shown) < len(known):
            text += f" {len(shown)} of {len(known)} configurations are shown."
        title = "Time of a rank by stage"
        section.drawings.append(
            Drawing("stages", title, _bars_alt(title, rows), text, picture, tall=True)
        )
    else:
        section.omitted.append("No plot of time by stage: the files do not tell stages' times.")
    if chosen is not None and chosen.spans:
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
        known = [v for rank in ranks if (v := getattr(rank, f"{stage}_s")) is not None]
        if known and max(known) > 0:
            found[stage] = statistics.fmean(known)
    if not found.keys() - {"inference"}:
        return {}  # a loop alone is no split
    rest = [v for rank in ranks if (v := _other(rank)) is not None]
    if rest and (other := statistics.fmean(rest)) > 0:
        found["other"] = other
    return found


def _other(rank: Rank) -> float | None:
    known = [getattr(rank, f"{stage}_s") or 0.0 for stage in _STAGES if stage != "init"]
    return max(rank.wall_s - math.fsum(known), 0.0) if rank.wall_s is not None else None


def _bars_alt(title: str, rows: Sequence[Bar]) -> str:
    said = []
    for row in rows[:20]:
        parts = ", ".join(f"{stage} {seconds:.3g} s" for stage, seconds in row.parts.items())
        said.append(f"{plots.label(row.name)}: {parts}")
    return f"{title}. " + "; ".join(said)


def _timeline(run: Run) -> Drawing:
    spans = [s for s in run.spans if math.isfinite(s.start) and math.isfinite(s.seconds)]
    zero = min((s.start for s in spans), default=0.0)
    by_rank: dict[int | None, list[tuple[str, float, float]]] = {}
    for span in spans:
        by_rank.setdefault(span.rank, []).append((span.name, span.start - zero, span.seconds))
    ends = {r: max(b + s for _, b, s in of_it) for r, of_it in by_rank.items() if r is not None}
    ranks = sorted(_few(sorted(ends, key=lambda r: (ends[r], r)), _RANKS))
    tracks = [Track("launcher", by_rank[None])] if None in by_rank else []
    tracks += [Track(f"rank {r}", by_rank[r]) for r in ranks]
    title = f"Timeline of {plots.label(run.name, 60)}"
    text = "The launcher's steps, and what each rank did when. Blank before a rank's first stage: its process starts."
    if len(ranks) < len(ends):
        text += f" {len(ranks)} of {len(ends):,} ranks are shown, evenly from the first to finish to the last."
    if run.on == "aws":
        text += " Each worker has its own clock."
    last = max(ends, key=lambda r: ends[r], default=None)
    alt = f"{title}: {len(ends)} ranks"
    if last is not None:
        alt += f"; rank {last} is the last to finish, {ends[last]:.2f} s after the start"
    picture = plots.timeline(tracks, Axis("time since the start of the run (s)"), _COLOURS)
    return Drawing("timeline", title, alt, text, picture, tall=True)


# -- predictions --------------------------------------------------------------------------------


def _redshift(
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


_UNREADABLE = (ValueError, LookupError, EOFError, OSError, RuntimeError, TypeError, MemoryError)
_UNREADABLE += (zipfile.BadZipFile,)


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
    alt = f"{title}: predicted against spectroscopic redshift of {int(used.sum()):,} galaxies, as density"
    text = "Above: all galaxies of the run. Below: what is off, scaled by 1 + z_spec."
    return Drawing("redshift", title, alt, text, Picture(png, None, width // 2, height // 2), True)
