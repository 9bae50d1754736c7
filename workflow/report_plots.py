"""The drawings of a report, each as SVG for the page and as PNG for slides; they know no runs.

Colours are told apart by colour-blind people too: steps of viridis where there is an order (batch
sizes, world sizes), matplotlib's tableau-colorblind10 where there is none (what time went into).
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.scale import LogScale
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox, BboxBase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Axis", "Bar", "Curve", "Dot", "Picture", "Point", "Track"]
__all__ += ["bars", "curves", "dots", "label", "png_size", "timeline"]

_WIDTH = 5.0  # inches: 480 px, not much more than a phone has, so that text stays legible
_PNG_DPI = 160
_CSS_DPI = 96
_MARKERS = "osD^vPX*<>"
_LONGEST = 36
_MARK = 8  # pixels around a mark's middle; so close to it a name would be taken for that mark's
# Where a name may stand beside its point, the best first: right or left, above or below.
_CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0))
_BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e3e6ea",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    # Names come from strangers: a $ in them is no formula.
    "text.parse_math": False,
    "svg.fonttype": "path",  # the same on every machine
    "svg.hashsalt": "cosmic",  # the same bytes for the same numbers
}
# In the order of legends. What is of one kind has one colour; no drawing has both.
_STAGES = {
    "server": "#CFCFCF",
    "init": "#ABABAB",
    "join": "#FF800E",
    "load": "#A2C8EC",
    "tune": "#FFBC79",
    "barrier": "#C85200",
    "infer": "#006BA4",
    "inference": "#006BA4",
    "collective": "#C85200",
    "allreduce": "#595959",
    "summarize": "#5F9ED1",
    "other": "#898989",
}


class Picture(NamedTuple):
    """A drawing; without ``svg`` the page shows the PNG. Sizes are CSS pixels."""

    png: bytes
    svg: bytes | None
    width: int
    height: int


class Axis(NamedTuple):
    """What an axis shows, with its unit; ``log`` has a base of two."""

    text: str
    log: bool = False


class Point(NamedTuple):
    """A median at ``x``, with the least and the greatest of all repeats."""

    x: float
    y: float
    low: float
    high: float


class Curve(NamedTuple):
    """What belongs together: a thick line with marks, and a thin dashed one of the same colour."""

    name: str
    thick: Sequence[Point]
    thin: Sequence[Point] = ()


class Dot(NamedTuple):
    """One configuration; those of the frontier bear their ``name``."""

    x: float
    y: float
    name: str
    group: str
    frontier: bool


class Bar(NamedTuple):
    """Seconds by stage."""

    name: str
    parts: Mapping[str, float]


class Track(NamedTuple):
    """What one process did: (name of a stage, begin, seconds), seconds from the run's begin."""

    name: str
    spans: Sequence[tuple[str, float, float]]


