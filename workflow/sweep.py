"""A sweep at work: what is on disk of it, and how it goes on after any end.

A sweep's folder holds `sweep.json` and, in `runs`, a record and a folder for each run
(docs/sweep.md). A record appears whole, when its run has ended: a run without one never was.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from lambda_worker import storage
from lambda_worker.events import DATA_SIZES
from workflow.calls import error_json
from workflow.plan import Json
from workflow.sweep_plan import Item, Plan, order

__all__ = [
    "Execute",
    "Manifest",
    "Outcome",
    "Record",
    "Sweep",
    "SweepError",
    "Tell",
    "locked",
    "new_folder",
    "read_manifest",
    "seconds_left",
]

Kind = Literal["sweep", "infer"]
_LOCK = ".lock"
_LARGEST = 64 << 20  # bytes of a record; infer's report has a few thousand


class SweepError(Exception):
    """The sweep's folder cannot be used; the text says what to do."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Manifest(BaseModel):
    """What sweep.json holds; ``environment`` is of the machine that began, on AWS empty."""

    format: Literal[1] = 1
    kind: Kind
    created: str = Field(default_factory=_now)
    plan: Plan
    environment: Json = {}


class Outcome(NamedTuple):
    """A run that went well: its seconds, the URL of its folder, what `cosmic infer` reports."""

    seconds: float
    folder: str | None = None
    report: Json | None = None


class Record(BaseModel):
    """An attempt that has ended; ``failures`` are the records of earlier ones."""

    format: Literal[1] = 1
    key: str
    data: str
    world_size: int
    batch_size: int
    repeat: int
    order: int  # of all attempts of the sweep, from 1
    on: str
    engine: str
    precision: str
    started: str
    seconds: float
    status: Literal["ok", "failed"]
    error: Json | None = None
    folder: str | None = None
    report: Json | None = None
    failures: list[Json] = []


Execute = Callable[[Item, Path], Awaitable[Outcome]]
"""Does one run, whose files go to the folder; raises what went wrong."""

Tell = Callable[[str, bool], None]
"""Takes a line about what begins, and whether what was before went well."""


def seconds_left(todo: Sequence[Item], done: Sequence[Record]) -> float | None:
    """Estimate what the runs of ``todo`` will take, by those that are most like each of them.

    Returns:
        Seconds, or None before anything is known.
    """
    known = [record for record in done if record.status == "ok"]
    return sum(_expected(item, known) for item in todo) if known else None


def _expected(item: Item, known: Sequence[Record]) -> float:
    """The mean of the same configuration, else of the same ranks, data, or of all by their rows."""
    for names in (("data", "world_size", "batch_size"), ("data", "world_size"), ("data",)):
        alike = [r.seconds for r in known if all(getattr(r, n) == getattr(item, n) for n in names)]
        if alike:
            return statistics.mean(alike)
    rows = DATA_SIZES.get(item.data, 1)
    return statistics.mean(r.seconds * rows / DATA_SIZES.get(r.data, 1) for r in known)


# -- on disk -----------------------------------------------------------------------------------


def new_folder(results: Path, kind: Kind) -> Path:
    """Make the folder of a new sweep, named by time.

    Raises:
        OSError: it cannot be made.
    """
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    results.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = results / f"{kind}-{moment}{'' if number == 1 else f'-{number}'}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("itertools.count has no end")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a sweep's folder for this process alone; the kernel frees it when the process ends.

    Raises:
        SweepError: another process has it. OSError: it cannot be made or locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = f"process {lock.read(20).strip()}"
            text = f"{folder}: {who} is at work on it; wait for its end, or take another --name"
            raise SweepError(text) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def read_manifest(folder: Path) -> Manifest | None:
    """Return what a sweep's folder says it is; None of a folder in which nothing was begun.

    Raises:
        SweepError: there is something else in it.
    """
    path = folder / "sweep.json"
    if not path.exists():
        names = storage.names(str(folder))
        if others := [name for name in names if not re.fullmatch(r"\.lock|\..*\.part", name)]:
            text = f"{folder} is no sweep: it has {others[0]}, but no sweep.json"
            raise SweepError(f"{text}; take another --name")
        return None
    try:
        return Manifest.model_validate_json(storage.read(str(path)))
    except ValidationError as error:
        text = _first(error)
        raise SweepError(f"{path} cannot be understood: {text}; take another --name") from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))  # none, if it is no JSON at all
    return f"{where}{where and ': '}{first['msg'].removeprefix('Value error, ')}"


