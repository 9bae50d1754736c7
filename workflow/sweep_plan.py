"""The plan of a sweep: which runs, in which order, and what it may grow by later."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lambda_worker.engine import Engine, Precision

__all__ = ["Item", "Plan", "PlanError", "extend", "order"]

Repeat = Annotated[int, Field(ge=1, le=1000)]
Ranks = Annotated[tuple[Annotated[int, Field(ge=1, le=10_000)], ...], Field(min_length=1)]
Batches = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
# What a sweep may be continued with, without its numbers meaning something else.
_PLACES = ("stack", "state_machine", "endpoint_url", "aws_results", "rendezvous")
_OTHERWISE = "leave the option out, or take another --name"
_LISTS = ("data_sizes", "world_sizes", "batch_sizes")


class PlanError(Exception):
    """A sweep cannot go on with this value of a field of its plan."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


class Plan(BaseModel):
    """What is to be measured: all world sizes with all batch sizes, on all data.

    Either ``data_sizes``, of the demo data, or ``data``, a path or URL. ``seed`` is of the order.
    ``threads`` and ``strict`` are of kind "infer" only, whose world size is 1. The last five say
    where AWS is; they are not part of what is measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    on: Literal["local", "aws"] = "local"
    world_sizes: Ranks = (1, 2, 3, 4)
    batch_sizes: Batches = (8, 16, 32, 64, 128)
    data_sizes: tuple[Literal["small", "medium", "large"], ...] = ()
    data: str | None = None
    repeat: Repeat
    seed: int
    engine: Engine = "torch"
    precision: Precision = "fp32"
    model: str | None = None
    fmi: bool = True
    threads: int | None = None
    strict: bool = False
    stack: str | None = None
    state_machine: str | None = None
    endpoint_url: str | None = None
    aws_results: str | None = None
    rendezvous: str | None = None

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> Self:
        if (self.data is None) == (not self.data_sizes):
            raise ValueError("either data or data_sizes is needed")
        return self

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data by name: sizes, or the one place."""
        return self.data_sizes if self.data is None else (self.data,)


class Item(NamedTuple):
    """One run of a sweep; ``repeat`` counts from 1."""

    data: str
    world_size: int
    batch_size: int
    repeat: int

    @property
    def key(self) -> str:
        """Its name: of its record, and of its folder."""
        words = re.sub(r"[^A-Za-z0-9._-]+", "-", self.data.rstrip("/").rpartition("/")[2])
        name = words.removesuffix(".pt").strip(".-")[:40] or "data"
        return f"w{self.world_size}-b{self.batch_size}-{name}-r{self.repeat}"


def order(plan: Plan) -> list[Item]:
    """Return all runs of ``plan``, in the order in which they are done.

    Each round has every configuration once, in an order of its own: what slows the machine down
    for a while meets configurations by chance, and seldom all repeats of one.
    """
    items = []
    for repeat in range(1, plan.repeat + 1):
        grid = itertools.product(plan.datasets, plan.world_sizes, plan.batch_sizes)
        one_round = [Item(*configuration, repeat) for configuration in grid]
        random.Random(f"{plan.seed}-{repeat}").shuffle(one_round)
        items += one_round
    return items


def extend(plan: Plan, given: Mapping[str, Any]) -> Plan:
    """Return the plan of a sweep that goes on, with the fields that its user gives this time.

    Lists may grow, and ``repeat``; places on AWS may change; all else must be as it was.

    Raises:
        PlanError: it is not; the text says what can be given.
    """
    for name, new in given.items():
        old = getattr(plan, name)
        if name == "data_sizes" and plan.data is not None:
            raise PlanError(name, f"this sweep is of {plan.data}; {_OTHERWISE}")
        if name in _LISTS and (gone := [each for each in old if each not in new]):
            raise PlanError(name, _left_out(old, new, gone))
        if name == "repeat" and new < old:
            raise PlanError(name, f"this sweep has {old} already; give {old} or more")
        if name not in (*_LISTS, *_PLACES, "repeat") and new != old:
            begun = "without it" if old in (None, True) else f"with {old}"
            raise PlanError(name, f"this sweep was begun {begun}; {_OTHERWISE}")
    return plan.model_copy(update=dict(given))


def _left_out(old: Sequence[object], new: Sequence[object], gone: Sequence[object]) -> str:
    both = ",".join(map(str, dict.fromkeys((*old, *new))))
    return (
        f"this sweep has {','.join(map(str, gone))} too; leave the option out, give {both} for "
        "more runs, or take another --name"
    )
