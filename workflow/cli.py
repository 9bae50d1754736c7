"""The command line: ``cosmic run``, and what other modules add to it.

Whatever is heavy is imported inside the commands, so that ``cosmic --help`` answers at once.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmi_client.transport.sockets import parse_endpoint
from workflow.check import EXAMPLES as CHECK_EXAMPLES
from workflow.check import check
from workflow.cli_base import (
    BatchSize,
    Data,
    Engine,
    EngineOption,
    Model,
    Precision,
    check_data,
    check_model,
    fail,
    group,
    wrong,
)
from workflow.cli_data import Size, Split, make_once
from workflow.cli_data import commands as data_commands
from workflow.cli_infer import EXAMPLES as INFER_EXAMPLES
from workflow.cli_infer import infer
from workflow.cli_model import commands as model_commands
from workflow.demo import data_path

if TYPE_CHECKING:
    from workflow.local import Event, RunPlan, RunResult

__all__ = ["app"]

app = group("Redshift inference by ranks that meet at a rendezvous and then talk directly.")
app.add_typer(data_commands, name="data")
app.add_typer(model_commands, name="model")


_RUN_EXAMPLES = """\b
Examples:
  cosmic run                                     demo data, 4 ranks
  cosmic run --world-size 2 --batch-size 64
  cosmic run --data ./mine --results ./out       your .pt files
  cosmic run --json | jq .summary.metrics        for programs

\b
Exit code: 0 done, 1 the run failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""


@app.command(epilog=_RUN_EXAMPLES)
def run(
    world_size: Annotated[
        int, typer.Option(metavar="N", min=1, max=10_000, help="Number of ranks.")
    ] = 4,
    batch_size: BatchSize = "128",
    data: Data = None,
    data_size: Annotated[
        Size | None,
        typer.Option(help="Demo data: 1,253, 25,000 or 100,000 rows  [default: small]"),
    ] = None,
    model: Model = None,
    engine: EngineOption = Engine.torch,
    results: Annotated[
        str, typer.Option(metavar="PLACE", help="Folder or s3:// URL for the results.")
    ] = "./results",
    name: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME", help="Name of the run  [default: by time]"),
    ] = None,
    no_fmi: Annotated[
        bool, typer.Option("--no-fmi", help="Ranks do not talk; summarize merges their records.")
    ] = False,
    precision: Annotated[
        Precision, typer.Option(help="bf16: faster, about 1e-3 off in z; needs a recent CPU.")
    ] = Precision.fp32,
    strict: Annotated[
        bool,
        typer.Option(help="Rows with NaN or infinity fail the run; else the metrics skip them."),
    ] = False,
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A running server  [default: start one here]"),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Limit for the whole run.")
    ] = 3600,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Seed of the demo data  [default: 0]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write JSON, and only JSON, to stdout.")
    ] = False,
) -> None:
    """Run a job on this machine: init, one process per rank, summarize.

    Ends with a table of all ranks, combined_data.json and a plot of predicted against
    spectroscopic redshift. Without --data it first makes a demo dataset, under ./data.
    """
    from lambda_worker.storage import StorageError
    from workflow.local import RunFailed, RunPlan

    if data is not None and (data_size is not None or seed is not None):
        raise wrong("--data", "--data-size and --seed are for the demo data; leave them out")
    check_data(data)
    check_model(model)
    _check_run(name, rendezvous, no_fmi)
    if not math.isfinite(timeout):
        raise wrong("--timeout", f"{timeout} is not a number of seconds")
    plan = RunPlan(
        data=data or str(data_path(data_size or Size.small, Split.test, seed or 0)),
        world_size=world_size,
        batch_size=batch_size,
        model=model,
        results=results,
        run=name,
        fmi=not no_fmi,
        rendezvous=rendezvous,
        engine=engine.value,
        precision=precision.value,
        strict=strict,
        timeout=timeout,
    )
    try:
        result, plot = _run(plan, demo=None if data else (data_size or Size.small, seed or 0))
    except (RunFailed, StorageError, OSError) as error:
        fail(error, as_json)
    _show(result, plot, as_json)


app.command(epilog=INFER_EXAMPLES)(infer)
app.command(epilog=CHECK_EXAMPLES)(check)


def _check_run(name: str | None, rendezvous: str | None, no_fmi: bool) -> None:
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise wrong("--run", f"{name!r}: use letters, digits and . _ -, at most 100")
    if rendezvous is None:
        return
    if no_fmi:
        raise wrong("--rendezvous", "with --no-fmi nobody joins a rendezvous; leave one out")
    try:
        parse_endpoint(rendezvous, default_port=0)
    except ValueError:
        text = f"{rendezvous!r} is not host:port, as in 127.0.0.1:10000"
        raise wrong("--rendezvous", text) from None


def _run(plan: RunPlan, demo: tuple[Size, int] | None) -> tuple[RunResult, str | None]:
    """Run the plan, on a demo dataset of this size and seed if given, and draw the plot."""
    from lambda_worker.storage import StorageError
    from workflow.local import RankProgress, run_job
    from workflow.plot import save_plot
    from workflow.processes import run_until_signal
    from workflow.progress import open_view

    with open_view() as view:
        if demo:
            make_once(Path(plan.data), *demo, view)

        def show(event: Event) -> None:
            if isinstance(event, RankProgress):
                view.update(f"rank {event.rank}", event.stage, event.rows, event.of)
            else:
                view.step(event.text)

        result = run_until_signal(run_job(plan, show))
        if not result.summary["rows"] - result.summary["rows_excluded"]:
            return result, None
        view.step("plot: predicted against spectroscopic redshift")
        plot = result.combined_data.rpartition("/")[0] + "/redshift.png"
        try:
            save_plot(result.predictions, result.summary["metrics"], plot)
        except (StorageError, OSError) as error:
            view.step(f"no plot: {error}")  # the results are there all the same
            return result, None
    return result, plot


def _show(result: RunResult, plot: str | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(result) | {"plot": plot}))
        return
    from workflow.table import print_result

    print_result(result, plot)
