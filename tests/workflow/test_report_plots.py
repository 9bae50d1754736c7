"""What the drawings of a report write beside their points, and under them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import ENVIRONMENT, failed_run, made_run
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from workflow import report_figures
from workflow import report_plots as plots
from workflow.configurations import summarise
from workflow.plan import Span
from workflow.report import write
from workflow.report_plots import Axis, Dot
from workflow.results import Results, Run


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, to be asked where everything is."""
    found: list[Figure] = []
    real = plots._picture

    def picture(figure: Figure) -> Any:
        found.append(figure)
        return real(figure)

    monkeypatch.setattr(plots, "_picture", picture)
    return found


def frontier(seed: int) -> list[Dot]:
    """Twelve points by chance; which of them are on the frontier is not by chance."""
    dice = random.Random(seed)
    places = [(dice.uniform(2, 5), dice.uniform(2, 5)) for _ in range(12)]
    return [
        Dot(x, y, f"{n} ranks, batch 128", "4 ranks",
            not any(a <= x and b <= y and (a, b) != (x, y) for a, b in places))
        for n, (x, y) in enumerate(places)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_names_of_the_frontier_hide_neither_points_nor_each_other(
    figures: list[Figure], seed: int
) -> None:
    points = frontier(seed)
    plots.dots(points, Axis("time (s)"), Axis("cost (USD)"), "frontier")
    (figure,) = figures
    figure.draw_without_rendering()  # the last drawing was the PNG, of other pixels
    (axes,) = figure.axes
    names = [text for text in axes.texts if isinstance(text, Annotation)]
    best = sorted(p for p in points if p.frontier)
    assert {best[0].name, best[-1].name} <= {name.get_text() for name in names}
    boxes = [name.get_window_extent() for name in names]
    marks = axes.transData.transform([(p.x, p.y) for p in points])
    assert [tuple(mark) for mark in marks for box in boxes if box.contains(*mark)] == []
    assert not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)
    assert all(axes.bbox.containsx(x) for box in boxes for x in (box.x0, box.x1))


def threads(world: int, number: int, **fields: Any) -> Run:
    return made_run(world, environment={**ENVIRONMENT, "threads": number}, **fields)


def test_speed_up_says_where_ranks_had_other_threads(tmp_path: Path) -> None:
    write(Results((threads(1, 4), threads(2, 2), threads(4, 1)), ()), str(tmp_path))
    said = (tmp_path / "report.md").read_text()
    assert said.count("not the same (1 rank: 4; 2 ranks: 2 each; 4 ranks: 1 each)") == 2


@pytest.mark.parametrize(
    "others",
    [
        [threads(2, 4), threads(4, 4)],
        [threads(2, 4), failed_run(2, environment={**ENVIRONMENT, "threads": 9}, repeat=2)],
        [made_run(2, environment={}), made_run(4, environment={"threads": "<b>"})],
    ],
)
def test_speed_up_says_nothing_of_threads_that_are_the_same_or_unknown(
    others: list[Run],
) -> None:
    assert report_figures._threads(summarise([threads(1, 4), *others])) == ""


def test_times_of_the_originals_runs_are_nowhere_taken_for_ours(tmp_path: Path) -> None:
    theirs = {"source": "original", "on": "aws", "partition_mb": 25.0, "data_gb": 1.0}
    write(Results(tuple(made_run(1, n, **theirs) for n in (8, 32)), ()), str(tmp_path))
    said = (tmp_path / "report.md").read_text()
    assert "Time against batch size" in said
    assert "Thin: the Map state" in said
    assert "slowest rank" not in said.partition("How to read")[0]


# -- numbers of strangers --------------------------------------------------------------------------


def report(runs: list[Run], folder: Path) -> str:
    return Path(write(Results(tuple(runs), ()), str(folder)).paths[0]).read_text()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1.0, 0.0, 1e308, 5e-324])
def test_numbers_that_no_clock_shows_cost_no_more_than_their_drawing(
    tmp_path: Path, odd: float
) -> None:
    run = made_run(2)
    times = dict.fromkeys(
        ("init_s", "join_s", "load_s", "inference_s", "collective_s", "wall_s", "rows_per_s"), odd
    )
    rank = replace(run.ranks[0], peak_memory_mb=odd, bits_per_s=odd, **times)
    strange = replace(
        run,
        ranks=(rank, run.ranks[1]),
        bits=odd,
        inference_s=odd,
        total_s=odd,
        spans=(Span(0, "infer", odd, odd), Span(1, "infer", 1e18, 1.0)),
    )
    content = report([strange, made_run(1), made_run(4)], tmp_path)
    assert "<img" in content
    assert "Throughput against world size" in content


@pytest.mark.parametrize("size", [0, -3, 10**30])
def test_sizes_that_no_job_has_are_not_drawn(tmp_path: Path, size: int) -> None:
    runs = [made_run(2, world_size=size), made_run(2, batch_size=size), made_run(1), made_run(4)]
    assert "Throughput against world size" in report(runs, tmp_path)


def test_a_rank_with_very_many_stages_is_cut(tmp_path: Path) -> None:
    spans = tuple(Span(0, f"stage {i}", float(i), 1.0) for i in range(20_000))
    assert len(report([made_run(1, spans=spans)], tmp_path)) < 500_000
