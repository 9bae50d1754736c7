"""What the command line's modules share: how a group of commands looks, how a command fails."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperArgument, TyperCommand


class Engine(StrEnum):
    """What predicts; docs/engines.md."""

    torch = "torch"
    onnx = "onnx"
    openvino = "openvino"
    auto = "auto"


class Precision(StrEnum):
    """What is computed in."""

    fp32 = "fp32"
    bf16 = "bf16"


class Grouped(TyperCommand):
    """A command whose help has a section for each `rich_help_panel`, in plain text."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what the line "Usage:" says, arguments as they are in the list below it."""
        arguments = _arguments(self, ctx)
        names = {
            piece: param.metavar for param in arguments for piece in param.get_usage_pieces(ctx)
        }
        return [names.get(piece) or piece for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options, those of no panel first."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                is_argument = isinstance(param, TyperArgument)
                panel = "Arguments" if is_argument else "Options"
                panel = getattr(param, "rich_help_panel", None) or panel
                if is_argument and param.metavar:
                    record = (param.metavar, record[1])  # else typer adds <list[str]>
                sections.setdefault(panel, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _arguments(command: TyperCommand, ctx: Any) -> list[TyperArgument]:
    return [param for param in command.get_params(ctx) if isinstance(param, TyperArgument)]


def group(text: str) -> typer.Typer:
    """A group of commands under this help text, without subcommand: its help."""
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def fail(error: Exception, as_json: bool = False) -> NoReturn:
    """Say on one line what went wrong, on stdout as JSON too if asked, and exit with code 1."""
    from workflow.calls import error_json, error_text

    if as_json:
        print(json.dumps({"error": error_json(error)}))
    print(f"Error: {error_text(error)}", file=sys.stderr)
    raise SystemExit(1)


def check_data(data: str | None) -> None:
    """Refuse a --data that is not on this machine, before anything else is done."""
    if data is None or "://" in data:
        return
    if not Path(data).exists():
        text = f"{data} does not exist; name a .pt file or a folder, or leave it out for demo data"
        raise wrong("--data", text)
    if not data.endswith(".pt") and not Path(data).is_dir():
        raise wrong("--data", f"{data} is neither a folder nor a file that ends with .pt")


def check_model(model: str | None) -> None:
    """The same for --model."""
    if model is not None and "://" not in model and not Path(model).is_file():
        raise wrong("--model", f"{model}: no such file; leave it out for the demo model")


def check_output(option: str, folder: str) -> None:
    """Refuse a folder that nothing could be written to, before the work is done for it."""
    from lambda_worker.storage import StorageError, check_writable

    try:
        check_writable(folder)
    except StorageError as error:
        raise wrong(option, str(error)) from None


def batch_size(text: str) -> int | Literal["auto"]:
    """Parse --batch-size."""
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"{text!r} is neither a number of rows, 1 or more, nor auto")


def wrong(option: str, text: str) -> typer.BadParameter:
    """The error of an option; exit code 2."""
    return typer.BadParameter(text, param_hint=option)


Data = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="A .pt file, a folder of them, or an s3:// URL  [default: demo data]",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(metavar="PLACE", help="A .safetensors file or URL  [default: the demo model]"),
]
BatchSize = Annotated[
    Any,
    typer.Option(metavar="N|auto", parser=batch_size, help="Rows per call of the model, or auto."),
]
EngineOption = Annotated[
    Engine,
    typer.Option(help="What predicts; onnx and openvino need `cosmic model export` once."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, and only JSON, to stdout.")]
