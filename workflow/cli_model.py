"""The command line of models: ``cosmic model train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workflow.cli_base import fail, group

commands = group("The demo model.")


@commands.command("train")
def train(
    out: Annotated[Path, typer.Option(help="Folder for the three files.")] = Path("model"),
    epochs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Passes over the training rows.")
    ] = 30,
    rows: Annotated[
        int | None,
        typer.Option(metavar="N", min=16, help="Only so many rows of each split, for a quick try."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of data and start.")] = 0,
) -> None:
    """Train the demo model on the catalogue's train split; some minutes on two cores.

    Keeps the epoch that is best on val, and judges it once on test, whose galaxies it has never
    seen. Writes model.safetensors, training_log.json and metrics.json.
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
