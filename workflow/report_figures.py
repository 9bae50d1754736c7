"""Which drawings a report has, of which configurations; and why one is left out, if it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from workflow import report_plots as plots
from workflow.configurations import Configuration
from workflow.report_details import redshift, split
from workflow.report_parts import Drawing, Section, context, drawable, few, name_of, sound
from workflow.report_plots import Axis, Curve, Dot, Point
from workflow.results import Run

__all__ = ["sections"]

# More panels or lines of the same kind than these cannot be told apart.
_PANELS = 4
_LINES = 10

_WORLD = Axis("world size (ranks)")
_BATCH = Axis("batch size (rows per call of the model)", log=True)


class _Quantity(NamedTuple):
    """What is drawn: a measure in thick lines, and one in thin lines, or "" for none."""

    thick: str
    thin: str
    axis: str
    caption: str
    meanings: tuple[str, str] | None = None
    scale: float = 1.0


_MAP_TIME = "Thick: all bits over the time of the Map state."
_OURS = {
    "throughput": _Quantity(
        "rows_per_s_wall_clock",
        "rows_per_s_sum_of_ranks",
        "throughput (rows/s)",
        "Thick: all rows over the time of the slowest rank. Thin: the ranks' own rates added up, "
        "which is never what one waits for. Bars, with repeats: least to greatest.",
        ("wall-clock", "sum of ranks (thin)"),
    ),
    "time": _Quantity(
        "total_s",
        "inference_s",
        "time (s)",
        "Thick: from the start of the run to its end. Thin: the inference of the slowest rank. "
        "Bars, with repeats: least to greatest.",
        ("whole run", "inference only (thin)"),
    ),
    "memory": _Quantity(
        "peak_memory_mb",
        "",
        "peak memory (MB)",
        "Peak resident memory of the rank that took most. MB are 10⁶ bytes.",
    ),
}
_THEIRS = _OURS | {
    "throughput": _Quantity(
        "bits_per_s_wall_clock",
        "bits_per_s_sum_of_ranks",
        "throughput (Gbit/s)",
        f"{_MAP_TIME} Thin: the ranks' own rates, per second of CPU time, added up. Bars, with "
        "repeats: least to greatest.",
        ("wall-clock", "sum of ranks (thin)"),
        1e-9,
    ),
    "time": _Quantity(
        "total_s",
        "inference_s",
        "time (s)",
        "Thick: the whole execution. Thin: the Map state, in which all ranks work. Bars: least to "
        "greatest of the repeats.",
        ("whole execution", "Map state (thin)"),
    ),
}
_OF_SOURCE = {
    "original": _THEIRS,
    "original, one process": _OURS | {"throughput": _THEIRS["throughput"]},
}


class _Panel(NamedTuple):
    """Configurations that differ in world and batch size only."""

    title: str
    configurations: Sequence[Configuration]

    def quantity(self, name: str) -> _Quantity:
        """What is drawn under this name: the original's files tell other things than ours."""
        return _OF_SOURCE.get(self.configurations[0].source, _OURS)[name]


def sections(
    configurations: Sequence[Configuration],
    chosen: Run | None,
    step: Callable[[str], None],
) -> list[Section]:
    """Draw everything that there are data for.

    Args:
        chosen: the run to draw in detail.
        step: told what is being drawn.
    """
    configurations = [drawn for c in configurations if (drawn := sound(c)) is not None]
    ours = [c for c in configurations if not c.source.startswith("original")]
    theirs = [c for c in configurations if c.source.startswith("original")]
    found = []
    if theirs:
        found.append(_data_size(theirs, step))
    if ours or not theirs:
        world = Section("world", "Against the world size")
        _against(world, "world_size", ours, ("throughput", "time"), step)
        found.append(world)
    batch = Section("batch", "Against the batch size")
    _against(batch, "batch_size", configurations, ("throughput", "time", "memory"), step)
    found.append(batch)
    if ours or not theirs:
        found.append(_speedup(ours, step))
    found.append(_cost(configurations, step))
    found.append(split(configurations, chosen, step))
    found.append(redshift(configurations, chosen, step))
    return found


# -- panels and curves ------------------------------------------------------------------------


