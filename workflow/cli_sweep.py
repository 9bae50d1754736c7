"""The command line of many runs: ``cosmic sweep``, and ``cosmic infer --batch-sizes``."""

from __future__ import annotations

import math
import re
import secrets
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

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
    Engine,
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
    from workflow.plan import Event, OnEvent, RunPlan
    from workflow.progress import View
    from workflow.results import Results
    from workflow.sweep import Execute, Manifest, Sweep
    from workflow.sweep_plan import Plan

__all__ = ["EXAMPLES", "infer_sizes", "numbers", "sweep"]

EXAMPLES = """\b
Examples:
  cosmic sweep                                   20 configurations, demo data
  cosmic sweep --world-size 1,2 --batch-size 32,128 --repeat 5
  cosmic sweep --data-size small,medium --name night
  cosmic sweep --name night                      go on with it
  cosmic sweep --on aws --world-size 1,8,32      by the stack cosmic

\b
Exit code: 0 done, 1 runs failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

_RESULTS = "./results"
_MOST_RANKS = 10_000
_AUTO = "auto is not swept; cosmic run and infer --batch-size auto say what they tried"
# Fields of a plan by what the command line calls them.
_OPTIONS = {
    "world_sizes": "--world-size",
    "batch_sizes": "--batch-size",
    "data_sizes": "--data-size",
    "fmi": "--no-fmi",
}
_INFER_OPTIONS = {"batch_sizes": "--batch-sizes"}


class _Job(NamedTuple):
    """A sweep that is asked for, and how its runs are done."""

    kind: Literal["sweep", "infer"]
    given: Mapping[str, Any]  # fields of its plan; None: as they were, or the default
    results: Path
    name: str | None
    timeout: float
    as_json: bool


def sweep(
    world_size: Annotated[
        list[str] | None,
        typer.Option(metavar="N,...", help="Numbers of ranks  [default: 1,2,3,4]"),
    ] = None,
    batch_size: Annotated[
        list[str] | None,
        typer.Option(metavar="N,...", help="Rows per call  [default: 8,16,32,64,128]"),
    ] = None,
    data_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE,...",
            help="Demo data: small, medium, large (1,253, 25,000, 100,000 rows)  [default: small]",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE", help="Your own: a .pt file, a folder of them, or an s3:// URL"
        ),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1000, help="Runs of each configuration  [default: 1]"),
    ] = None,
    on: Annotated[Where | None, typer.Option(help="This machine, or AWS  [default: local]")] = None,
    engine: Annotated[Engine | None, typer.Option(help="[default: torch]")] = None,
    precision: Annotated[Precision | None, typer.Option(help="[default: fp32]")] = None,
    model: Model = None,
    no_fmi: Annotated[bool, typer.Option("--no-fmi", help="Ranks do not talk.")] = False,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Of the order of the runs  [default: by chance]"),
    ] = None,
    results: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where sweeps are kept, on this machine.")
    ] = _RESULTS,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the sweep; one that is there goes on."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Limit for each run.")
    ] = 3600,
    as_json: AsJson = False,
    stack: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="CloudFormation stack  [default: cosmic]",
            rich_help_panel=AWS_PANEL,
        ),
    ] = None,
    state_machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|ARN",
            help="A state machine instead of a stack; needs --data, --aws-results, and "
            "--rendezvous or --no-fmi.",
            rich_help_panel=AWS_PANEL,
        ),
    ] = None,
    aws_results: Annotated[
        str | None,
        typer.Option(
            metavar="s3://...",
            help="Where the runs' files go  [default: results in the stack's bucket]",
            rich_help_panel=AWS_PANEL,
        ),
    ] = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A running server  [default: stack's]",
            rich_help_panel=AWS_PANEL,
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Run a job with all world sizes and batch sizes, and compare.

    The runs go in random order, every one is recorded when it ends, and a
    failure does not stop the others. What was stopped, however, goes on with
    --name: the runs that went well are not done again, those that failed are.
    """
    given = {
        "world_sizes": numbers("--world-size", world_size, _MOST_RANKS),
        "batch_sizes": numbers("--batch-size", batch_size),
        "data_sizes": _sizes(data_size),
        "data": data,
        "repeat": repeat,
        "on": on and on.value,
        "engine": engine and engine.value,
        "precision": precision and precision.value,
        "model": model,
        "fmi": False if no_fmi else None,
        "seed": seed,
        "stack": stack,
        "state_machine": state_machine,
        "aws_results": aws_results,
        "rendezvous": rendezvous,
        "endpoint_url": endpoint_url,
    }
    if data is not None and data_size is not None:
        raise wrong("--data", "--data-size is for the demo data; leave one out")
    _go(_Job("sweep", given, _folder(results), name, timeout, as_json))


