"""Every row of the table of docs/reliability.md has its tests, and names no others."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOC = TESTS.parent / "docs" / "reliability.md"

ROW = re.compile(r"^\| (\d+) \|.*\| (.*) \|$", re.MULTILINE)
MARK = re.compile(r"pytest\.mark\.row\((\d+)\)")


def test_each_row_names_the_files_whose_tests_are_marked_with_it() -> None:
    said = {
        int(number): set(re.findall(r"`([\w/]+\.py)`", files))
        for number, files in ROW.findall(DOC.read_text())
    }
    marked: dict[int, set[str]] = {}
    for file in TESTS.rglob("test_*.py"):
        for number in MARK.findall(file.read_text()):
            marked.setdefault(int(number), set()).add(str(file.relative_to(TESTS)))
    assert marked == said
    assert sorted(said) == list(range(1, 23))
