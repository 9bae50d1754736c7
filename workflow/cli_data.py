"""The command line of demo data: ``cosmic data make``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workflow.cli_base import fail, group
from workflow.demo import data_path

if TYPE_CHECKING:
    from workflow.progress import View

commands = group("Demo datasets: SDSS-like galaxies with real magnitudes and redshifts.")


class Size(StrEnum):
    small = "small"
    medium = "medium"
    large = "large"


class Split(StrEnum):
    train = "train"
    val = "val"
    test = "test"


@commands.command("make")
def make(
    size: Annotated[Size, typer.Option(help="1,253, 25,000 or 100,000 rows.")] = Size.small,
    rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Another number of rows.")
    ] = None,
    split: Annotated[
        Split, typer.Option(help="Which galaxies; the demo model never saw those of test.")
    ] = Split.test,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of noise, shapes, order.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="The .pt file  [default: ./data/demo-SIZE-SPLIT-SEED-VERSION.pt]"),
    ] = None,
) -> None:
    """Simulate SDSS-like galaxies and write them as a .pt file, a TensorDataset.

    Magnitudes and redshifts are real, the 32 x 32 ugriz cutouts are painted to them.
    """
    from lambda_worker.events import DATA_SIZES
    from workflow.progress import open_view

    path = out or data_path(str(rows or size), split, seed)
    try:
        with open_view() as view:
            _make(path, rows or DATA_SIZES[size], split, seed, view)
    except OSError as error:
        fail(error)
    print(path)


def make_once(path: Path, size: Size, seed: int, view: View) -> None:
    """Make a demo dataset of test galaxies, unless it is there."""
    if path.exists():
        view.step(f"demo data: {path} is there already")
        return
    from lambda_worker.events import DATA_SIZES

    _make(path, DATA_SIZES[size], Split.test, seed, view)


def _make(path: Path, rows: int, split: Split, seed: int, view: View) -> None:
    view.step(f"demo data: simulating {rows:,} galaxies for {path}")
    from workflow import datasets

    datasets.make(
        path, rows, split.value, seed, lambda stage, n, of: view.update("data", stage, n, of)
    )