def infer_sizes(
    given: Mapping[str, Any], results: str | None, name: str | None, timeout: float, as_json: bool
) -> None:
    """Measure `cosmic infer` with several batch sizes, each in a process of its own.

    Args:
        given: fields of a `Plan`; None: as it was, or the default.
    """
    usual = {"world_sizes": (1,), **given}
    _go(_Job("infer", usual, _folder(results or _RESULTS), name, timeout, as_json))


def numbers(
    option: str, texts: list[str] | None, most: int = 999_999_999
) -> tuple[int, ...] | None:
    """Parse lists of whole numbers, as in "1,2,3"; each number counts once.

    Raises:
        typer.BadParameter: one is none, or below 1, or above ``most``.
    """
    found = []
    for text in _words(option, texts):
        number = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
        if not 1 <= number <= most:
            limit = f"from 1 to {most:,}; give some, as in 1,2,4"
            auto = f" ({_AUTO})" if text == "auto" else ""
            raise wrong(option, f"{text!r} is no whole number {limit}{auto}")
        found.append(number)
    return tuple(dict.fromkeys(found)) or None


def _folder(place: str) -> Path:
    if "://" in place:
        text = f"{place}: a sweep is kept on this machine; on AWS see --aws-results"
        raise wrong("--results", text)
    check_output("--results", place)
    return Path(place)


def _sizes(texts: list[str] | None) -> tuple[str, ...] | None:
    found = _words("--data-size", texts)
    for text in found:
        if text not in list(Size):
            names = ", ".join(Size)
            raise wrong("--data-size", f"{text!r} is none of {names}; for others there is --data")
    return tuple(dict.fromkeys(found)) or None


def _words(option: str, texts: list[str] | None) -> list[str]:
    words = [word.strip() for text in texts or () for word in text.split(",")]
    if "" in words:
        raise wrong(option, f"{','.join(texts or ())!r} has an empty place between commas")
    return words


# -- what both have in common --------------------------------------------------------------------


def _go(job: _Job) -> None:
    """Begin the sweep or go on with it, to its end."""
    from lambda_worker.storage import StorageError
    from workflow.aws_calls import AwsError
    from workflow.sweep import SweepError, locked, new_folder, read_manifest

    job = _checked(job)
    try:
        # Before anything is written: what is asked for may not fit to what is there.
        named = job.results / job.name if job.name else None
        _plan(job, named, read_manifest(named) if named else None)
        folder = named or new_folder(job.results, job.kind)
        with locked(folder):
            old = read_manifest(folder)  # another process may have been at work on it meanwhile
            _work(job, folder, old, _plan(job, folder, old))
    except (AwsError, StorageError, SweepError, OSError) as error:
        fail(error, job.as_json)


def _checked(job: _Job) -> _Job:
    """Refuse what can be seen to be wrong from the options alone."""
    if job.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", job.name):
        raise wrong("--name", f"{job.name!r}: use letters, digits and . _ -, at most 64")
    if not math.isfinite(job.timeout):
        raise wrong("--timeout", f"{job.timeout} is not a number of seconds")
    given = {field: value for field, value in job.given.items() if value is not None}
    return job._replace(given=given)