def _panels(configurations: Sequence[Configuration]) -> list[_Panel]:
    """Split by what must be the same for a comparison; the largest first."""
    groups: dict[tuple[object, ...], list[Configuration]] = {}
    for c in configurations:
        groups.setdefault((c.source, c.on, c.data, c.engine, c.precision), []).append(c)
    panels = [_Panel(context(g[0], configurations), g) for g in groups.values()]
    return sorted(panels, key=lambda panel: -len(panel.configurations))


def _shown(
    section: Section, name: str, panels: Sequence[_Panel], over: str
) -> Iterator[tuple[int, _Panel]]:
    """Yield the panels that have something to draw over this size, and say what is left out."""
    usable = []
    for panel in panels:
        measures = panel.quantity(name)[:2]
        of_it = [c for c in panel.configurations if any(m in c.measures for m in measures)]
        known = {value for c in of_it if (value := getattr(c, over)) is not None}
        if len(known) > 1:
            usable.append(_Panel(panel.title, of_it))
    words = over.replace("_", " ")
    what = f"{name} against {words}"
    if not usable:
        text = f"No plot of {what}: it is not known of two {words}s of the same data."
        section.omitted.append(text)
    elif len(usable) > _PANELS:
        left = ", ".join(plots.label(panel.title, 60) for panel in usable[_PANELS : _PANELS + 20])
        text = f"{what.capitalize()}: {_PANELS} of {len(usable)} data sets; left out: {left}."
        section.omitted.append(text)
    yield from enumerate(usable[:_PANELS], 1)


def _curves(panel: _Panel, by: str, over: str, quantity: _Quantity) -> list[Curve]:
    """One curve for each value of ``by``."""
    values = sorted({v for c in panel.configurations if (v := getattr(c, by)) is not None})
    lines = []
    for value in few(values, _LINES):
        of_it = [c for c in panel.configurations if getattr(c, by) == value]
        thick, thin = (
            _points([(getattr(c, over), c) for c in of_it], measure, quantity.scale)
            for measure in quantity[:2]
        )
        if thick or thin:
            lines.append(Curve(_called(by, value), thick, thin))
    return lines


def _called(by: str, value: int) -> str:
    if by == "batch_size":
        return f"batch {value:,}"
    return "1 rank" if value == 1 else f"{value:,} ranks"


def _points(
    placed: Iterable[tuple[float | None, Configuration]], measure: str, scale: float
) -> list[Point]:
    """The measure of configurations by their places on the axis."""
    known = [(x, c.measures[measure]) for x, c in placed if x is not None and measure in c.measures]
    return [Point(x, *(value * scale for value in spread)) for x, spread in sorted(known)]


def _draw(
    section: Section,
    step: Callable[[str], None],
    name: str,
    title: str,
    lines: Sequence[Curve],
    x: Axis,
    quantity: _Quantity,
    ideal: str | None = None,
) -> None:
    caption, axes = quantity.caption, (x, Axis(quantity.axis))
    if caption.startswith(_MAP_TIME) and not any(line.thick for line in lines):
        caption += " Nothing is thick: the time of the Map state is not known."
    step(f"plot: {title}")
    both = quantity.meanings if any(line.thin for line in lines) else None
    picture = plots.curves(lines, *axes, both, ideal)
    section.drawings.append(Drawing(name, title, _alt(title, lines, axes), caption, picture))


def _alt(title: str, lines: Sequence[Curve], axes: tuple[Axis, Axis]) -> str:
    """Say in words what the curves show, for those who do not see them."""
    said = []
    for line in lines:
        points = line.thick or line.thin
        if points:
            first, last = points[0], points[-1]
            ends = f"{first.y:,.4g} at {first.x:,g} to {last.y:,.4g} at {last.x:,g}"
            kind = "" if line.thick else "thin, "
            said.append(f"{plots.label(line.name)}: {kind}{ends}")
    return f"{title}. {axes[1].text} against {axes[0].text}. " + "; ".join(said)


def _titled(title: str, panel: _Panel) -> str:
    return f"{title}: {panel.title}" if panel.title else title


def _world_axis(panel: _Panel) -> Axis:
    sizes = [c.world_size for c in panel.configurations if c.world_size]
    return _WORLD._replace(log=max(sizes) > 12 * min(sizes))


# -- the sections -----------------------------------------------------------------------------