def label(text: str, longest: int = _LONGEST) -> str:
    """Cut a name to what a drawing has room for, without characters that SVG cannot hold."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain if len(plain) <= longest else f"{plain[: longest - 1]}…"


def curves(
    lines: Sequence[Curve],
    x: Axis,
    y: Axis,
    meanings: tuple[str, str] | None = None,
    ideal: str | None = None,
) -> Picture:
    """Draw lines over the same axes, with bars from the least to the greatest of the repeats.

    Args:
        meanings: what thick and thin lines are, if there are both.
        ideal: None, or how to call the straight line on which y equals x.
    """
    with _drawing(3.6) as figure:
        axes = figure.subplots()
        handles = []
        for number, line in enumerate(lines):
            colour = _step(number, len(lines))
            marker = _MARKERS[number % len(_MARKERS)]
            _curve(axes, line, colour, marker)
            text = label(line.name)
            handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=text))
        everything = [p for line in lines for p in (*line.thick, *line.thin)]
        above = _meanings(meanings) if meanings else []
        if ideal:
            above.append(_ideal(axes, everything, ideal))
        _axes(axes, x, y, sorted({p.x for p in everything}))
        _legend(figure, handles, "lower")
        _legend(figure, above, "upper")
        return _picture(figure)


def _curve(axes: Axes, line: Curve, colour: Any, marker: str) -> None:
    if line.thick:
        xs, ys, below, above = zip(
            *((p.x, p.y, p.y - p.low, p.high - p.y) for p in line.thick), strict=True
        )
        axes.errorbar(
            xs, ys, yerr=(below, above), color=colour, marker=marker, markersize=5,
            linewidth=1.8, elinewidth=1, capsize=2.5,
        )  # fmt: skip
    if line.thin:
        xs, ys = zip(*((p.x, p.y) for p in line.thin), strict=True)
        alone: dict[str, Any] = (
            {"marker": marker, "markersize": 3} if len(xs) == 1 or not line.thick else {}
        )
        axes.plot(xs, ys, color=colour, linewidth=0.9, linestyle=(0, (4, 2)), **alone)


def _ideal(axes: Axes, points: Sequence[Point], name: str) -> Line2D:
    ends = [min(p.x for p in points), max(p.x for p in points)]
    style: dict[str, Any] = {"color": "#595959", "linewidth": 1, "linestyle": ":"}
    axes.plot(ends, ends, **style)
    return Line2D([], [], label=name, **style)


def _axes(axes: Axes, x: Axis, y: Axis, values: Sequence[float]) -> None:
    axes.set(xlabel=x.text, ylabel=y.text)
    if x.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    if len(values) <= (12 if x.log else 8):
        axes.xaxis.set_major_locator(FixedLocator(_apart(values, x.log)))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    if len(values) == 1:  # a lone x has no width of its own
        axes.set_xlim(values[0] / 1.5, values[0] * 1.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _apart(values: Sequence[float], log: bool) -> list[float]:
    """Those of the sorted values that have room for a number each, first and last among them."""
    places = [math.log2(value) if log else value for value in values]
    room = 0.07 * (places[-1] - places[0])
    kept = [0]
    for i in range(1, len(values)):
        if places[i] - places[kept[-1]] >= room:
            kept.append(i)
    kept[-1] = len(values) - 1
    return [values[i] for i in kept]


def _plain(value: float, _: object = None) -> str:
    """A tick of an axis: 0.25, 12, 1,250."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _meanings(texts: tuple[str, str]) -> list[Any]:
    styles: tuple[dict[str, Any], ...] = (
        {"linewidth": 1.8},
        {"linewidth": 0.9, "linestyle": (0, (4, 2))},
    )
    return [
        Line2D([], [], color="#595959", label=text, **style)
        for text, style in zip(texts, styles, strict=True)
    ]


def _legend(figure: Figure, handles: list[Any], side: str) -> None:
    """Explain the lines outside the axes, in as many columns as there is room for."""
    if handles:
        widest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(len(handles), 6, int(82 / (widest + 7))))
        where: Any = f"outside {side} center"
        figure.legend(handles=handles, loc=where, ncols=columns)


def dots(points: Sequence[Dot], x: Axis, y: Axis, frontier: str) -> Picture:
    """Draw configurations by time and cost, and the line of those that nothing else beats.

    Args:
        frontier: what to call the line.
    """
    names = sorted({p.group for p in points}, key=_natural)
    with _drawing(3.7) as figure:
        axes = figure.subplots()
        handles: list[Any] = []
        for number, name in enumerate(names):
            colour, marker = _step(number, len(names)), _MARKERS[number % len(_MARKERS)]
            of_it = [p for p in points if p.group == name]
            axes.scatter([p.x for p in of_it], [p.y for p in of_it], color=colour, marker=marker)
            style: Any = {"color": colour, "marker": marker, "linestyle": ""}
            handles.append(Line2D([], [], label=label(name), **style))
        best = sorted(p for p in points if p.frontier)
        axes.plot([p.x for p in best], [p.y for p in best], color="#595959", linewidth=1)
        _scatter_axes(axes, x, y, points)
        _legend(figure, handles, "lower")
        _legend(figure, [Line2D([], [], color="#595959", linewidth=1, label=frontier)], "upper")
        _names(figure, axes, best, points)
        return _picture(figure)


def _natural(name: str) -> tuple[float, str]:
    number = re.match(r"\d+(\.\d+)?", name)
    return (float(number[0]) if number else math.inf, name)


def _names(figure: Figure, axes: Axes, best: Sequence[Dot], points: Sequence[Dot]) -> None:
    """Write names to the frontier's ends, and between them where they cover nothing."""
    figure.draw_without_rendering()  # only now it is known where points are, in pixels
    marks, line = (axes.transData.transform([(p.x, p.y) for p in of]) for of in (points, best))
    taken = [Bbox.from_extents(*mark, *mark).padded(_MARK) for mark in marks]
    steps = [at for a, b in itertools.pairwise(line) for at in np.linspace(a, b, 30)]
    for i in sorted(range(len(best)), key=lambda i: i % max(len(best) - 1, 1)):
        names = [_name(axes, best[i], *corner) for corner in _CORNERS]
        boxes = [Bbox(name.get_window_extent().get_points()) for name in names]
        covered = [_covered(box, taken, steps, axes.bbox) for box in boxes]
        chosen = covered.index(min(covered))
        shown = covered[chosen] == 0 or i in (0, len(best) - 1)
        for number, name in enumerate(names):
            if number != chosen or not shown:
                name.remove()
        taken += [boxes[chosen]] if shown else []


