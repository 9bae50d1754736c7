"""What is to run, what happens meanwhile, what comes out: the same on this machine and on AWS."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lambda_worker.engine import Engine, Precision

__all__ = [
    "Event",
    "Json",
    "OnEvent",
    "RankProgress",
    "RanksProgress",
    "RunPlan",
    "RunResult",
    "Span",
    "Step",
]

Json = dict[str, Any]
StepName = Literal["start", "server", "init", "infer", "blame", "summarize", "stop"]


@dataclass(frozen=True)
class RunPlan:
    """What to run. ``data``, ``model`` and ``results`` are paths or URLs.

    ``rendezvous`` is "host:port" of a running server; None starts one for this run, on this
    machine only. ``timeout`` bounds the whole run, in seconds. ``worker`` and ``server`` are the
    commands that make processes of this machine.
    """

    data: str
    world_size: int = 4
    batch_size: int | Literal["auto"] = 128
    model: str | None = None
    results: str = "./results"
    run: str | None = None
    fmi: bool = True
    rendezvous: str | None = None
    engine: Engine = "torch"
    precision: Precision = "fp32"
    strict: bool = False
    timeout: float = 3600.0
    worker: Sequence[str] = (sys.executable, "-m", "lambda_worker")
    server: Sequence[str] = (sys.executable, "-m", "rendezvous_server")

    def payload(self, endpoint: str | None, **more: object) -> Json:
        """Return the event of `init`, with ``more`` fields; those that are None are left out."""
        event: Json = {
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "data": self.data,
            "results": self.results,
            "model": self.model,
            "run": self.run,
            "fmi_enabled": self.fmi,
            "rendezvous_endpoint": endpoint,
            "engine": self.engine,
            "precision": self.precision,
            "strict": self.strict,
            **more,
        }
        return {name: value for name, value in event.items() if value is not None}


class Step(NamedTuple):
    """The run has reached this step; ``text`` is for people."""

    name: StepName
    text: str


class RankProgress(NamedTuple):
    """Rank ``rank`` is at ``stage`` and has done ``rows`` of its ``of`` rows."""

    rank: int
    stage: str
    rows: int
    of: int


class RanksProgress(NamedTuple):
    """All ``of`` ranks together, where nobody sees single ones; the others wait to be started."""

    running: int
    done: int
    failed: int
    of: int


Event = Step | RankProgress | RanksProgress
OnEvent = Callable[[Event], None]


class Span(NamedTuple):
    """What took how long: ``seconds`` from ``start``, in Unix seconds.

    ``rank`` None is the launcher, whose spans are a run's steps; ranks time their own stages.
    """

    rank: int | None
    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind; ``seconds`` is the whole run's wall-clock time.

    ``summary`` and ``records`` are as the `summarize` handler returns them; ``spans`` are those of
    the launcher and of all ranks.
    """

    run: str
    combined_data: str
    summary_path: str
    predictions: str
    summary: Json
    records: list[Json]
    seconds: float
    spans: list[Span] = field(default_factory=list, kw_only=True)

    @property
    def folder(self) -> str:
        """URL of the run's folder."""
        return self.combined_data.rpartition("/")[0]