def _against(
    section: Section,
    over: str,
    configurations: Sequence[Configuration],
    names: Iterable[str],
    step: Callable[[str], None],
) -> None:
    """Draw quantities over the world or the batch size, a line for each size of the other kind."""
    by = "batch_size" if over == "world_size" else "world_size"
    panels = _panels(configurations)
    for name in names:
        for n, panel in _shown(section, name, panels, over):
            quantity = panel.quantity(name)
            lines = _curves(panel, by, over, quantity)
            x = _BATCH if over == "batch_size" else _world_axis(panel)
            title = _titled(f"{name.capitalize()} against {over.replace('_', ' ')}", panel)
            file = f"{name}-{over.removesuffix('_size')}-{n}"
            _draw(section, step, file, title, lines, x, quantity)


def _data_size(theirs: Sequence[Configuration], step: Callable[[str], None]) -> Section:
    """The original's plots: by data size, one line per partition size."""
    section = Section("data", "Against the data size")
    for name in ("throughput", "time"):
        quantity = _THEIRS[name]
        lines = _by_partition(theirs, quantity)
        if not lines:
            section.omitted.append(f"No plot of {name} against data size: no file tells both.")
            continue
        xs = [p.x for line in lines for p in (*line.thick, *line.thin)]
        x = Axis("data (GB)", log=max(xs) > 20 * min(xs) > 0)
        title = f"{name.capitalize()} against data size"
        _draw(section, step, f"{name}-data", title, lines, x, quantity)
    return section


def _by_partition(theirs: Sequence[Configuration], quantity: _Quantity) -> list[Curve]:
    groups: dict[tuple[float, int], dict[float, Configuration]] = {}
    # Of the same data in more or fewer partitions, the one with most runs.
    for c in sorted(theirs, key=lambda c: c.ok):
        partition, gb = c.runs[0].partition_mb, c.runs[0].data_gb
        if partition and gb and drawable(partition) and drawable(gb):
            groups.setdefault((partition, c.batch_size or 0), {})[gb] = c
    most = _main_batches(groups)
    named = len(set(most.values())) > 1
    lines = []
    for (partition, batch), by_size in sorted(groups.items()):
        if batch != most[partition]:
            continue  # batch sizes have a section of their own
        thick, thin = (
            _points(by_size.items(), measure, quantity.scale) for measure in quantity[:2]
        )
        if thick or thin:
            more = f", batch {batch:,}" if named else ""
            lines.append(Curve(f"{partition:g} MB partitions{more}", thick, thin))
    return lines


def _main_batches(groups: Mapping[tuple[float, int], Mapping[float, object]]) -> dict[float, int]:
    """By partition size, the batch size with most data sizes; of several, the most used one."""
    used: Counter[int] = Counter()
    for (_, batch), by_size in groups.items():
        used[batch] += len(by_size)
    best: dict[float, int] = {}
    for partition, batch in sorted(groups, key=lambda k: (len(groups[k]), used[k[1]], k[1])):
        best[partition] = batch
    return best


def _speedup(ours: Sequence[Configuration], step: Callable[[str], None]) -> Section:
    section = Section("scaling", "Speed-up and efficiency")
    for n, panel in enumerate(_panels(ours)[:_PANELS], 1):
        known = [c for c in panel.configurations if c.speedup is not None]
        if len({c.world_size for c in known}) < 2:
            continue
        for name, (title, quantity, ideal) in _SCALING.items():
            lines = _scaling_curves(known, name, quantity.scale)
            told = quantity._replace(caption=quantity.caption + _threads(known))
            x, title = _world_axis(panel), _titled(title, panel)
            _draw(section, step, f"{name}-{n}", title, lines, x, told, ideal)
    if not section.drawings:
        text = "No plot of speed-up: there is no run of one rank to compare with, or nothing else."
        section.omitted.append(text)
    return section


_BY_TIME = ("inference", "whole run (thin)")
_SCALING = {
    "speedup": (
        "Speed-up",
        _Quantity(
            "speedup",
            "total_speedup",
            "speed-up (×)",  # noqa: RUF001
            "Median time of the inference by one rank over that by W ranks, all else equal.",
            _BY_TIME,
        ),
        "ideal",
    ),
    "efficiency": (
        "Parallel efficiency",
        _Quantity(
            "efficiency",
            "total_speedup",
            "efficiency (%)",
            "Speed-up over world size; 100 % is ideal. Ranks on one machine share its cores and "
            "its memory's bandwidth.",
            _BY_TIME,
            100.0,
        ),
        None,
    ),
}


