"""The command line of datasets: ``cosmic data make``, ``split`` and ``upload``."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workflow.cli_base import check_data, fail, group, wrong
from workflow.demo import data_path

if TYPE_CHECKING:
    from workflow.progress import View

commands = group(
    "Datasets: make one of demo galaxies, split one, upload it and what belongs to it."
)


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


_SPLIT_EXAMPLES = """\b
Examples:
  cosmic data split data/galaxies.pt --out parts --mb 25
  cosmic data split s3://bucket/all.pt --out parts --rows 1278
  cosmic data split parts --out eight --parts 8        a folder is one dataset

\b
A split that was interrupted goes on where it stopped: give the same command again.
"""


@commands.command("split", epilog=_SPLIT_EXAMPLES)
def split(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A .pt file, a folder of them, or an s3:// URL.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where 1.pt to K.pt go.")],
    rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Rows of each; the last may have fewer.")
    ] = None,
    mb: Annotated[
        float | None,
        typer.Option(metavar="N", help="As many rows as fit into N MB; 1 MB is 1,000,000 bytes."),
    ] = None,
    parts: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="K of them, equal to within one row.")
    ] = None,
) -> None:
    """Split a dataset into partitions 1.pt, 2.pt, ..., bit for bit, of any size.

    Give one of --rows, --mb and --parts. Memory stays below 200 MB however large the file is.
    """
    if sum(option is not None for option in (rows, mb, parts)) != 1:
        raise wrong("--rows, --mb, --parts", "give exactly one of them")
    if "://" in str(out):
        raise wrong("--out", "a folder on this machine; then use `cosmic data upload`")
    check_data(source)
    from lambda_worker.dataset import DatasetError
    from lambda_worker.storage import StorageError
    from workflow.progress import open_view

    try:
        with open_view("MB") as view:
            view.step(f"split: {source} into {out}")
            from workflow.split import Cut, SplitError
            from workflow.split import split as split_data

            done = split_data(
                source, out, Cut(rows, mb, parts), _in_megabytes(view, "split", "write")
            )
    except (SplitError, DatasetError, StorageError, OSError) as error:
        fail(error)
    kept = f", {done.kept:,} of them there before" if done.kept else ""
    size = f"up to {done.largest_rows:,} rows ({done.largest_bytes / 1e6:,.1f} MB) each"
    print(f"{out}: {done.parts:,} partitions of {size}{kept}; {done.rows:,} rows")
    print(f"use them: cosmic run --data {out}")


def _in_megabytes(view: View, who: str, stage: str) -> Callable[[int, int], None]:
    """Progress in bytes, to be shown in MB."""
    return lambda done, of: view.update(who, stage, done // 1_000_000, -(-of // 1_000_000))
