"""What the drawings of a report have in common: their form, and how configurations are named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from workflow.configurations import Configuration
from workflow.report_plots import Picture

__all__ = ["Drawing", "Section", "context", "drawable", "few", "name_of", "sound"]

Item = TypeVar("Item")


class Drawing(NamedTuple):
    """A picture in the report; ``name`` is that of its file."""

    name: str
    title: str
    alt: str
    caption: str
    picture: Picture
    tall: bool = False


@dataclass
class Section:
    """Drawings under one heading, and a sentence for each that has no data."""

    id: str
    title: str
    drawings: list[Drawing] = field(default_factory=list)
    omitted: list[str] = field(default_factory=list)


def drawable(value: float | None) -> bool:
    """Whether an axis has a place for it: files of strangers say infinity, or less than nothing."""
    return value is not None and (value == 0 or 1e-9 <= value <= 1e12)  # NaN is neither


def sound(c: Configuration) -> Configuration | None:
    """Return the configuration without measures that cannot be drawn; None: all of it cannot."""
    if not all(size is None or 1 <= size <= 1e9 for size in (c.world_size, c.batch_size)):
        return None
    kept = {name: spread for name, spread in c.measures.items() if all(map(drawable, spread))}
    compared = ("speedup", "efficiency", "total_speedup")
    known: dict[str, Any] = {
        n: getattr(c, n) if drawable(getattr(c, n)) else None for n in compared
    }
    return replace(c, measures=kept, **known)


def name_of(c: Configuration, among: Iterable[Configuration] = ()) -> str:
    """Name a configuration, by what tells it from the others ``among`` which it is."""
    ranks = f"{c.world_size:,} rank{'s' if c.world_size != 1 else ''}" if c.world_size else ""
    batch = f"batch {c.batch_size:,}" if c.batch_size else ""
    return ", ".join(part for part in (ranks, batch, context(c, among)) if part)


def context(c: Configuration, among: Iterable[Configuration]) -> str:
    """Say what tells a configuration from others, apart from its world and batch size."""
    others = list(among)
    names = ("data", "engine", "precision", "source", "on")
    parts = [getattr(c, n) for n in names if len({getattr(o, n) for o in others}) > 1]
    return ", ".join(str(part) for part in parts if part)


def few(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Take at most so many, evenly, first and last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
