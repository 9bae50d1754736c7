"""The command line of jobs: ``cosmic run``, on this machine or on AWS."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmi_client.hosts import parse_endpoint
from workflow.cli_aws import (
    AWS_PANEL,
    AWS_VIEW,
    AwsOptions,
    EndpointUrl,
    Where,
    check,
    refuse,
    resolve,
    use_endpoint,
)
from workflow.cli_base import (
    AsJson,
    BatchSize,
    Engine,
    EngineOption,
    Model,
    Precision,
    check_data,
    check_model,
    check_output,
    fail,
    wrong,
)
from workflow.cli_data import Size, Split, make_once
from workflow.demo import data_path

if TYPE_CHECKING:
    from workflow.plan import OnEvent, RunPlan, RunResult
    from workflow.progress import View

    Work = Callable[[RunPlan, OnEvent], Coroutine[Any, Any, RunResult]]

__all__ = ["EXAMPLES", "run"]

EXAMPLES = """\b
Examples:
  cosmic run                                     demo data, 4 ranks
  cosmic run --world-size 2 --batch-size 64
  cosmic run --data ./mine --results ./out       your .pt files
  cosmic run --json | jq .summary.metrics        for programs
  cosmic run --on aws --world-size 32            on AWS, by the stack cosmic

\b
Exit code: 0 done, 1 the run failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

_LOCAL = "Only with --on local"
_RESULTS = "./results"


