"""Signals that stop a program; imports next to nothing, so that it can come first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

__all__ = ["Stopped", "exit_by_signal", "stop_signals"]


class Stopped(SystemExit):
    """The exit after a signal, with the code that shells expect: 128 + its number.

    ``left`` says what is left of the work.
    """

    def __init__(
        self, number: int, left: str = "nothing is left running, no file half written"
    ) -> None:
        super().__init__(128 + number)
        self.name, self.left = signal.Signals(number).name, left


def stop_signals() -> list[signal.Signals]:
    """Return what stops a program, without what its parent has told it to ignore (nohup, say)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def exit_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal by an exit."""
    raise Stopped(number)