def _name(axes: Axes, dot: Dot, right: int, above: int) -> Annotation:
    made = axes.annotate(
        label(dot.name, 24),
        (dot.x, dot.y),
        xytext=((5 if above else 8) * right, 8 * above),
        textcoords="offset points",
        ha="left" if right > 0 else "right",
        va={1: "bottom", 0: "center", -1: "top"}[above],
        zorder=1,
        fontsize=8,
        bbox=_BEHIND,
    )
    made.set_in_layout(False)  # else the axes would move away from under the names
    return made


def _covered(box: Bbox, taken: Sequence[Bbox], line: Sequence[Any], whole: BboxBase) -> int:
    """How bad a place for a name is: 0 is good, off the axes is worst."""
    inside = whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    hidden = sum(box.overlaps(other) for other in taken)
    crossed = sum(box.contains(*at) for at in line)
    return 1000 * (not inside) + 50 * hidden + crossed


def _scatter_axes(axes: Axes, x: Axis, y: Axis, points: Sequence[Dot]) -> None:
    axes.set(xlabel=x.text, ylabel=y.text)
    axes.margins(x=0.18, y=0.14)
    for name, side in (("x", axes.xaxis), ("y", axes.yaxis)):
        values = [getattr(point, name) for point in points]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set(**{f"{name}scale": LogScale(side, base=2)})
            side.set_minor_locator(NullLocator())
        side.set_major_formatter(FuncFormatter(_plain))


def bars(rows: Sequence[Bar], x: Axis) -> Picture:
    """Draw stacked bars, one below the other, of what time went into."""
    with _drawing(1.5 + 0.24 * len(rows)) as figure:
        axes = figure.subplots()
        for number, row in enumerate(rows):
            begin = 0.0
            for stage, seconds in row.parts.items():
                axes.barh(number, seconds, left=begin, height=0.72, color=_STAGES[stage])
                begin += seconds
        _tracks(axes, x, [row.name for row in rows])
        _stage_legend(figure, {stage for row in rows for stage in row.parts})
        return _picture(figure)


def timeline(tracks: Sequence[Track], x: Axis) -> Picture:
    """Draw who did what when: a line for each process; what has no colour is "other"."""
    with _drawing(1.5 + max(0.2, 0.3 - 0.004 * len(tracks)) * len(tracks)) as figure:
        axes = figure.subplots()
        used = set()
        for number, track in enumerate(tracks):
            for name, begin, seconds in track.spans:
                stage = name if name in _STAGES else "other"
                used.add(stage)
                axes.barh(number, seconds, left=begin, height=0.7, color=_STAGES[stage])
        _tracks(axes, x, [track.name for track in tracks])
        _stage_legend(figure, used)
        return _picture(figure)


def _tracks(axes: Axes, x: Axis, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [label(name) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.set_xlabel(x.text)
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))


def _stage_legend(figure: Figure, used: set[str]) -> None:
    patches = [Patch(color=c, label=stage) for stage, c in _STAGES.items() if stage in used]
    figure.legend(handles=patches, loc="outside upper center", ncols=min(5, len(patches)))


def _step(number: int, of: int) -> Any:
    """Colour of one of several steps; viridis' yellow end is too pale for a line."""
    import matplotlib

    return matplotlib.colormaps["viridis"](0.85 * number / max(of - 1, 1))


@contextmanager
def _drawing(height: float) -> Iterator[Figure]:
    # A Figure of its own, not pyplot's: no window, no global state.
    with rc_context(_STYLE), warnings.catch_warnings():
        # Names in a script that the font does not have show as boxes, which is no news.
        warnings.filterwarnings("ignore", message="Glyph")
        yield Figure(figsize=(_WIDTH, min(height, 40.0)), layout="constrained")


def _picture(figure: Figure) -> Picture:
    # Once for both forms: else each finds a place for everything anew, most of what drawing takes.
    figure.draw_without_rendering()
    figure.set_layout_engine(None)
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    width, height = (round(side * _CSS_DPI) for side in figure.get_size_inches())
    return Picture(png.getvalue(), svg.getvalue(), width, height)


def png_size(picture: bytes) -> tuple[int, int]:
    """Width and height in pixels of a PNG."""
    return int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])