def run(
    on: Annotated[
        Where, typer.Option(help="This machine, or AWS Step Functions and Lambda.")
    ] = Where.local,
    world_size: Annotated[
        int, typer.Option(metavar="N", min=1, max=10_000, help="Number of ranks.")
    ] = 4,
    batch_size: BatchSize = "128",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="A .pt file, a folder of them, or an s3:// URL  [default: demo data; on AWS: "
            "datasets/SIZE in the stack's bucket]",
        ),
    ] = None,
    data_size: Annotated[
        Size | None,
        typer.Option(help="Demo data: 1,253, 25,000 or 100,000 rows  [default: small]"),
    ] = None,
    model: Model = None,
    engine: EngineOption = Engine.torch,
    results: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Folder or s3:// URL  [default: ./results; on AWS: results in the stack's bucket]",
        ),
    ] = None,
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
        typer.Option(
            metavar="HOST:PORT",
            help="A running server  [default: start one here; on AWS: the stack's]",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Limit for the whole run.")
    ] = 3600,
    as_json: AsJson = False,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Seed of the demo data  [default: 0]", rich_help_panel=_LOCAL
        ),
    ] = None,
    stack: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="CloudFormation stack with state machine, bucket, server and secrets  "
            "[default: cosmic]",
            rich_help_panel=AWS_PANEL,
        ),
    ] = None,
    state_machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|ARN",
            help="A state machine instead of a stack; needs --data, --results, and --rendezvous or "
            "--no-fmi.",
            rich_help_panel=AWS_PANEL,
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Run a job: init, one worker per rank, summarize.

    Ends with a table of all ranks, combined_data.json and a plot of predicted against
    spectroscopic redshift. On this machine, without --data, it first makes a demo dataset, under
    ./data. On AWS it starts an execution of the deployed state machine and follows it; Ctrl-C
    stops the execution. Data, model and results are s3:// URLs there.
    """
    if data is not None and (data_size is not None or seed is not None):
        raise wrong("--data", "--data-size and --seed are for the demo data; leave them out")
    _check_run(name, rendezvous, no_fmi)
    if not math.isfinite(timeout):
        raise wrong("--timeout", f"{timeout} is not a number of seconds")
    from workflow.plan import RunPlan

    plan = RunPlan(
        data=data or "",
        world_size=world_size,
        batch_size=batch_size,
        model=model,
        results=results or "",
        run=name,
        fmi=not no_fmi,
        rendezvous=rendezvous,
        engine=engine.value,
        precision=precision.value,
        strict=strict,
        timeout=timeout,
    )
    aws = {"--stack": stack, "--state-machine": state_machine, "--endpoint-url": endpoint_url}
    size = data_size or Size.small
    begin: Callable[[View], tuple[RunPlan, Work]]
    if on is Where.aws:
        refuse({"--seed": seed}, "local", "on AWS the data are in the bucket already")
        options = AwsOptions(stack, state_machine, endpoint_url)
        check(plan, data_size, options)
        begin = partial(_begin_on_aws, plan, size, options)
    else:
        refuse(aws, "aws", "on this machine nothing of AWS is used")
        check_data(data)
        check_model(model)
        check_output("--results", results or _RESULTS)
        begin = partial(_begin_here, plan, size, seed or 0)
    _finish(on, begin, as_json)


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


def _begin_here(plan: RunPlan, size: Size, seed: int, view: View) -> tuple[RunPlan, Work]:
    """Make the demo dataset of this size and seed if the plan has no data; returns the whole plan.

    The second is what does it.
    """
    from workflow.local import run_job

    path = data_path(size, Split.test, seed)
    if not plan.data:
        make_once(path, size, seed, view)
    return replace(plan, data=plan.data or str(path), results=plan.results or _RESULTS), run_job


def _begin_on_aws(
    plan: RunPlan, size: Size, options: AwsOptions, view: View
) -> tuple[RunPlan, Work]:
    """Ask the stack for what the plan does not say; returns the same as `_begin_here`."""
    from workflow.aws import run_on_aws

    use_endpoint(options)
    full, target = resolve(plan, size, options, view)
    return full, lambda plan, on_event: run_on_aws(plan, target, on_event)


def _finish(on: Where, begin: Callable[[View], tuple[RunPlan, Work]], as_json: bool) -> None:
    """Run the job, leave run.json and the plot beside its results, and show what came out."""
    from lambda_worker.storage import StorageError
    from workflow.aws_calls import AwsError
    from workflow.calls import RunFailed
    from workflow.processes import run_until_signal
    from workflow.progress import open_view, tell

    try:
        with open_view(*(AWS_VIEW if on is Where.aws else ())) as view:
            plan, work = begin(view)
            with _own_folder(plan):
                result = run_until_signal(work(plan, partial(tell, view)))
                _note(result, plan, on, view)
                plot = _plot(result, view)
    except (RunFailed, AwsError, StorageError, OSError) as error:
        fail(error, as_json)
    _show(result, plot, as_json)


def _own_folder(plan: RunPlan) -> AbstractContextManager[None]:
    """Two runs of one name would replace each other's records; S3 has no locks."""
    from lambda_worker.storage import local_path
    from workflow.alone import alone

    folder = local_path(f"{plan.results}/{plan.run}") if plan.run else None
    return alone(folder, "take another --run") if folder else nullcontext()


def _note(result: RunResult, plan: RunPlan, on: Where, view: View) -> None:
    """Leave run.json beside the results; these are there all the same if it cannot be written."""
    from lambda_worker.storage import StorageError
    from workflow.runfile import save

    try:
        save(result, plan, on.value)
    except StorageError as error:
        view.step(f"no run.json: {error}")


def _plot(result: RunResult, view: View) -> str | None:
    """Draw the plot beside the results; returns its URL."""
    from lambda_worker.storage import StorageError
    from workflow.calls import error_text
    from workflow.plot import save_plot

    if not result.summary["rows"] - result.summary["rows_excluded"]:
        return None
    view.step("plot: predicted against spectroscopic redshift")
    plot = f"{result.folder}/redshift.png"
    try:
        save_plot(result.predictions, result.summary["metrics"], plot)
    except (StorageError, OSError) as error:
        view.step(f"no plot: {error_text(error)}")  # the results are there all the same
        return None
    return plot


def _show(result: RunResult, plot: str | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(result) | {"plot": plot}))
        return
    from workflow.table import print_result

    print_result(result, plot)
