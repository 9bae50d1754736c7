"""Files of results, which may come from strangers: found, read within limits, never trusted.

Nothing here raises for what stands in a file but `Unreadable`, whose text says what is wrong.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workflow.results import Finding

__all__ = ["MB", "Fields", "Tree", "Unreadable", "load", "plain", "table", "text"]

MB = 1e6

# Far above what a run of 10,000 ranks leaves, which is 40 MB in one file.
LARGEST = 64 << 20  # bytes of one file
LARGEST_TREE = 1 << 30  # bytes of all files that are read
MOST_FILES = 50_000
DEEPEST = 20  # folders below the one that was given
MOST_VALUES = 2_000_000  # in one file: each takes some 100 bytes of memory
LONGEST = 300  # characters of a text that is kept
# Beyond this, nothing is a number of seconds, bits or bytes; the sums stay finite.
MOST = 1e24


class Unreadable(ValueError):
    """The file cannot be used; the text says why."""


def plain(value: object, longest: int = LONGEST) -> str:
    """Return a text for one line of a terminal: no control characters, not too long."""
    shown = str(value)[: longest + 1]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else "?" for c in shown)
    return shown if len(shown) <= longest else shown[:longest] + "…"


def text(path: Path) -> str:
    """Return a file's text.

    Raises:
        Unreadable: it is too large, no ordinary file, not UTF-8, or the system does not let us.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("it is not an ordinary file")
        if status.st_size > LARGEST:
            raise Unreadable(f"{status.st_size / MB:,.0f} MB; {LARGEST / MB:.0f} MB is the limit")
        with path.open("rb") as file:
            data = file.read(status.st_size)  # not what it may have grown by since
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 at byte {error.start:,}") from None
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None


def load(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        Unreadable: as `text`, or it is not JSON, nested too deeply, or holds too many values.
    """
    content = text(path)
    if sum(map(content.count, ",[{")) > MOST_VALUES:
        raise Unreadable(f"more than {MOST_VALUES:,} values")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise Unreadable(
            f"not JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError:  # an integer of thousands of digits
        raise Unreadable("not JSON that can be read: a number is too long") from None
    except RecursionError:
        raise Unreadable("nested too deeply") from None


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file by its head's names, without blanks around names and values.

    Raises:
        Unreadable: as `text`, or it is not CSV.
    """
    content = text(path)
    if content.count(",") + content.count("\n") > MOST_VALUES:
        raise Unreadable(f"more than {MOST_VALUES:,} values")
    try:
        lines = list(csv.reader(io.StringIO(content), strict=True))
    except csv.Error as error:
        raise Unreadable(f"not CSV: {error}") from None
    head = [name.strip() for name in lines[0]] if lines else []
    return [
        dict(zip(head, (cell.strip() for cell in line), strict=False)) for line in lines[1:] if line
    ]


class Fields:
    """An object of a file, whose values may be missing, lists of one, texts, or nonsense.

    Attributes:
        odd: names of values that are there and are not what was asked for; each reads as None.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.odd: set[str] = set()

    def number(self, *names: str, least: float = -MOST) -> float | None:
        """Return the first of ``names`` that is there, as a finite number not below ``least``."""
        name = next((name for name in names if self.content.get(name) is not None), None)
        if name is None:
            return None
        found = _number(self.content[name])
        if found is None or not least <= found <= MOST:
            self.odd.add(name)
            return None
        return found

    def amount(self, *names: str) -> float | None:
        """Return a number that is not negative: seconds, bytes, a rate."""
        return self.number(*names, least=0.0)

    def count(self, *names: str) -> int | None:
        """Return a whole number that is not negative."""
        found = self.amount(*names)
        if found is None:
            return None
        if found == int(found):
            return int(found)
        self.odd |= {name for name in names if name in self.content}
        return None

    def word(self, name: str) -> str | None:
        """Return a text, for one line."""
        value = self.content.get(name)
        if value is None or isinstance(value, str):
            return plain(value) if value else None
        self.odd.add(name)
        return None

    def words(self, name: str) -> tuple[str, ...]:
        """Return a text or a list of texts."""
        value = self.content.get(name)
        values = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(each, str) for each in values):
            self.odd.add(name)
        return tuple(plain(each) for each in values if isinstance(each, str))

    def inner(self, name: str) -> Fields:
        """Return an object within this one; empty if there is none."""
        value = self.content.get(name)
        if isinstance(value, Mapping):
            return Fields(value)
        if value is not None:
            self.odd.add(name)
        return Fields({})


def _number(value: object) -> float | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and len(value) > 40:
        return None
    try:
        return float(value)  # NaN and infinity are beyond any limit
    except (ValueError, OverflowError):
        return None


class Tree:
    """The files of a folder, or the one file, that a path names.

    Attributes:
        findings: what was left out, and why.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.findings: list[Finding] = []

    def files(self) -> Iterator[Path]:
        """Yield files in the order of their names; links that lead out of the tree are left."""
        if not self.root.is_dir():
            yield self.root
            return
        count = total = 0
        for path in self._below():
            size = _size(path)
            if size is None or (path.is_symlink() and not self._inside(path)):
                self._leave(path, "not an ordinary file within the folder")
                continue
            count, total = count + 1, total + (size if size <= LARGEST else 0)
            if count > MOST_FILES or total > LARGEST_TREE:
                what = f"{MOST_FILES:,} files or {LARGEST_TREE / MB:,.0f} MB are the limit"
                self._leave(path, f"{what}: this file and those after it are not read")
                return
            yield path

    def _below(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self.root):  # does not follow links to folders
            here = Path(folder)
            folders.sort()
            if folders and len(here.relative_to(self.root).parts) >= DEEPEST:
                self._leave(here, f"folders below it are not read: deeper than {DEEPEST}")
                folders.clear()
            for name in sorted(names):
                if name.endswith((".json", ".csv", ".txt", ".log")):
                    yield here / name

    def _inside(self, path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError):  # a loop of links
            return False

    def _leave(self, path: Path, why: str) -> None:
        self.findings.append(Finding(plain(path), "not read", f"Left out: {why}."))


def _size(path: Path) -> int | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
