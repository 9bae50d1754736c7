"""How a check looks: a line for each step as it ends, and signs of life while one takes long."""

from __future__ import annotations

import sys
import textwrap
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

from fmi_client.findings import time_text

if TYPE_CHECKING:
    from fmi_client.findings import Step

__all__ = ["CheckView"]

_MARKS = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "failed": ("✗", "bold red"),
    "skipped": ("-", "dim"),
}
_NAME_WIDTH = len("authenticate")
_WIDEST = 100  # characters in a line that is read with ease
_WORTH_TELLING = 0.05  # seconds; what is faster has no time behind its line
# Nothing is silent for longer than two seconds.
_HEARTBEAT = 1.5


class CheckView:
    """Shows a check inside a ``with`` block; what goes on to stderr, what was found to stdout."""

    def __init__(self, to_stderr: bool = False, heartbeat: float = _HEARTBEAT) -> None:
        self._out = Console(stderr=to_stderr, highlight=False)
        self._err = Console(stderr=True, highlight=False)
        self._width = min(self._out.width, _WIDEST)
        self._life: Status | None = None
        self._pulse = None if self._err.is_terminal else _Pulse(heartbeat)

    def __enter__(self) -> Self:
        if self._pulse is not None:
            self._pulse.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._still()
        if self._pulse is not None:
            self._pulse.stop()

    def begin(self, name: str, doing: str) -> None:
        """Say, while it lasts, that a step is under way."""
        text = f"{name:<{_NAME_WIDTH}} {doing} …"
        if self._pulse is not None:
            self._pulse.say(text)
        else:
            self._life = self._err.status(Text(text))
            self._life.start()

    def end(self, step: Step) -> None:
        """Print the line of a step that has ended."""
        self._still()
        self._out.print(step_lines(step, self._width))

    def conclude(self, advice: str) -> None:
        """Print the sentence that ends the report."""
        self._out.print()
        self._out.print(Text(textwrap.fill(advice, self._width), "bold"))

    def _still(self) -> None:
        life, self._life = self._life, None
        if life is not None:
            life.stop()
        if self._pulse is not None:
            self._pulse.say(None)


def step_lines(step: Step, width: int) -> Text:
    """Return mark, name, what was found (it may need several lines) and how long that took."""
    took = time_text(step.seconds) if step.seconds >= _WORTH_TELLING else ""
    indent = " " * (_NAME_WIDTH + 3)
    room = width - len(indent)
    first, *rest = textwrap.wrap(step.text, max(room - len(took) - 1, 20)) or [""]
    dim = "dim" if step.status == "skipped" else ""
    line = Text.assemble(_MARKS[step.status], (f" {step.name:<{_NAME_WIDTH}} {first}", dim))
    if took:
        line.append(f"{took:>{room - len(first)}}", "dim")
    for more in rest:
        line.append(f"\n{indent}{more}", dim)
    return line


class _Pulse:
    """Repeats a line on stderr, where that is no terminal, while a step lasts.

    One thread for all steps: what runs when a thread object is freed is one of the few places
    where Python loses the exception of a signal's handler, and so Ctrl-C.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._text: str | None = None
        self._over = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def say(self, text: str | None) -> None:
        """Repeat this from now on; None: nothing."""
        with self._changed:
            self._text = text
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        if self._thread.is_alive():  # Ctrl-C may come before it has begun
            self._thread.join()

    def _beat(self) -> None:
        while True:
            with self._changed:
                told = self._over or self._changed.wait(self._every)
                if self._over:
                    return
                text = None if told else self._text
            if text and sys.stderr is not None:  # closed; print would turn to stdout
                print(f"  {text}", file=sys.stderr, flush=True)
