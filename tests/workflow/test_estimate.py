"""How long, how dear, what is best: the model of time and the choice among pairs."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow import cost, estimate
from workflow.estimate import ENGINES, NotMeasured, Speed, Unfit, frontier, measured
from workflow.plan import Span
from workflow.results import Rank, Run

ROOT = Path(__file__).parent.parent.parent
PRICES = cost.load_prices()
PLAIN = Speed(rows_per_s=100, second_thread=2, start_s=2, wait_s=1, step_s=(0.5, 0.5))


def at(rows: int, world_size: int, memory: int, speed: Speed = PLAIN) -> estimate.Point:
    return estimate.estimate(rows, world_size, memory, speed, PRICES)


def test_the_engines_speeds_are_those_of_the_docs() -> None:
    text = (ROOT / "docs/performance.md").read_text().partition("<!-- inference -->")[2]
    names = {"torch": "torch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
    assert set(names) == set(ENGINES)
    rates, _, other = text.partition("private MB")
    for engine, name in names.items():
        one, two, start = (
            re.findall(rf"^\| {name} \|{row}", table, re.M)[0]
            for table, row in (
                (rates, r" 1 × 1 \|(?:[^|]*\|){2} (\d+)"),  # noqa: RUF001
                (rates, r" 1 × 2 \|(?:[^|]*\|){2} (\d+)"),  # noqa: RUF001
                (other, r"(?:[^|]*\|){4} ([\d.]+)"),
            )
        )
        speed = ENGINES[engine]
        assert speed.rows_per_s == int(one)
        assert speed.second_thread == int(two) / int(one)
        assert speed.start_s == float(start)


def test_speed_follows_cores_as_far_as_threads_do() -> None:
    assert [PLAIN.speedup(cores) for cores in (0.25, 1, 2, 5.79)] == pytest.approx(
        [0.25, 1, 2, 5.79]
    )
    poor = dataclasses.replace(PLAIN, second_thread=1.6)
    assert [poor.speedup(cores) for cores in (0.25, 1, 2)] == pytest.approx([0.25, 1, 1.6])
    assert 1.6 < poor.speedup(5.79) < 2.7
    assert dataclasses.replace(PLAIN, second_thread=0.9).speedup(4) == 1


def test_seconds_by_hand() -> None:
    """1,000 rows on 4 ranks of a core: 250 rows at 100 a second, after 2 s, with 1 s of waiting."""
    whole = at(1000, 4, 1769)
    assert (whole.rank_s, whole.seconds) == (pytest.approx(5.5), pytest.approx(6.5))
    assert whole.usd == whole.cost.total_usd
    assert whole.cost.items["Lambda, ranks"] == pytest.approx(
        4 * 5.5 * 1769 / 1024 * 0.0000166667, rel=1e-6
    )
    half = at(1000, 4, 885)  # all but waiting takes twice as long
    assert half.rank_s == pytest.approx(10, rel=1e-3)
    assert half.seconds == pytest.approx(12, rel=1e-3)
    assert at(1001, 4, 1769).rank_s == pytest.approx(5.51)  # one rank has a row more, all wait
    assert at(1, 4, 1769).rank_s == pytest.approx(3.01)


@pytest.mark.parametrize(
    ("rows", "ranks", "memory", "text"),
    [
        (1000, 1, 511, "a rank needs 512"),
        (1000, 1, 127, "a function has 128 to 10,240"),
        (1000, 1, 10_241, "a function has"),
        (90_000, 1, 1769, "1 rank of 1,769 MB would take 903 s each"),
        (0, 1, 1769, "at least one row"),
        (1, 0, 1769, "at least one row"),
        (-5, 1, 1769, "at least one row"),
    ],
)
def test_what_no_function_can_do(rows: int, ranks: int, memory: int, text: str) -> None:
    with pytest.raises(Unfit, match=text):
        at(rows, ranks, memory)


def test_just_fits() -> None:
    assert at(89_700, 1, 1769).rank_s == pytest.approx(900)


def every(rows: int, sizes: list[int]) -> list[estimate.Point]:
    found = []
    for world_size in sizes:
        for memory in estimate.MEMORY:
            try:
                found.append(at(rows, world_size, memory))
            except Unfit:
                continue
    return found


@settings(max_examples=30)
@given(rows=st.integers(1, 2_000_000), most=st.integers(20, 200))
def test_the_frontier_is_what_nothing_beats(rows: int, most: int) -> None:
    sizes = estimate.world_sizes(most, rows)
    points = every(rows, sizes)
    if not points:
        return
    best = frontier(rows, PLAIN, PRICES, world_sizes=sizes)
    assert best.cheapest.usd == min(point.usd for point in points)
    assert best.fastest.seconds <= min(point.seconds for point in points) / 0.99
    for one, next_one in zip(best.points, best.points[1:], strict=False):
        assert next_one.usd > one.usd
        assert next_one.seconds < 0.99 * one.seconds
    for kept in best.points:
        assert not any(p.usd < kept.usd and p.seconds <= kept.seconds * 0.99 for p in points)
    assert best.knee in best.points
    assert all(best.knee.seconds * best.knee.usd <= p.seconds * p.usd for p in best.points)


def test_memory_that_a_rank_needs_is_the_least_that_is_tried() -> None:
    large = dataclasses.replace(PLAIN, peak_mb=3000)
    best = frontier(10_000, large, PRICES, world_sizes=[1, 10])
    assert min(point.memory_mb for point in best.points) >= 3000
    with pytest.raises(Unfit, match="needs 3,000"):
        frontier(10_000, large, PRICES, world_sizes=[1], memory=[2048])
    with pytest.raises(Unfit, match="a function has 128 to 10,240"):
        frontier(1, dataclasses.replace(PLAIN, peak_mb=20_000), PRICES, world_sizes=[1])


def test_world_sizes_that_are_tried() -> None:
    assert estimate.world_sizes(16, 100) == [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16]
    assert estimate.world_sizes(1000, 7) == [1, 2, 3, 4, 5, 6, 7]
    assert estimate.world_sizes(10_000, 10**12)[-3:] == [6000, 8000, 10_000]


def ranks(rate: float, count: int = 2, **more: Any) -> tuple[Rank, ...]:
    seconds = {"inference_s": 1000 / rate, "cpu_s": 800 / rate, "init_s": 0.5, "load_s": 1.0}
    told = {"rows": 1000, "join_s": 0.2, "collective_s": 0.1, "peak_memory_mb": 600.0}
    return tuple(Rank(rank=k, **{**seconds, **told, **more}) for k in range(count))


def run(rate: float, **changes: Any) -> Run:
    plain = Run(
        place="x",
        source="cosmic run",
        name="r",
        data="small",
        world_size=2,
        engine="onnx",
        precision="fp32",
        batch_size=32,
        ranks=ranks(rate),
        spans=(Span(None, "init", 0.0, 0.7), Span(None, "summarize", 9.0, 0.3)),
        environment={"threads": 2, "cores_usable": 2},
    )
    return dataclasses.replace(plain, **changes)


def test_speed_is_taken_from_runs() -> None:
    speed = measured([run(90), run(100), run(130)])
    assert speed.rows_per_s == pytest.approx(100)
    assert (speed.start_s, speed.wait_s, speed.step_s) == (1.5, pytest.approx(0.3), (0.7, 0.3))
    assert speed.peak_mb == math.ceil(600 * 1e6 / 2**20)
    assert speed.second_thread == ENGINES["onnx"].second_thread
    assert "median of 6 ranks of 3 runs (onnx, fp32, batches of 32)" in speed.notes[0]


def test_the_fastest_engine_and_batch_size_count() -> None:
    others = [
        run(300, engine="torch"),
        run(200, batch_size=8),
        run(400, engine="torch", precision="bf16"),
    ]
    speed = measured([run(100), *others])
    assert speed.rows_per_s == pytest.approx(400)
    assert "torch, bf16" in speed.notes[0]


def test_ranks_that_shared_cores_tell_their_speed_by_cpu_time() -> None:
    four = run(100, world_size=4, ranks=ranks(100, 4))
    speed = measured([four])
    assert speed.rows_per_s == pytest.approx(125)
    assert "CPU time" in speed.notes[0]


@pytest.mark.parametrize(("busy", "share"), [(1.9, None), (None, None), (1.2, 1.2), (0.7, 1.0)])
def test_of_several_threads_one_cores_share(busy: float | None, share: float | None) -> None:
    """As much as these threads do at best, but no more than CPU time says that they did."""
    plain = ranks(100, 1)[0]
    rank = dataclasses.replace(plain, cpu_s=busy and busy * (plain.inference_s or 0))
    alone = run(100, world_size=1, ranks=(rank,))
    expected = 100 / (share or ENGINES["onnx"].second_thread)
    assert measured([alone]).rows_per_s == pytest.approx(expected)


def test_on_aws_the_memory_tells_the_cores() -> None:
    limit = 3538 * 2**20 / 1e6
    there = run(100, on="aws", ranks=ranks(100, memory_limit_mb=limit, cpu_s=19.0))
    assert measured([there]).rows_per_s == pytest.approx(100 / ENGINES["onnx"].second_thread)
    assert measured([there]).step_s == ENGINES["onnx"].step_s  # its spans are Step Functions'
    less = run(100, on="aws", ranks=ranks(100, memory_limit_mb=limit / 4, cpu_s=5.0), spans=())
    assert measured([less]).rows_per_s == pytest.approx(200)
    with pytest.raises(NotMeasured):
        measured([run(100, on="aws")])  # its environment is that of whoever has started it


def test_warm_processes_do_not_tell_what_a_start_takes() -> None:
    warm = tuple(dataclasses.replace(rank, init_s=0.0) for rank in ranks(100))
    speed = measured([run(100, ranks=warm)])
    assert speed.start_s == ENGINES["onnx"].start_s
    assert any("start of a rank" in text for text in speed.notes)


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([], "no runs in there"),
        ([run(1, status="failed"), run(1, status="incomplete")], "none of its 2 runs ended well"),
        ([run(1, source="original", ranks=(Rank(cpu_s=1, rows=1),))], "the original's"),
        ([run(1, ranks=(Rank(rows=10),))], "none of its runs tells"),
        ([run(1, ranks=(Rank(rows=0, inference_s=0.0),))], "none of its runs tells"),
    ],
)
def test_results_without_a_speed(runs: list[Run], text: str) -> None:
    with pytest.raises(NotMeasured, match=text):
        measured(runs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -5.0, 0.0])
def test_nonsense_tells_nothing(bad: float) -> None:
    names = ("inference_s", "cpu_s", "init_s", "load_s", "join_s", "collective_s", "peak_memory_mb")
    odd = Rank(rows=1000, **dict.fromkeys(names, bad))  # type: ignore[arg-type]
    cores = {"threads": 1, "cores_usable": 4}
    spans = (Span(None, "init", 0, bad),)
    speed = measured([run(100, ranks=(*ranks(100), odd), spans=spans, environment=cores)])
    assert speed.rows_per_s == pytest.approx(100)
    assert speed.start_s == pytest.approx(1.5)
    assert 0 <= speed.wait_s < 0.31
    assert speed.peak_mb == measured([run(100)]).peak_mb
    assert all(0 <= seconds < 1 for seconds in speed.step_s)
    with pytest.raises(NotMeasured):
        measured([run(100, ranks=(odd,), environment=cores)])
