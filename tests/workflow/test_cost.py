"""What a run costs: against published figures, a log of AWS, and by hand."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from workflow import cost
from workflow.cost_log import reports
from workflow.plan import Span
from workflow.results import Rank, Run

FIXTURES = Path(__file__).parent.parent / "fixtures" / "cost"
PRICES = cost.load_prices()
GB_SECOND = 0.0000166667
with (FIXTURES / "published.csv").open() as file:
    PUBLISHED = list(csv.DictReader(file))
LOGGED = list(reports((FIXTURES / "report_lines.txt").read_text().splitlines()))
CONFIGURED_GB = 10  # as the log says


def lambda_usd(requests: int, seconds: float, gb: float) -> float:
    usage = cost.Usage(rank_s=[seconds] * requests, memory_mb=round(gb * 1024))
    return cost.of_usage(usage, PRICES).items["Lambda, ranks"]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["partition"])
def test_the_published_table(row: dict[str, str]) -> None:
    """The original bills the memory that its functions used."""
    usd = lambda_usd(int(row["requests"]), float(row["duration_s"]), float(row["memory_gb"]))
    assert f"{usd:.2f}" == row["cost_usd"]


def test_the_published_table_at_the_memory_that_is_billed() -> None:
    usd = [
        lambda_usd(int(row["requests"]), float(row["duration_s"]), CONFIGURED_GB)
        for row in PUBLISHED
    ]
    assert [f"{value:.2f}" for value in usd] == ["0.56", "0.51", "0.51", "0.54"]


def test_report_lines() -> None:
    assert len(LOGGED) == 9
    assert {line.memory_mb for line in LOGGED} == {CONFIGURED_GB * 1024}
    assert {line.used_mb for line in LOGGED} == {5948, 5998}
    assert [line.init_s for line in LOGGED] == [pytest.approx(0.66381), *[None] * 8]
    assert (min(line.billed_s for line in LOGGED), LOGGED[0].billed_s) == (32.419, 40.908)


def test_aws_bills_whole_milliseconds_with_the_start_of_an_instance() -> None:
    for line in LOGGED:
        took = line.duration_s + (line.init_s or 0.0)
        assert cost.gb_seconds([took], 1024) == pytest.approx(line.billed_s, abs=1e-9)


def test_report_lines_among_others_and_damaged_ones() -> None:
    tabs = "REPORT RequestId: a-1\tDuration: 3.1 ms\tBilled Duration: 4 ms\tMemory Size: 128 MB"
    more = "\tMax Memory Used: 60 MB\tInit Duration: 100.5 ms\tXRAY TraceId: 1-5e"
    lines = ["START RequestId: a-1", tabs, tabs + more, "2026-01-01 - " + tabs + more, ""]
    found = list(reports(lines))
    assert [(line.billed_s, line.used_mb, line.init_s) for line in found] == [
        (0.004, 60, 0.1005)
    ] * 2


def test_what_aws_would_have_billed_for_75_mb() -> None:
    """docs/cost.md tells this, step by step; each figure here stands there."""
    row = next(row for row in PUBLISHED if row["partition"] == "75MB")
    ranks, cpu_s, used = int(row["requests"]), float(row["duration_s"]), float(row["memory_gb"])
    billed_s = mean(line.billed_s for line in LOGGED)
    usage = cost.Usage(
        rank_s=[billed_s] * ranks,
        memory_mb=CONFIGURED_GB * 1024,
        invocations=ranks,
        transitions=2 * ranks,
        storage_mb=2048,
    )
    items = cost.of_usage(usage, PRICES).items
    steps = {
        "published": lambda_usd(ranks, cpu_s, used),
        "configured": lambda_usd(ranks, cpu_s, CONFIGURED_GB),
        "billed": items["Lambda, ranks"],
        "cold": lambda_usd(ranks, LOGGED[0].billed_s, CONFIGURED_GB),
        "requests": items["Lambda, requests"],
        "storage": items["Lambda, /tmp above 512 MB"],
        "transitions": items["Step Functions"],
    }
    text = (Path(__file__).parent.parent.parent / "docs/cost.md").read_text()
    shown = {name: f"{usd:.2g}" if usd < 0.01 else f"{usd:.2f}" for name, usd in steps.items()}
    assert f"{billed_s:.1f} s" in text
    for name, figure in shown.items():
        assert f"| {figure} |" in text, f"{name}: {figure}"


def test_items_by_hand() -> None:
    """Two ranks of 2,048 MB for 10 s, and all else once."""
    usage = cost.Usage(
        rank_s=[10, 10],
        step_s=[1, 2],
        memory_mb=2048,
        run_s=36,
        storage_mb=1024,
        invocations=4,
        transitions=9,
        reads=1000,
        writes=100,
        log_bytes=2**30,
        metrics=73,
        secret_reads=100,
        load_balancer_units=0.5,
    )
    expected = {
        "Lambda, ranks": 40 * GB_SECOND,
        "Lambda, init and summarize": 6 * GB_SECOND,
        "Lambda, requests": 4 * 0.2e-6,
        "Lambda, /tmp above 512 MB": 23 * 0.5 * 0.0000000309,
        "Step Functions": 9 * 0.000025,
        "S3, requests": 0.0004 + 0.0005,
        "CloudWatch, logs": 0.50,
        "CloudWatch, metrics": 73 * 0.30 / 730,
        "Secrets Manager, reads": 0.0005,
        "load balancer, units": 0.003,
        "server, while the run lasts": 0.0509384 / 100,
    }
    costs = cost.of_usage(usage, PRICES)
    assert costs.items == pytest.approx(expected, rel=1e-5)
    assert costs.total_usd == pytest.approx(sum(expected.values()), rel=1e-5)


def test_arm_has_prices_of_its_own() -> None:
    x86, arm = (
        cost.of_usage(cost.Usage(rank_s=[1], memory_mb=1024, architecture=kind), PRICES).total_usd
        for kind in ("x86", "arm")
    )
    assert (x86, arm) == (pytest.approx(GB_SECOND), pytest.approx(0.0000133334))
    servers = [cost.of_hour(PRICES, kind).items["Fargate, server"] for kind in ("x86", "arm")]
    assert servers == [pytest.approx(0.0123425), pytest.approx(0.009875)]


def test_milliseconds_are_rounded_up_and_sums_of_floats_are_not() -> None:
    assert cost.gb_seconds([0.0001, 0.0011], 1024) == pytest.approx(0.003)
    assert cost.gb_seconds([0.1 + 0.2, 0.7 + 0.1], 1024) == pytest.approx(1.1)
    assert cost.gb_seconds([], 1024) == 0


def made(**changes: Any) -> Run:
    """A run of ours on this machine: 4 ranks of one thread, 10 s each, of which 2 before."""
    ranks = tuple(
        Rank(rank=k, rows=250, wall_s=8.0, init_s=2.0, inference_s=5.0, peak_memory_mb=300.0)
        for k in range(4)
    )
    spans = (Span(None, "init", 0.0, 1.0), Span(None, "infer", 1.0, 10.0), Span(0, "load", 2, 1))
    run = Run(
        place="x",
        source="cosmic run",
        name="r",
        data="small",
        world_size=4,
        ranks=ranks,
        rows=1000,
        total_s=12.0,
        spans=(*spans, Span(None, "summarize", 11.0, 0.5)),
        environment={"threads": 2, "cores_usable": 4},
    )
    return dataclasses.replace(run, **changes)


def of_run(run: Run, **options: Any) -> cost.Cost:
    costs = cost.of_run(run, PRICES, **options)
    assert costs is not None
    return costs


def test_a_run_on_this_machine() -> None:
    costs = of_run(made())
    assert costs.items["Lambda, ranks"] == pytest.approx(40 * 1769 / 1024 * GB_SECOND)
    assert costs.items["Lambda, init and summarize"] == pytest.approx(1.5 * 1769 / 1024 * GB_SECOND)
    assert costs.items["Step Functions"] == pytest.approx(13 * 0.000025)
    hourly = cost.of_hour(PRICES).total_usd
    assert costs.items["server, while the run lasts"] == pytest.approx(hourly * 12 / 3600)
    assert any("1,769 MB" in text for text in costs.assumptions)
    assert not any("shared cores" in text for text in costs.assumptions)
    few = of_run(made(environment={"threads": 1, "cores_usable": 2}))
    assert any("shared cores" in text for text in few.assumptions)


def test_a_rank_with_two_threads_is_billed_for_two_cores() -> None:
    wide = made(environment={"threads": 2, "cores_usable": 8})
    assert of_run(wide).items["Lambda, ranks"] == pytest.approx(40 * 3538 / 1024 * GB_SECOND)
    assert (
        of_run(made(environment={})).items["Lambda, ranks"] == of_run(made()).items["Lambda, ranks"]
    )


def test_a_rank_is_billed_for_the_memory_it_needs() -> None:
    large = Rank(rank=0, rows=9, wall_s=1.0, peak_memory_mb=4000.0)
    run = made(ranks=(large,), world_size=1, environment={})
    size = math.ceil(4000 * 1e6 / 2**20)
    assert of_run(run).items["Lambda, ranks"] == pytest.approx(size / 1024 * GB_SECOND)
    huge = dataclasses.replace(large, peak_memory_mb=11_000.0)
    assert cost.of_run(made(ranks=(huge,)), PRICES) is None
    told = of_run(made(ranks=(huge,)), memory_mb=1024)
    assert told.items["Lambda, ranks"] == pytest.approx(GB_SECOND)


def test_a_run_on_aws_is_billed_as_configured() -> None:
    limit = 2048 * 2**20 / 1e6
    ranks = tuple(dataclasses.replace(rank, memory_limit_mb=limit) for rank in made().ranks)
    run = made(on="aws", ranks=ranks, environment={"threads": 64, "cores_usable": 64})
    assert of_run(run).items["Lambda, ranks"] == pytest.approx(80 * GB_SECOND)
    assert cost.of_run(made(on="aws"), PRICES) is None  # nobody says how large its functions were


def test_the_original_is_billed_by_what_is_known() -> None:
    rank = Rank(rank=0, cpu_s=17.6)
    run = Run(place="x", source="original", name="r", data="75MB", on="aws", ranks=(rank,) * 173)
    costs = of_run(run)
    assert costs.items["Lambda, ranks"] == pytest.approx(0.5075, abs=1e-4)
    assert costs.items["Step Functions"] == 0
    assert "server, while the run lasts" not in costs.items
    assert any("CPU time" in text for text in costs.assumptions)
    logged = [Rank(wall_s=line.duration_s, init_s=line.init_s, cpu_s=17.6) for line in LOGGED]
    billed = of_run(dataclasses.replace(run, ranks=tuple(logged)))
    seconds = sum(line.billed_s for line in LOGGED)
    assert billed.items["Lambda, ranks"] == pytest.approx(seconds * 10 * GB_SECOND)


def test_one_process_costs_a_function_only() -> None:
    rank = Rank(rows=100, load_s=1.0, inference_s=4.0, cpu_s=7.0)
    run = made(
        source="cosmic infer", world_size=1, ranks=(rank,), spans=(), environment={"threads": 2}
    )
    costs = of_run(run)
    assert costs.items["Lambda, ranks"] == pytest.approx(5 * 3538 / 1024 * GB_SECOND)
    assert costs.total_usd == pytest.approx(costs.items["Lambda, ranks"] + 0.2e-6)


def test_what_is_missing_is_said() -> None:
    assert cost.of_run(made(ranks=()), PRICES) is None
    assert cost.of_run(made(ranks=(Rank(rank=0, rows=5),)), PRICES) is None
    some = of_run(made(ranks=made().ranks[:3], spans=(), total_s=None))
    assert "server, while the run lasts" not in some.items
    text = "\n".join(some.assumptions)
    assert "1 of 4 ranks left no record" in text
    cut = of_run(made(world_size=None, status="incomplete"))
    assert "nobody knows how many" in "\n".join(cut.assumptions)
    assert "init and summarize are not in it" in text
    assert "the server is not in it" in text


def test_files_may_be_anybodys() -> None:
    """Nonsense is unknown, and never an error."""
    nonsense = (math.nan, math.inf, -1.0)
    for bad in nonsense:
        ranks = (*made().ranks[:3], Rank(rank=3, wall_s=bad))
        costs = of_run(made(ranks=ranks, total_s=bad, spans=(Span(None, "init", 0, bad),)))
        assert costs.items["Lambda, ranks"] == pytest.approx(30 * 1769 / 1024 * GB_SECOND)
        assert "server, while the run lasts" not in costs.items
        assert cost.of_run(made(ranks=(Rank(cpu_s=bad),)), PRICES) is None
        odd = tuple(Rank(wall_s=10.0, peak_memory_mb=bad) for _ in range(4))
        assert (
            of_run(made(ranks=odd)).items["Lambda, ranks"] == of_run(made()).items["Lambda, ranks"]
        )
    # Finite in MB, and beyond any float in bytes.
    odd = tuple(Rank(wall_s=10.0, peak_memory_mb=1e305, memory_limit_mb=1e305) for _ in range(4))
    assert cost.of_run(made(ranks=odd), PRICES) is None
    assert cost.of_run(made(ranks=odd, on="aws"), PRICES) is not None
    for value in (*nonsense, "2", [2], None, {}, 0):
        environment = {"threads": value, "cores_usable": value}
        assert of_run(made(environment=environment)).total_usd > 0


def test_more_threads_than_a_function_has_cores() -> None:
    many = made(world_size=1, environment={"threads": 8, "cores_usable": 8})
    costs = of_run(many)
    assert costs.items["Lambda, ranks"] == pytest.approx(400 * GB_SECOND)
    assert any("the most there is" in text for text in costs.assumptions)
