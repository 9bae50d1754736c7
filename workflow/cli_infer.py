"""The command line of inference in one process: ``cosmic infer``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workflow.cli_base import (
    AsJson,
    Data,
    Engine,
    Model,
    Precision,
    check_data,
    check_model,
    check_output,
    fail,
    wrong,
)
from workflow.cli_base import batch_size as parse_batch_size
from workflow.cli_data import Size, Split, make_once
from workflow.cli_sweep import infer_sizes, numbers
from workflow.demo import data_path

if TYPE_CHECKING:
    from workflow.infer import InferPlan, Json

__all__ = ["EXAMPLES", "infer"]

EXAMPLES = """\b
Examples:
  cosmic infer                                   demo data, demo model
  cosmic infer --data ./mine --model m.safetensors --batch-size auto
  cosmic infer --predictions z.parquet --plot z.png
  cosmic infer --profile --threads 1             where the time goes
  cosmic infer --batch-sizes 1,8,64 --repeat 3   which batch size is best
  cosmic infer --json | jq .metrics              for programs

\b
Exit code: 0 done, 1 it failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

_SEVERAL = "Several batch sizes"


def _device(text: str) -> str:
    if text != "cpu":
        raise typer.BadParameter(f"{text!r} is not supported, only cpu is")
    return text


def infer(
    data: Data = None,
    model: Model = None,
    batch_size: Annotated[
        Any,
        typer.Option(
            metavar="N|auto",
            parser=parse_batch_size,
            help="Rows per call of the model, or auto.  [default: 32]",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="cpu", parser=_device, help="Only cpu is supported.")
    ] = "cpu",
    engine: Annotated[
        Engine | None,
        typer.Option(
            help="What predicts; onnx and openvino need `cosmic model export` once.  "
            "[default: torch]"
        ),
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Number format of the model.  [default: fp32]")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1024, help="[default: the cores there are for it]"),
    ] = None,
    predictions: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Write all predictions: a .parquet or .csv file."),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Draw z_phot against z_spec: a .png file."),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Then see which operations of torch take the time."),
    ] = False,
    profile_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for --profile's trace.json.")
    ] = Path("profile"),
    strict: Annotated[
        bool,
        typer.Option(help="Rows with NaN or infinity are an error; else the metrics skip them."),
    ] = False,
    as_json: AsJson = False,
    batch_sizes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,...",
            help="Measure each of these, in a process of its own and in random order.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="Runs of each batch size  [default: 1]",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Of the order of the runs  [default: by chance]",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    results: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the measurements are kept  [default: ./results]",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the measurement; one that is there goes on.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Limit for each run  [default: 3600]",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
) -> None:
    """Predict a dataset in this process, and report what it took.

    Reports time, time per batch, throughput, memory, the metrics, and the
    machine. Rows with NaN or infinity are counted, named and left out of the
    metrics. --profile repeats a few batches after the timed run, which it
    therefore does not slow down. --batch-sizes measures several, with a table
    of time, throughput, memory and accuracy by batch size.
    """
    outputs = {"--predictions": predictions, "--plot": plot, "--profile": profile or None}
    several = {"--repeat": repeat, "--seed": seed, "--results": results, "--timeout": timeout}
    if batch_sizes is not None or name is not None:
        _refuse({"--batch-size": batch_size, **outputs}, "is for one run, without --batch-sizes")
        given = {
            "batch_sizes": numbers("--batch-sizes", batch_sizes),
            "data": data,
            "model": model,
            "engine": engine and engine.value,
            "precision": precision and precision.value,
            "threads": threads,
            "strict": strict or None,
            "repeat": repeat,
            "seed": seed,
        }
        return infer_sizes(given, results, name, timeout or 3600, as_json)
    _refuse(several, "goes with --batch-sizes only")
    engine, precision = engine or Engine.torch, precision or Precision.fp32
    check_data(data)
    check_model(model)
    _check_outputs(predictions, plot)
    if profile and engine is not Engine.torch:
        raise wrong("--profile", f"profiles torch only, and --engine is {engine.value}")
    make = data is None
    from workflow.infer import InferPlan

    plan = InferPlan(
        data=data or str(data_path(Size.small, Split.test, 0)),
        model=model,
        batch_size=batch_size or 32,
        engine=engine.value,
        precision=precision.value,
        threads=threads,
        strict=strict,
        predictions=predictions,
        plot=plot,
        profile=str(profile_dir) if profile else None,
    )
    report = _infer(plan, make, as_json)
    if as_json:
        print(json.dumps(report))
        return
    from workflow.infer_view import print_report

    print_report(report)


def _refuse(options: Mapping[str, object], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise wrong(option, why)


def _check_outputs(predictions: str | None, plot: str | None) -> None:
    from workflow.predictions import problem

    if predictions and (text := problem(predictions)):
        raise wrong("--predictions", text)
    if plot and not plot.endswith(".png"):
        raise wrong("--plot", f"{plot}: expected a name that ends with .png")
    for option, url in {"--predictions": predictions, "--plot": plot}.items():
        if url:
            check_output(option, url if "://" in url else str(Path(url).parent))


def _infer(plan: InferPlan, make: bool, as_json: bool) -> Json:
    from lambda_worker.dataset import DatasetError
    from lambda_worker.engine import EngineError, ModelError
    from lambda_worker.storage import StorageError
    from workflow.infer import infer as run
    from workflow.progress import open_view

    try:
        with open_view() as view:
            if make:
                make_once(Path(plan.data), Size.small, 0, view)
            return run(plan, view)
    except (DatasetError, EngineError, ModelError, StorageError, OSError) as error:
        fail(error, as_json)