def _plan(job: _Job, folder: Path | None, old: Manifest | None) -> Plan:
    """The plan of the sweep that is in the folder, or of a new one, with what is given now."""
    from lambda_worker.storage import absolute
    from workflow.sweep import SweepError
    from workflow.sweep_plan import Plan, PlanError, extend

    given = dict(job.given)
    for field in ("data", "model"):
        if field in given and "://" not in given[field]:
            given[field] = absolute(given[field])
    if old is None:
        if job.kind == "infer" and "batch_sizes" not in given:
            raise wrong("--batch-sizes", f"needed, as {folder} is not there to go on with")
        if "data" not in given:
            given.setdefault("data_sizes", (Size.small.value,))
        plan = Plan(**{"repeat": 1, "seed": secrets.randbelow(2**31)} | given)
    elif old.kind != job.kind:
        command = _again(old.kind, str(folder), job.results)
        raise SweepError(f"{folder} is of another kind; go on with: {command}")
    else:
        try:
            plan = extend(old.plan, given)
        except PlanError as error:
            options = _OPTIONS if job.kind == "sweep" else _INFER_OPTIONS
            option = options.get(error.field, f"--{error.field.replace('_', '-')}")
            raise wrong(option, str(error)) from None
    _check_plan(plan, "data_sizes" in job.given)
    return plan


def _check_plan(plan: Plan, sizes_given: bool) -> None:
    if plan.on == "aws":
        size = Size(plan.data_sizes[0]) if sizes_given else None
        check(_run_plan(plan, 1), size, _aws_options(plan), "--aws-results")
        return
    check_data(plan.data)
    check_model(plan.model)
    aws = ("stack", "state_machine", "aws_results", "rendezvous", "endpoint_url")
    why = "on this machine nothing of AWS is used"
    refuse({f"--{field.replace('_', '-')}": getattr(plan, field) for field in aws}, "aws", why)


def _work(job: _Job, folder: Path, old: Manifest | None, plan: Plan) -> None:
    """Do what is left of the plan, write the report and show what came out."""
    from workflow.progress import open_view
    from workflow.sweep import Manifest, Sweep
    from workflow.sweep_view import End

    with open_view(*(AWS_VIEW if plan.on == "aws" else ())) as view:
        now = _environment(plan)
        manifest = Manifest(kind=job.kind, plan=plan, environment=now)
        if old is not None:
            manifest = old.model_copy(update={"plan": plan})
        it = Sweep(folder, manifest)
        runs = "1 run" if len(it.items) == 1 else f"{len(it.items):,} runs"
        view.step(f"sweep: {folder}, {runs}, {it.done:,} of them done before")
        for file in it.unreadable:
            view.step(f"  {file} cannot be understood; that run is done again")
        again = _again(job.kind, str(folder), job.results)
        if it.todo:  # else neither data nor AWS are needed
            make = _runs if job.kind == "sweep" else _infers
            try:
                execute = make(job, plan, folder, view)
            except Exception:
                if old is None:  # nothing has begun, and there is nothing to go on with
                    it.forget()
                raise
            _until_done(it, execute, view, again)
        results, page = _report(it, view)
    warnings = _other_machine(manifest.environment, now)
    end = End(it, results, page, warnings, again)
    print(end.as_json()) if job.as_json else end.show()
    if it.failed:
        raise SystemExit(1)


def _until_done(it: Sweep, execute: Execute, view: View, again: str) -> None:
    import asyncio

    from lambda_worker.storage import StorageError
    from workflow.processes import run_until_signal

    def kept() -> str:
        return f"{it.done} of {len(it.items)} runs are done, go on with: {again}"

    async def work() -> None:
        try:
            await it.work(execute, view.step)
        except asyncio.CancelledError as error:
            raise asyncio.CancelledError("; ".join([*error.args, kept()])) from None

    try:
        run_until_signal(work())
    except (StorageError, OSError) as error:
        raise StorageError(f"{error}; {kept()}") from error


