"""Predictions of a dataset as a table for other programs: Parquet or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["COLUMNS", "problem", "save"]

COLUMNS = ("file", "row", "z_spec", "z_phot", "dz", "excluded", "flaw")
"""As docs/infer.md describes them."""


def problem(url: str) -> str | None:
    """Say why nothing could be saved under this name, or return None."""
    if not url.endswith((".parquet", ".csv")):
        return f"{url}: expected a name that ends with .parquet or .csv"
    if url.endswith(".parquet") and find_spec("pyarrow") is None:
        return f"{url}: needs pyarrow: pip install 'cosmic-fmi[parquet]', or name a .csv file"
    return None


def save(url: str, table: Mapping[str, Any], flaws: NDArray[np.uint8]) -> None:
    """Write the predictions to a path or URL, whole or not at all.

    Args:
        url: ends with .parquet or .csv.
        table: as `lambda_worker.records.table` makes it.
        flaws: as in `lambda_worker.inference.Inferred`.

    Raises:
        StorageError: it cannot be written.
    """
    from lambda_worker import storage

    columns = _columns(table, flaws)
    storage.write(url, _csv(columns) if url.endswith(".csv") else _parquet(columns))


def _columns(table: Mapping[str, Any], flaws: NDArray[np.uint8]) -> dict[str, Any]:
    import numpy as np

    from lambda_worker.inference import PARTS

    z_spec, z_phot = table["z_spec"], table["z_phot"]
    values = (
        np.array(table["files"] or [""], dtype=object)[table["file_index"]],
        table["row"],
        z_spec,
        z_phot,
        (z_phot - z_spec) / (1 + z_spec),  # NaN where z_phot is
        flaws != 0,
        np.array([None, *PARTS], dtype=object)[flaws],
    )
    return dict(zip(COLUMNS, values, strict=True))


def _parquet(columns: Mapping[str, Any]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    texts = {name: pa.array(columns[name], pa.string()) for name in ("file", "flaw")}
    parquet.write_table(pa.table({**columns, **texts}), buffer)
    return buffer.getvalue()


def _csv(columns: Mapping[str, Any]) -> bytes:
    # numpy's texts are the shortest that give the same number back; float32 in Python's would not.
    texts = {
        **columns,
        **{name: map(str, columns[name]) for name in ("z_spec", "z_phot", "dz")},
        "excluded": ("true" if value else "false" for value in columns["excluded"]),
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(zip(*(texts[name] for name in COLUMNS), strict=True))
    return buffer.getvalue().encode()
