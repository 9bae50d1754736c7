"""A demo dataset: simulated, then written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workflow.demo.catalogue import Split
from workflow.demo.galaxies import make_dataset, write_pt

__all__ = ["make"]


def make(
    path: Path, rows: int, split: Split, seed: int, progress: Callable[[str, int, int], None]
) -> None:
    """Simulate ``rows`` galaxies of ``split`` and write them to ``path``, whole or not at all.

    Args:
        progress: called with the stage, the rows done and all rows.

    Raises:
        OSError: the file cannot be written.
    """
    progress("load", 0, rows)
    arrays = make_dataset(rows, seed, split, lambda done, of: progress("simulate", done, of))
    progress("write", rows, rows)
    write_pt(arrays, path)
