"""The command line of models: ``cosmic model train``, ``convert`` and ``export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from workflow.cli_base import Grouped, fail, group

commands = group("Models: train the demo model, convert AstroMAE, export to ONNX.")


@commands.command("train", cls=Grouped)
def train(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For the three files.")] = Path(
        "model"
    ),
    epochs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Passes over the training rows.")
    ] = 30,
    rows: Annotated[
        int | None,
        typer.Option(metavar="N", min=16, help="Only so many rows of each split, for a quick try."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of data and start.")] = 0,
) -> None:
    """Train the demo model on the catalogue's train split.

    It takes some minutes on two cores, keeps the epoch that is best on val, and judges it once on
    test, whose galaxies it has never seen. Writes model.safetensors, training_log.json and
    metrics.json.
    """
    from workflow.progress import open_view

    try:
        with open_view("steps") as view:
            view.step(f"model: training {epochs} epochs")
            from workflow.demo.train import train as train_model

            done = train_model(
                out,
                epochs=epochs,
                rows=rows,
                seed=seed,
                progress=lambda stage, n, of: view.update("model", stage, n, of),
            )
    except OSError as error:
        fail(error)
    names = {"NMAD": "nmad", "bias": "bias", "R²": "r2"}
    values = ", ".join(f"{name} {done[key]:.4f}" for name, key in names.items())
    print(f"{out / 'model.safetensors'}: {done['parameters']:,} parameters")
    print(f"on {done['n']:,} held-out galaxies: {values}")
    print(f"use it: cosmic run --model {out / 'model.safetensors'}")


@commands.command("convert", cls=Grouped)
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT.pt", help="What the original's torch.save wrote.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT.safetensors", help="The file to write or replace.")
    ],
    heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Attention heads, which a state_dict does not say  [default: 6]",
        ),
    ] = None,
) -> None:
    """Convert an AstroMAE checkpoint into a model file.

    A checkpoint is a pickled PyTorch module. Safe with files of strangers: nothing in the file is
    executed, and what it names beyond AstroMAE's own classes is refused by name. Neither timm nor
    the original code is needed.
    """
    from lambda_worker.checkpoint import convert as convert_file
    from lambda_worker.engine import ModelError

    try:
        done = convert_file(checkpoint, out, heads=heads)
    except (ModelError, OSError) as error:
        fail(error)
    config = done.config
    print(f"{out}: {done.parameters:,} parameters, from {done.form}")
    print(
        f"images {config.bands} x {config.image_size} x {config.image_size} in patches of "
        f"{config.patch}; transformer of width {config.width}, depth {config.depth}, "
        f"{config.heads} heads; Inception {config.inception}"
    )
    print(f"{checkpoint}: sha256 {done.sha256}")
    if done.heads_from == "default":
        text = f"Note: a state_dict does not say its attention heads; {config.heads} as published"
        print(f"{text}, give others with --heads.", file=sys.stderr)
    print(f"use it: cosmic run --model {out}")


_EXPORT_EXAMPLES = """\b
Examples:
  cosmic model export model.safetensors          writes model.onnx beside it
  cosmic run --model model.safetensors --engine onnx
"""


@commands.command("export", cls=Grouped, epilog=_EXPORT_EXAMPLES)
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A .safetensors file.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="The .onnx file  [default: beside it]")
    ] = None,
) -> None:
    """Export a model for the engines onnx and openvino.

    They need no torch, but one .onnx file, which both read. It is written only if ONNX Runtime
    predicts the same with it. Keep it beside the model, and export again after a change of the
    model: an old export is refused.
    """
    from lambda_worker.engine import EngineError, ModelError
    from workflow.progress import open_view

    try:
        with open_view("steps") as view:
            view.step("export: loading torch")
            from workflow.export import export as export_model

            done = export_model(model, out, view.step)
    except (ModelError, EngineError, OSError) as error:
        fail(error)
    print(f"{done.path}: {done.path.stat().st_size / 1e6:.1f} MB")
    print(f"largest difference to torch in z, on {done.rows} rows: {done.difference:.1e}")
    print(f"use it: cosmic run --model {done.path} --engine onnx")
