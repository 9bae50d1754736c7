"""The command line of datasets: ``cosmic data make``, ``split`` and ``upload``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workflow.cli_base import Grouped, check_output, fail, group, wrong
from workflow.demo import data_path

if TYPE_CHECKING:
    from workflow.progress import View

commands = group("Datasets: make one of demo galaxies, split one, upload one.")


class Size(StrEnum):
    """How much demo data."""

    small = "small"
    medium = "medium"
    large = "large"


class Split(StrEnum):
    """Which part of the catalog: what the demo model was trained on, or was not."""

    train = "train"
    val = "val"
    test = "test"


@commands.command("make", cls=Grouped)
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
        typer.Option(
            metavar="FILE", help="The .pt file  [default: ./data/demo-SIZE-SPLIT-SEED-VERSION.pt]"
        ),
    ] = None,
) -> None:
    """Simulate SDSS-like galaxies and write them as a .pt file.

    Magnitudes and redshifts are real, the 32 x 32 ugriz cutouts are painted to them. The file holds
    a TensorDataset, which is in memory as a whole until it is written: 20 MB for 1,000 rows.
    """
    from lambda_worker.events import DATA_SIZES
    from workflow.progress import open_view

    path, count = out or data_path(str(rows or size), split, seed), rows or DATA_SIZES[size]
    _check_made(out, count, "--size" if rows is None else "--rows")
    try:
        with open_view() as view:
            _make(path, count, split, seed, view)
    except OSError as error:
        fail(error)
    print(path)


def _check_made(out: Path | None, rows: int, option: str) -> None:
    """Refuse a file that nobody would read, or that cannot be made or written."""
    from lambda_worker.batching import ROW_BYTES, available

    if out is not None:
        if out.suffix != ".pt":
            raise wrong("--out", f"{out}: expected a name that ends with .pt")
        check_output("--out", str(out.parent))
    need, left = rows * ROW_BYTES, available()[0]
    if need > left > 0:
        text = f"{rows:,} rows are {need / 1e9:,.1f} GB in memory, and {left / 1e9:,.1f} are there"
        raise wrong(option, text)


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
  cosmic data split parts --out eight --parts 8      a folder is one dataset

A split that was interrupted goes on where it stopped: give the same command
again.
"""


@commands.command("split", cls=Grouped, epilog=_SPLIT_EXAMPLES)
def split(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A .pt file, a folder of them, or an s3:// URL.")
    ],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where 1.pt to K.pt go.")],
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
    """Split a dataset into partitions, 1.pt to K.pt.

    Give one of --rows, --mb and --parts. Every number keeps its bits, and it takes less than 500 MB
    of memory, however large the file is.
    """
    if sum(option is not None for option in (rows, mb, parts)) != 1:
        raise wrong("--rows, --mb, --parts", "give exactly one of them")
    if mb is not None and not 0 < mb < math.inf:
        raise wrong("--mb", f"{mb} is no size")
    if "://" in out:
        raise wrong("--out", f"{out}: give a folder on this machine, then `cosmic data upload` it")
    if "://" not in source and not Path(source).exists():
        raise wrong("SOURCE", f"{source} does not exist")
    from lambda_worker.dataset import DatasetError
    from lambda_worker.storage import StorageError
    from workflow.progress import open_view

    try:
        with open_view("MB") as view:
            view.step(f"split: {source} into {out}")
            from workflow.split import Cut, SplitError
            from workflow.split import split as split_data

            tell = _in_megabytes(view, "split", "write")
            done = split_data(source, Path(out), Cut(rows, mb, parts), tell)
    except (SplitError, DatasetError, StorageError, OSError) as error:
        fail(error)
    kept = f", {done.kept:,} of them there before" if done.kept else ""
    size = f"up to {done.largest_rows:,} rows ({done.largest_bytes / 1e6:,.1f} MB) each"
    print(f"{out}: {done.parts:,} partitions of {size}{kept}; {done.rows:,} rows")
    print(f"use them: cosmic run --data {out}")


class Place(StrEnum):
    """A folder of the bucket."""

    small = "datasets/small"
    medium = "datasets/medium"
    large = "datasets/large"
    models = "models"
    configs = "configs"
    scripts = "scripts"


_UPLOAD_EXAMPLES = """\b
Examples:
  cosmic data upload parts s3://bucket --as datasets/small
  cosmic data upload model.safetensors s3://bucket --as models
  cosmic data upload parts s3://bucket/mine          any other place
  cosmic data upload parts s3://b --endpoint-url http://127.0.0.1:9000

What is there with the same size and SHA-256 is not sent again, so the same
command goes on after an interruption. Credentials and region come from the
usual AWS_... variables.
"""


@commands.command("upload", cls=Grouped, epilog=_UPLOAD_EXAMPLES)
def upload(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A file, or a folder: what is in it.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="s3://BUCKET[/PREFIX]", help="A bucket that exists.")
    ],
    place: Annotated[
        Place | None,
        typer.Option("--as", help="The folder for it  [default: s3://BUCKET/PREFIX itself]"),
    ] = None,
    endpoint_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Another S3 server  [default: AWS_ENDPOINT_URL, or AWS]"),
    ] = None,
) -> None:
    """Upload datasets, models, configs or code archives to a bucket.

    As a dataset go the .pt files of the folder, each of which is checked first; and the place may
    hold no others, since all .pt files of a folder are read as one dataset.
    """
    if not target.startswith("s3://") or not target.removeprefix("s3://").strip("/"):
        raise wrong("s3://BUCKET[/PREFIX]", f"{target!r} is none, as in s3://my-bucket")
    if endpoint_url is not None:
        os.environ["AWS_ENDPOINT_URL"] = endpoint_url
    from lambda_worker.dataset import DatasetError
    from lambda_worker.storage import StorageError
    from workflow.progress import open_view
    from workflow.upload import UploadError
    from workflow.upload import upload as upload_files

    url = target.rstrip("/") + (f"/{place.value}" if place else "")
    is_dataset = "datasets" in url.split("/")[3:]
    try:
        with open_view("MB") as view:
            view.step(f"upload: {source} to {url}")
            tell = _in_megabytes(view, "upload", "send")
            done = upload_files(source, url, is_dataset, tell)
    except (UploadError, DatasetError, StorageError, OSError) as error:
        fail(error)
    rows = "" if done.rows is None else f", {done.rows:,} rows"
    there = done.files - len(done.sent)
    kept = f"; {there:,} of them there before" if there else ""
    files = f"{done.files:,} file{'s' * (done.files > 1)}, {done.bytes / 1e6:,.1f} MB"
    print(f"{url}: {files}{rows}{kept}")
    if is_dataset:
        print(f"use it: cosmic run --data {url}")


def _in_megabytes(view: View, who: str, stage: str) -> Callable[[int, int], None]:
    """Progress in bytes, to be shown in MB."""
    return lambda done, of: view.update(who, stage, round(done / 1e6), max(round(of / 1e6), 1))
