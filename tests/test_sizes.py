"""Files, and functions, stay small enough to be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from statistics import median

from tests.test_architecture import ROOT, modules

Function = ast.FunctionDef | ast.AsyncFunctionDef

LONGEST_FILE = 500
LONGEST_FUNCTION = 60
USUAL_FUNCTION = 10
"""Lines; of a function without its arguments and docstring, which users need as long as it takes,
and without functions and classes inside it, which are counted by themselves."""


def functions(module: str) -> Iterator[tuple[int, str]]:
    """Each function's lines, and where it is."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, Function):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = sum(map(length, body)) - sum(map(length, inside(node)))
            yield lines, f"{module}: {node.name}"


def length(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def inside(node: ast.AST) -> Iterator[ast.stmt]:
    """The outermost functions and classes within."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            yield child
        else:
            yield from inside(child)


def test_files() -> None:
    lengths = {module: len((ROOT / module).read_text().splitlines()) for module in modules()}
    assert not {module: n for module, n in lengths.items() if n > LONGEST_FILE}


def test_functions() -> None:
    found = [function for module in modules() for function in functions(module)]
    assert not [function for function in found if function[0] > LONGEST_FUNCTION]
    assert median(lines for lines, _ in found) <= USUAL_FUNCTION