def _again(kind: str, folder: str, results: Path) -> str:
    """The command that goes on with a sweep."""
    place = "" if results == Path(_RESULTS) else f" --results {shlex.quote(str(results))}"
    return f"cosmic {kind} --name {Path(folder).name}{place}"


def _environment(plan: Plan) -> dict[str, Any]:
    """This machine, if it is what is measured."""
    if plan.on == "aws":
        return {}
    from workflow.environment import describe

    return describe(plan.threads, "torch" if plan.engine == "auto" else plan.engine)


def _other_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = ("cpu", "architecture", "cores_usable", "threads", "versions")
    if not before or not (changed := [n for n in names if before.get(n) != now.get(n)]):
        return []
    return [
        f"Warning: since the sweep was begun, this machine has changed ({', '.join(changed)}): do "
        "not compare\nruns of before with runs of now."
    ]


# -- how the runs are done -----------------------------------------------------------------------


def _runs(job: _Job, plan: Plan, folder: Path, view: View) -> Execute:
    from workflow.sweep_runs import runs_here, runs_on_aws

    run_plan, on_event = _run_plan(plan, job.timeout), _ranks_only(view)
    if plan.on == "local":
        return runs_here(run_plan, _data_here(plan, view), on_event)
    options = _aws_options(plan)
    use_endpoint(options)
    sizes = [Size(size) for size in plan.data_sizes] or [Size.small]
    names = dict(zip(plan.datasets, sizes, strict=True))
    plans = {name: resolve(run_plan, size, options, view) for name, size in names.items()}
    return runs_on_aws(folder.name, plans, on_event)


def _infers(job: _Job, plan: Plan, folder: Path, view: View) -> Execute:
    from workflow.sweep_runs import infers

    return infers(plan, _data_here(plan, view), job.timeout)


def _data_here(plan: Plan, view: View) -> Callable[[str], str]:
    """Make the demo data that are not there yet; returns what each of the data are called here."""
    paths: dict[str, Path] = {
        size: data_path(Size(size), Split.test, 0) for size in plan.data_sizes
    }
    for size, path in paths.items():
        make_once(path, Size(size), 0, view)
    return lambda data: str(paths.get(data, data))


def _run_plan(plan: Plan, timeout: float) -> RunPlan:
    from workflow.plan import RunPlan

    return RunPlan(
        data=plan.data or "",
        model=plan.model,
        results=plan.aws_results or "",
        fmi=plan.fmi,
        rendezvous=plan.rendezvous,
        engine=plan.engine,
        precision=plan.precision,
        timeout=timeout,
    )


def _aws_options(plan: Plan) -> AwsOptions:
    return AwsOptions(plan.stack, plan.state_machine, plan.endpoint_url)


def _ranks_only(view: View) -> OnEvent:
    """Show how far the ranks are; a run's steps would hide the sweep's."""
    from workflow.plan import Step
    from workflow.progress import tell

    def show(event: Event) -> None:
        if not isinstance(event, Step):
            tell(view, event)

    return show


# -- the end ---------------------------------------------------------------------------------------


def _report(it: Sweep, view: View) -> tuple[Results, str | None]:
    """Read the sweep as anybody would, and write its page; returns where that is."""
    view.step("report: reading the runs, drawing the plots")  # first: matplotlib takes its time
    from lambda_worker.storage import StorageError
    from workflow.calls import error_text
    from workflow.report import write
    from workflow.results import read

    results = read([str(it.folder)])
    try:
        page = write(results, str(it.folder / "report"), title=f"Sweep {it.folder.name}")
    except (StorageError, OSError, ValueError) as error:
        view.step(f"no report: {error_text(error)}")  # the runs are there all the same
        return results, None
    return results, page.paths[0]
