"""The command lines of ours that the documents show, as a shell splits them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    *("README.md", "SECURITY.md", "examples/README.md"),
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
]
_FENCE = re.compile(r"^ *```(\w*).*\n((?s:.*?))^ *```$", re.MULTILINE)
_IN_FENCES = {"", "sh", "console", "text"}
_COMMAND = re.compile(
    r"(?:^|[|;&(]|: (?=cosmic )) *"  # a message may end in one: "use it: cosmic …"
    r"(?:\w+=(?:\"[^\"]*\"|[^\s\"'(]*) )*(?:\S*/)?"
    r"(cosmic|make|torchrun|pip(?= install)|python3?(?= -m | \S+\.py\b))((?= |$).*)",
    re.MULTILINE,
)
_ENDS = re.compile(r"[|;&<]+|\d?>.*")


@dataclass(frozen=True)
class Command:
    """A command line of a page.

    Attributes:
        line: the whole line, for a shell.
        words: program and arguments, without what goes before and after.
        mention: it stands in a sentence, where arguments may be left out.
    """

    line: str
    words: tuple[str, ...]
    mention: bool


def shown_on(page: str) -> Iterator[Command]:
    """Yield the commands of a page: those of its blocks in order, then those of its sentences."""
    text = (ROOT / page).read_text()
    for language, block in _FENCE.findall(text):
        if language in _IN_FENCES:
            for line in _lines(block):
                yield from (Command(line, words, False) for words in commands(line))
    for span in spans(text):
        yield from (Command(span, words, True) for words in commands(_written_out(span)))


def _lines(block: str) -> list[str]:
    """What is typed: behind "$ ", where that marks it off from what is printed."""
    lines = block.replace("\\\n", " ").splitlines()
    typed = [line[2:] for line in lines if line.startswith("$ ")]
    return typed or lines


def spans(text: str) -> Iterator[str]:
    """Yield what stands between backticks in the sentences of a page."""
    for paragraph in _FENCE.sub("", text).split("\n\n"):
        yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", paragraph))


def _written_out(span: str) -> str:
    """`[--repeat N]` may be left out, of `init|infer` one is meant; `package[extra]` is a word."""
    return re.sub(r"(?<= )\[([^]]*)\]", r"\1", re.sub(r"(\w+)(?:\|\w+)+", r"\1", span))


def commands(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of ours in a line of shell."""
    for program, rest in _COMMAND.findall(line):
        words = [program]
        for word in shlex.split(rest, comments=True):
            if _ENDS.fullmatch(word):
                break
            words.append(word.rstrip(";") if "(" in word else word.rstrip(";)"))
        yield tuple(words)
