"""docs/architecture.md and the decisions: every module is there, and what they name exists."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PAGES = [PAGE, *sorted((ROOT / "docs" / "adr").glob("*.md"))]
PACKAGES = (
    *("fmi_client", "rendezvous_server", "lambda_worker", "workflow"),
    *("deploy", "benchmarks", "examples", "tests"),
)
# A path of the repository between backticks. Bare names of files ("run.json") are a run's.
PATH = re.compile(rf"`((?:{'|'.join(PACKAGES)}|docs)/[\w./*-]+)`")
FUNCTION = re.compile(r"`([A-Za-z_][\w.]*)\(\)`")
CLASS = re.compile(r"`([A-Z][a-z]\w*[a-z]\w*)`")


def blocks(text: str) -> list[str]:
    """Split a page into paragraphs, items of lists and rows of tables."""
    return re.split(r"\n(?:\n+|(?=\* |\d+\. |\|))", text)


@cache
def modules() -> tuple[str, ...]:
    """All Python files of the packages; those without a line need no word."""
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return tuple(str(path.relative_to(ROOT)) for path in found if path.stat().st_size)


def is_meant(module: str, named: str) -> bool:
    """Whether a path, or one with `*` in place of a name, is this module."""
    return re.fullmatch(re.escape(named).replace(r"\*", "[^/]*"), module) is not None


@cache
def definitions(path: str) -> frozenset[str]:
    """Functions, classes and methods of a module, these with and without their class."""
    return frozenset(_definitions(ast.parse((ROOT / path).read_text())))


def _definitions(tree: ast.AST, owner: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from (node.name, f"{owner}{node.name}")
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{node.name}.")


@cache
def all_source() -> str:
    return "\n".join((ROOT / module).read_text() for module in modules())


def heads() -> list[str]:
    """The paths at the heads of the paragraphs of modules."""
    (_, part) = PAGE.read_text().split("\n## The modules\n")
    found = re.findall(r"^\*\*(`.+?`)\*\* —", part, re.MULTILINE)
    return [path for head in found for path in PATH.findall(head)]


def test_every_module_has_its_paragraph() -> None:
    named = heads()
    missing = [m for m in modules() if not any(is_meant(m, path) for path in named)]
    assert not missing, "docs/architecture.md says nothing of these"
    assert len(set(named)) == len(named), "a module has two paragraphs"
    assert all(path.startswith("tests/") for path in named if "*" in path), "name them one by one"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    for path in PATH.findall(page.read_text()):
        assert list(ROOT.glob(path)), f"{page.name} names {path}"
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} points at {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_that_is_named_exists_where_it_is_said_to_be(page: Path) -> None:
    for block in blocks(page.read_text()):
        places = [path for path in PATH.findall(block) if path.endswith(".py") and "*" not in path]
        known = {name for path in places for name in definitions(path)}
        for name in FUNCTION.findall(block):
            assert name in known, f"{page.name} names {name}(), which is not in {places or block}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_class_that_is_named_exists(page: Path) -> None:
    named = set(CLASS.findall(page.read_text())) - set(dir(builtins))
    defined = set(re.findall(r"^(?: *class )?([A-Z]\w+)(?: =|\(|:)", all_source(), re.MULTILINE))
    assert not {name for name in named - defined if not (ROOT / name).exists()}


def test_the_decisions_are_listed_in_order() -> None:
    listed = re.findall(r"\]\(adr/([^)]+)\)", PAGE.read_text().split("\n## Decisions\n")[1])
    assert listed == [page.name for page in PAGES[1:]]
    for number, page in enumerate(PAGES[1:], 1):
        text = page.read_text()
        assert text.startswith(f"# {number:04}: ")
        parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert parts == ["Context", "Decision", "Consequences", "Tried and measured"]
