"""The command line of costs: ``cosmic cost``."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from workflow.cli_base import AsJson, fail, wrong

if TYPE_CHECKING:
    from workflow.estimate import Speed

__all__ = ["EXAMPLES", "cost"]

EXAMPLES = """\b
Examples:
  cosmic cost --rows 659817                          which ranks, which memory
  cosmic cost --rows 659817 --world-size 130 --memory 1769
  cosmic cost --rows 25000 --from results/sweep-1    by speeds measured here
  cosmic cost --rows 659817 --plot frontier.png
  cosmic cost --rows 659817 --json | jq .cheapest    for programs

\b
Exit code: 0 done, 1 it cannot be said or done, 2 wrong usage.
"""


MOST_RATE = 10_000_000


class MeasuredEngine(StrEnum):
    torch = "torch"
    onnx = "onnx"
    openvino = "openvino"


class Arch(StrEnum):
    x86 = "x86"
    arm = "arm"


def cost(
    rows: Annotated[
        int, typer.Option(metavar="N", min=1, max=10**12, help="Rows (galaxies) to predict.")
    ],
    world_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=10_000, help="Number of ranks  [default: try many]"),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="MB",
            min=128,
            max=10_240,
            help="Size of each function, 1,769 for a core  [default: try many]",
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="PLACE",
            help="Take speed, start and memory from these results: a sweep, a run, or what "
            "cosmic infer --json wrote. May be repeated.",
        ),
    ] = None,
    engine: Annotated[
        MeasuredEngine | None,
        typer.Option(help="Whose speed in docs/performance.md counts  [default: torch]"),
    ] = None,
    rows_per_second: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Of one thread on one core, in place of the engine's."),
    ] = None,
    max_world_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=10_000,
            help="Most ranks to try; AWS allows an account 1,000 functions at once unless asked.",
        ),
    ] = 1000,
    arch: Annotated[Arch, typer.Option(help="Whose prices; speeds stay as measured.")] = Arch.x86,
    region: Annotated[
        str | None, typer.Option(metavar="NAME", help="Refuse prices of another region.")
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Other prices: a copy of workflow/prices.toml."),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Draw cost against time: a .png file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate time and cost of a run on AWS, and what is best.

    With --world-size and --memory: of that choice, item by item. Always: the choices of ranks and
    memory that no other beats in both time and cost, with the cheapest, the fastest, and the knee
    between them.
    """
    _check(source, engine, rows_per_second, plot)
    from lambda_worker.storage import StorageError
    from workflow.cost import PricesError, load_prices
    from workflow.cost_view import Answer, as_dict, print_answer, save_plot
    from workflow.estimate import NotMeasured, Unfit, estimate, frontier, world_sizes

    try:
        table = load_prices(prices, region)
        speed = _speed(source, (engine or MeasuredEngine.torch).value, rows_per_second)
        sizes = [world_size] if world_size and not memory else world_sizes(max_world_size, rows)
        memories = [memory] if memory and not world_size else None
        asked = None
        if world_size and memory:
            asked = estimate(rows, world_size, memory, speed, table, arch.value)
        best = frontier(rows, speed, table, arch.value, world_sizes=sizes, memory=memories)
        answer = Answer(rows, arch.value, speed, table, best, asked)
        if plot:
            save_plot(answer, plot)
    except (PricesError, NotMeasured, Unfit, StorageError, OSError) as error:
        fail(error, as_json)
    if as_json:
        print(json.dumps(as_dict(answer)))
    else:
        print_answer(answer, plot)


def _check(
    source: list[str] | None,
    engine: MeasuredEngine | None,
    rate: float | None,
    plot: str | None,
) -> None:
    if source and (engine or rate is not None):
        other = "--engine" if engine else "--rows-per-second"
        raise wrong(other, "the results of --from tell the speed; leave one out")
    if rate is not None and not 0 < rate <= MOST_RATE:
        raise wrong("--rows-per-second", f"{rate} is not a number above 0, {MOST_RATE:,} at most")
    if plot and not plot.endswith(".png"):
        raise wrong("--plot", f"{plot}: expected a name that ends with .png")


def _speed(source: list[str] | None, engine: str, rate: float | None) -> Speed:
    from workflow.estimate import ENGINES, NotMeasured, given, measured

    if source:
        from workflow.results import read

        try:
            results = read(source)
            if not results.runs:
                raise ValueError(f"there are no results in {', '.join(source)}")
            return measured(results.runs)
        except ValueError as error:  # ResultsError: a path that cannot be read at all
            raise NotMeasured(str(error)) from None
    return ENGINES[engine] if rate is None else given(ENGINES[engine], rate)
