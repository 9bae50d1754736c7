"""Documents for users of other libraries: tables of old call and new call, and how to run a row.

Needs numpy only, for the old side may run in another environment.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).parents[1] / "docs"


def rows(page: str) -> list[tuple[str, str]]:
    """Return the rows of a document whose two cells are code only."""
    return re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", (DOCS / page).read_text(), re.MULTILINE)


def blocks(page: str) -> list[str]:
    """Return the Python programs that a document shows."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """Execute statements; returns the value of the last one, None if it has none."""
    *before, last = ast.parse(code).body
    exec(compile(ast.Module(before, []), code, "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), code, "eval"), names)
    exec(compile(ast.Module([last], []), code, "exec"), names)
    return None


def plain(value: Any) -> Any:
    """Return what JSON can hold of a result: arrays and tuples as lists, numbers unchanged."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
