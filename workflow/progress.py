"""Progress for people: bars updated in place on a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.spinner import Spinner
from rich.text import Text

from workflow.plan import Event, RankProgress, RanksProgress

__all__ = ["LiveView", "PlainView", "View", "open_view", "tell"]

# Nothing is silent for longer than two seconds.
_HEARTBEAT = 1.5


class View(Protocol):
    """Shows what goes on inside a ``with`` block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def step(self, text: str, ok: bool = True) -> None:
        """Finish the step before, which went well or not, and begin this one."""

    def update(self, who: str, stage: str, rows: int, of: int) -> None:
        """Set the bar of ``who`` ("rank 0"), at ``stage``, to ``rows`` of ``of``."""


def tell(view: View, event: Event) -> None:
    """Show an event of a run."""
    match event:
        case RankProgress(rank, stage, rows, of):
            view.update(f"rank {rank}", stage, rows, of)
        case RanksProgress(running, done, failed, of):
            counts = {"running": running, "failed": failed, "waiting": of - running - done - failed}
            stage = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
            view.update("ranks", stage, done, of)
        case _:
            view.step(event.text, ok=event.name not in ("blame", "stop"))


def open_view(unit: str = "rows", heartbeat: float = _HEARTBEAT) -> View:
    """Return the view that suits stderr.

    Args:
        unit: what is counted.
        heartbeat: where lines are printed: after how many seconds of silence there is one more.
    """
    console = Console(stderr=True)
    return LiveView(console, unit) if console.is_terminal else PlainView(unit, heartbeat)


class LiveView:
    """One bar for each rank, one line for the step, redrawn by rich."""

    def __init__(self, console: Console, unit: str = "rows") -> None:
        self._bars = Progress(
            TextColumn("  {task.description}"),
            TextColumn("{task.fields[stage]:<8}", style="cyan"),
            BarColumn(bar_width=None),
            _Count(unit),
            _Rate(unit),
            console=console,
            expand=True,
        )
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._text = ""
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish(error is None)
        self._live.stop()

    def step(self, text: str, ok: bool = True) -> None:
        self._finish(ok)
        self._text, self._began = text, time.monotonic()
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        self._live.update(Group(Spinner("dots", Text(text)), self._bars))

    def update(self, who: str, stage: str, rows: int, of: int) -> None:
        if who not in self._tasks:
            self._tasks[who] = self._bars.add_task(who, stage=stage, total=of)
        self._bars.update(self._tasks[who], stage=stage, completed=rows, total=of)

    def _finish(self, ok: bool) -> None:
        mark, style = ("✓", "green") if ok else ("✗", "red")
        if self._text:
            took = time.monotonic() - self._began
            line = Text.assemble((mark, style), f" {self._text} ", (f"{took:.1f} s", "dim"))
            self._live.console.print(line)


class _Count(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        text = f"{task.completed:,.0f} / {task.total:,.0f} {self._unit}"
        return Text(text, justify="right")


class _Rate(_Count):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        text = f"{speed:,.0f} {self._unit}/s" if speed else ""
        return Text(text, justify="right", style="dim")


class PlainView:
    """A line for each step, and a line on all ranks after every ``heartbeat`` s of silence."""

    def __init__(self, unit: str = "rows", heartbeat: float = _HEARTBEAT) -> None:
        self._unit = unit
        self._heartbeat = heartbeat
        self._state: dict[str, tuple[str, int, int]] = {}
        self._text = ""
        self._began = self._spoke = time.monotonic()
        self._over = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._pulse.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._pulse.join()

    def step(self, text: str, ok: bool = True) -> None:
        self._text = text
        self._state.clear()
        self._say(text)

    def update(self, who: str, stage: str, rows: int, of: int) -> None:
        self._state[who] = (stage, rows, of)

    def _beat(self) -> None:
        while not self._over.wait(max(0.0, self._spoke + self._heartbeat - time.monotonic())):
            self._say(f"  {self._summary()}")

    def _summary(self) -> str:
        """Return all bars in one line: "640 of 1,253 rows (51 %); infer 3, gather 1"."""
        states = list(self._state.values())
        if not states:
            return f"{self._text} …"
        rows, of = sum(state[1] for state in states), sum(state[2] for state in states)
        stages = [state[0] for state in states]
        several = (f"{stage} {stages.count(stage)}" for stage in dict.fromkeys(stages))
        counts = ", ".join(several) if len(stages) > 1 else stages[0]
        return f"{rows:,} of {of:,} {self._unit} ({rows / max(of, 1):.0%}); {counts}"

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        if sys.stderr is not None:  # closed; print would turn to stdout
            print(f"{self._spoke - self._began:6.1f} s  {text}", file=sys.stderr, flush=True)
