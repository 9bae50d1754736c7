"""The answer of ``cosmic cost``: for people, for programs, and as a picture."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from workflow.cost import Architecture, Cost, Prices, of_hour
from workflow.estimate import Frontier, Point, Speed
from workflow.table import print_wide, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Answer", "as_dict", "print_answer", "save_plot"]

_SHOWN = 16
_DPI = 150


class Answer(NamedTuple):
    """What was asked, and what comes out. ``asked`` is the choice that was named, if any."""

    rows: int
    architecture: Architecture
    speed: Speed
    prices: Prices
    best: Frontier
    asked: Point | None


def as_dict(answer: Answer) -> dict[str, Any]:
    """For --json: everything, with units in the names."""
    best = answer.best
    hour = of_hour(answer.prices, answer.architecture, rows=answer.rows)
    return {
        "rows": answer.rows,
        "region": answer.prices.region,
        "architecture": answer.architecture,
        "asked": answer.asked and _point(answer.asked),
        **{name: _point(point) for name, point in _marks(best).items()},
        "frontier": [_point(point, items=False) for point in best.points],
        "usd_per_hour": {"items": dict(hour.items), "total": hour.total_usd},
        "speed": _speed(answer.speed),
        "assumptions": assumptions(answer),
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "rows_per_s_of_one_core": speed.rows_per_s,
        "two_cores_over_one": speed.second_thread,
        "start_s": speed.start_s,
        "wait_s": speed.wait_s,
        "init_and_summarize_s": list(speed.step_s),
        "least_memory_mb": speed.peak_mb,
    }


def _point(point: Point, *, items: bool = True) -> dict[str, Any]:
    told: dict[str, Any] = {
        "world_size": point.world_size,
        "memory_mb": point.memory_mb,
        "cores": point.cores,
        "seconds": point.seconds,
        "billed_rank_seconds": point.rank_s,
        "usd": point.usd,
    }
    return {**told, "items_usd": dict(point.cost.items)} if items else told


def assumptions(answer: Answer) -> list[str]:
    """What to know about the numbers, a line of text each."""
    lines = [f"prices: list prices of {answer.prices.region}, without free tiers"]
    lines += answer.speed.notes
    if answer.architecture == "arm":
        lines.append("arm: only its prices; its speed was never measured, and is taken as above")
    lines.append(
        "not in it: what AWS needs to start functions (fetching the image, Step Functions' own "
        "time, and the wait for the last rank to start, which all others are billed for: the more "
        "ranks the longer), traffic, images in the registry"
    )
    if (asked := answer.asked) and asked.world_size > answer.rows:
        lines.append(f"{asked.world_size - answer.rows:,} of these ranks would have no rows")
    return lines


def print_answer(answer: Answer, plot: str | None) -> None:
    """Print the choice that was asked for, or the knee, item by item; then all that are best."""
    console = Console()
    point = answer.asked or answer.best.knee
    title = "asked for" if answer.asked else "knee"
    print(f"{_count(answer.rows, 'row')}, {title}: {_words(point)}\n")
    print_wide(console, _items(point.cost, "USD per run"))
    hour = of_hour(answer.prices, answer.architecture, rows=answer.rows)
    print("\nStands there and costs, whether anything runs or not, per hour:\n")
    print_wide(console, _items(hour, "USD per hour"))
    print("\nNo other choice is both faster and cheaper than one of these:\n")
    print_wide(console, _frontier(answer.best))
    print("", *_notes(answer), sep="\n")
    if plot:
        print(f"\nplot: {short(plot)}")


def _words(point: Point) -> str:
    where = f"{point.memory_mb:,} MB ({point.cores:.2f} cores)"
    ranks = _count(point.world_size, "rank")
    return f"{ranks} of {where}, {point.seconds:,.1f} s, {_usd(point.usd)} USD"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number > 1 else ''}"


def _usd(value: float) -> str:
    """Four digits behind the point, or as many as show two that count."""
    return f"{value:,.4f}" if value >= 0.001 or value == 0 else f"{value:.2g}"


def _items(cost: Cost, unit: str) -> Table:
    table = Table(box=box.SIMPLE, padding=0, show_edge=False, show_footer=True)
    table.add_column("", "total", no_wrap=True)
    table.add_column(unit, f"{cost.total_usd:,.6f}", justify="right", no_wrap=True)
    table.add_column("share", "100 %", justify="right", no_wrap=True)
    for name, usd in cost.items.items():
        share = usd / cost.total_usd if cost.total_usd else 0.0
        table.add_row(name, f"{usd:,.6f}", f"{share:.1%}".replace("%", " %"))
    return table


def _frontier(best: Frontier) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1), show_edge=False)
    for head in ("ranks", "memory\nMB", "cores\neach", "run\ns", "USD\nper run"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for point in _some(best):
        table.add_row(
            f"{point.world_size:,}",
            f"{point.memory_mb:,}",
            f"{point.cores:.2f}",
            f"{point.seconds:,.1f}",
            _usd(point.usd),
            _name(best, point),
        )
    return table


def _marks(best: Frontier) -> Mapping[str, Point]:
    return {"cheapest": best.cheapest, "knee": best.knee, "fastest": best.fastest}


def _name(best: Frontier, point: Point) -> str:
    return ", ".join(name for name, chosen in _marks(best).items() if chosen is point)


def _some(best: Frontier) -> list[Point]:
    """At most some `_SHOWN` of them, evenly, and those with a name."""
    step = -(-len(best.points) // _SHOWN)
    named = list(_marks(best).values())
    return [p for i, p in enumerate(best.points) if i % step == 0 or any(p is q for q in named)]


def _notes(answer: Answer) -> list[str]:
    hidden = len(answer.best.points) - len(_some(answer.best))
    more = [f"{hidden} more of them between these; --json has all."] if hidden else []
    lines = [*more, *assumptions(answer)]
    return [textwrap.fill(line, 80, subsequent_indent="  ") for line in lines]


def save_plot(answer: Answer, url: str) -> None:
    """Draw cost against time and write the picture to ``url``.

    Raises:
        StorageError: it cannot be written.
    """
    from lambda_worker import storage

    storage.write(url, frontier_png(answer))


def frontier_png(answer: Answer) -> bytes:
    """Draw the frontier, with its named points and what was asked for, and return it as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(7, 5), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    points = answer.best.points
    axes.plot([p.seconds for p in points], [p.usd for p in points], "o-", markersize=3, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="time of the whole run, s", ylabel="USD per run")
    axes.margins(0.08, 0.15)
    for point in points:
        if name := _name(answer.best, point):
            _label(axes, point, name, "tab:red")
    if answer.asked:
        _label(axes, answer.asked, "asked for", "black")
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        wide = limits[1] / limits[0] > 10
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, alpha=0.3)
    axes.set_title(
        f"{_count(answer.rows, 'row')} on AWS Lambda, {answer.architecture}: an estimate"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _label(axes: Axes, point: Point, name: str, color: str) -> None:
    """Mark a point; what is written beside it stays inside of the picture."""
    axes.plot([point.seconds], [point.usd], "o", color=color)
    text = f"{name}: {point.world_size:,} × {point.memory_mb:,} MB"  # noqa: RUF001
    left, right = axes.get_xlim()
    late = point.seconds > math.sqrt(left * right)
    axes.annotate(
        text,
        (point.seconds, point.usd),
        xytext=(6, 8),
        textcoords="offset points",
        ha="right" if late else "left",
        fontsize="small",
    )