class Sweep:
    """A sweep at work. Its folder must be `locked`.

    Attributes:
        unreadable: names of records that are none; their runs are done again.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Take the sweep up where its records end, and say so in sweep.json.

        Raises:
            StorageError: the folder cannot be read or written.
        """
        self.folder, self.manifest, self.plan = folder, manifest, manifest.plan
        self.runs = folder / "runs"
        self.unreadable: list[str] = []
        self._sweep_up()
        storage.write(str(folder / "sweep.json"), _json(manifest))
        self.items = order(self.plan)
        self.records = {item.key: r for item in self.items if (r := self._read(item))}

    @property
    def todo(self) -> list[Item]:
        """What is still to be done: all that has no record of success."""
        return [item for item in self.items if not self._ok(item)]

    @property
    def done(self) -> int:
        """How many runs went well."""
        return len(self.items) - len(self.todo)

    @property
    def failed(self) -> list[Record]:
        """The records of the runs that did not, in the plan's order."""
        found = (self.records.get(item.key) for item in self.items)
        return [record for record in found if record and record.status == "failed"]

    def forget(self) -> None:
        """Remove a sweep in which nothing was begun, and its folder."""
        for name in ("sweep.json", _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put something in it
            self.folder.rmdir()

    async def work(self, execute: Execute, tell: Tell) -> None:
        """Do all that is to be done; a run that fails is recorded, and the next one begins.

        Raises:
            StorageError: a record cannot be written; the run counts as not done.
        """
        todo, went_well = self.todo, True
        if len(todo) > 1 and self.plan.on == "local":
            await self._warm_up(execute, tell)
        for number, item in enumerate(todo):
            left = seconds_left(todo[number:], list(self.records.values()))
            text = f"run {len(self.items) - len(todo) + number + 1} of {len(self.items)}"
            tell(f"{text}: {self._describe(item)}{_about(left)}", went_well)
            record = await self._attempt(item, execute)
            went_well = record.status == "ok"
            if record.error:
                tell(f"  failed: {error_line(record)}", False)

    async def _warm_up(self, execute: Execute, tell: Tell) -> None:
        """Do a run that does not count: it reads libraries and model from disk, the rest need not.

        If it fails, so will those that count, and say why.
        """
        plan, place = self.plan, self.folder / "warm-up"
        item = Item(plan.datasets[0], min(plan.world_sizes), max(plan.batch_sizes), 0)
        tell("warm-up: a run that is not counted", True)
        try:
            with suppress(Exception):
                await execute(item, place)
        finally:
            _remove(place)

    async def _attempt(self, item: Item, execute: Execute) -> Record:
        place, before = self.runs / item.key, self.records.get(item.key)
        _remove(place)
        started, began = _now(), time.monotonic()
        error: Json | None = None
        try:
            outcome = await execute(item, place)
        except Exception as caught:  # whatever it is, the other runs are worth as much
            outcome = Outcome(time.monotonic() - began, str(place) if place.exists() else None)
            error = error_json(caught)
        record = Record(
            key=item.key,
            **item._asdict(),
            order=1 + sum(1 + len(r.failures) for r in self.records.values()),
            on=self.plan.on,
            engine=self.plan.engine,
            precision=self.plan.precision,
            started=started,
            **outcome._asdict(),
            status="failed" if error else "ok",
            error=error,
            failures=_failures(before),
        )
        storage.write(str(self._path(item)), _json(record))
        self.records[item.key] = record
        return record

    def _describe(self, item: Item) -> str:
        ranks = "1 rank, " if item.world_size == 1 else f"{item.world_size:,} ranks, "
        again = f", {item.repeat} of {self.plan.repeat}" if self.plan.repeat > 1 else ""
        alone = self.manifest.kind == "infer"
        name = Path(item.data).name
        return f"{'' if alone else ranks}batch {item.batch_size:,}, {name}{again}"

    def _ok(self, item: Item) -> bool:
        record = self.records.get(item.key)
        return record is not None and record.status == "ok"

    def _path(self, item: Item) -> Path:
        return self.runs / f"{item.key}.json"

    def _read(self, item: Item) -> Record | None:
        path = self._path(item)
        if not path.exists():
            return None
        try:
            if path.stat().st_size <= _LARGEST:
                record = Record.model_validate_json(storage.read(str(path)))
                if record.key == item.key:
                    return record
        except ValidationError:
            pass
        self.unreadable.append(path.name)
        return None

    def _sweep_up(self) -> None:
        """Remove what killed processes have left half written."""
        _remove(self.folder / "warm-up")
        for path in (*self.folder.glob(".*.part"), *self.runs.glob(".*.part")):
            path.unlink(missing_ok=True)


def error_line(record: Record) -> str:
    """Return a failed run's error in one line."""
    error = record.error or {}
    who, kind, message = error.get("who"), error.get("type"), error.get("message")
    if who == "cosmic":  # no process of the run, but what starts them
        return f"{kind}: {message}"
    text = f"{who} failed: {kind}: {message}" if kind else f"{who} {message}"
    return " ".join(text.split())


def _about(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"; {f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'} left"


def _failures(before: Record | None) -> list[Json]:
    if before is None:
        return []
    last = before.model_dump(include={"order", "started", "seconds", "error"})
    return [*before.failures, last]


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(indent=1).encode() + b"\n"


def _remove(folder: Path) -> None:
    """Remove a folder; what cannot be removed is no harm, for a run tells its own files apart."""
    shutil.rmtree(folder, ignore_errors=True)