def _threads(known: Sequence[Configuration]) -> str:
    """Say so where one rank alone had other threads than each of several: it is no fair race."""
    told: dict[int, set[int]] = {}
    for c in known:
        for run in c.runs:
            threads = run.environment.get("threads")
            # The environment of a run that failed may be that of its sweep.
            if run.status == "ok" and isinstance(threads, int) and c.world_size:
                told.setdefault(c.world_size, set()).add(threads)
    alone = told.pop(1, None)
    if not alone or all(threads == alone for threads in told.values()):
        return ""
    each = [f"{_called('world_size', n)}: {_numbers(told[n])} each" for n in sorted(told)]
    return (
        f" Threads of the inference were not the same (1 rank: {_numbers(alone)}; "
        f"{'; '.join(few(each, 8))}): so this is what splitting the work brings on this machine, "
        "and not what more machines bring."
    )


def _numbers(found: set[int]) -> str:
    return " or ".join(str(number) for number in sorted(found)[:4])


def _scaling_curves(known: Sequence[Configuration], name: str, scale: float) -> list[Curve]:
    lines = []
    for batch in few(sorted({c.batch_size or 0 for c in known}), _LINES):
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


def _cost(configurations: Sequence[Configuration], step: Callable[[str], None]) -> Section:
    section = Section("cost", "Cost against time")
    groups: dict[tuple[object, ...], list[Configuration]] = {}
    for c in configurations:
        gb = c.runs[0].data_gb if c.source == "original" else None
        groups.setdefault((c.source, c.on, gb or c.data), []).append(c)
    number = 0
    for group in sorted(groups.values(), key=len, reverse=True):
        points = _dots(group, configurations)
        if len(points) < 2:
            continue
        number += 1
        if number > _PANELS:
            text = (
                f"Cost against time is drawn for the {_PANELS} data sets with most configurations."
            )
            section.omitted.append(text)
            break
        where = _shared(group, configurations)
        title = f"Cost against time: {where}" if where else "Cost against time"
        step(f"plot: {title}")
        axes = (Axis("time of the whole run (s)"), Axis("cost of one run (USD)"))
        picture = plots.dots(points, *axes, "frontier: none is cheaper and faster")
        text = _COST_OF_THEIRS if group[0].source == "original" else _COST_TEXT
        section.drawings.append(
            Drawing(f"cost-{number}", title, _dots_alt(title, points), text, picture)
        )
    if not number:
        section.omitted.append("No plot of cost against time: fewer than two costs are known.")
    return section


_COST_TEXT = (
    "Medians of the repeats. What did not run on AWS has the price that its seconds would "
    "have on AWS Lambda, where they would be other seconds; see the definitions below."
)


_COST_OF_THEIRS = (
    "Medians of the repeats. The time is that of the whole execution; the cost is not what AWS has "
    "billed, but that of the ranks' seconds in torch's profiler; see the definitions below."
)


def _shared(group: Sequence[Configuration], among: Sequence[Configuration]) -> str:
    """What a group has in common that others have not."""
    gb = group[0].runs[0].data_gb
    if group[0].source == "original" and gb:
        return f"the original's {gb:g} GB"
    names = ("data", "source", "on")
    parts = [getattr(group[0], n) for n in names if len({getattr(c, n) for c in among}) > 1]
    return ", ".join(parts)


def _dots(group: Sequence[Configuration], among: Sequence[Configuration]) -> list[Dot]:
    known = [
        (c.measures["total_s"].median, c.measures["cost_usd"].median, c)
        for c in group
        if c.measures.keys() >= {"total_s", "cost_usd"}
    ]
    same = [c for _, _, c in known]
    return [
        Dot(
            x, y, name_of(c, () if c.source == "original" else same), _group(c),
            not any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in known),
        )
        for x, y, c in known
    ]  # fmt: skip


def _group(c: Configuration) -> str:
    """What a dot's colour stands for: the world, which for the original follows from partitions."""
    partition = c.runs[0].partition_mb
    if c.source == "original" and partition:
        return f"{partition:g} MB partitions"
    return _called("world_size", c.world_size) if c.world_size else "unknown"


def _dots_alt(title: str, points: Sequence[Dot]) -> str:
    best = sorted(p for p in points if p.frontier)
    said = [f"{plots.label(p.name)}: {p.x:,.3g} s, {p.y:.2g} USD" for p in best[:12]]
    return f"{title}, of {len(points)} configurations. On the frontier: " + "; ".join(said)
