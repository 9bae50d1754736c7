"""What people see while a run goes on."""

from __future__ import annotations

import io

import pytest
from launched import until
from rich.console import Console

from workflow.plan import RankProgress
from workflow.progress import LiveView, PlainView, open_view


def test_plain_lines_for_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView() as view:
        view.step("init: splitting")
        view.update("rank 0", "infer", 1, 2)
        view.step("infer: 2 ranks")
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split("s  ", 1)[1] for line in err.splitlines()] == [
        "init: splitting",
        "infer: 2 ranks",
    ]


def test_a_silent_step_is_heard_of(capsys: pytest.CaptureFixture[str]) -> None:
    heard = ""

    def hear() -> bool:
        nonlocal heard
        heard += capsys.readouterr().err
        return "1,128 of 1,253 rows (90%); infer 1, done 1" in heard

    with PlainView(heartbeat=0.02) as view:
        view.step("infer: 2 ranks")
        until(lambda: "infer: 2 ranks …" in (capsys.readouterr().err))
        view.update("rank 0", "infer", 128, 253)
        view.update("rank 1", "done", 1000, 1000)
        until(hear)


def test_one_bar_needs_no_count_of_bars(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView("ranks")
    view.step("infer: 8 ranks")
    view.update("ranks", "3 running, 1 failed", 4, 8)
    assert view._summary() == "4 of 8 ranks (50%); 3 running, 1 failed"


def test_the_pulse_stops_with_the_view() -> None:
    view = PlainView(heartbeat=0.01)
    with view:
        pass
    assert not view._pulse.is_alive()


def test_nothing_is_silent_for_two_seconds() -> None:
    assert PlainView()._heartbeat < 2


def test_bars_on_a_terminal() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with LiveView(screen) as view:
        view.step("init: [odd].pt")
        view.step("infer: 2 ranks")
        for rank in range(2):
            event = RankProgress(rank, "infer", 128 * rank, 313)
            view.update(f"rank {event.rank}", event.stage, event.rows, event.of)
        view._live.refresh()
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "✓ init: [odd].pt" in text
    assert "rank 0 infer" in text
    assert "128 / 313 rows" in text
    assert "✓ infer: 2 ranks" in text


def test_a_failed_step_is_marked() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)

    def fail() -> None:
        with LiveView(screen) as view:
            view.step("infer: 2 ranks")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "✗ infer: 2 ranks" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_step_after_a_failed_one() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with LiveView(screen) as view:
        view.step("infer: 2 ranks")
        view.step("blame: who was it?", ok=False)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "✗ infer: 2 ranks" in text
    assert "✓ blame: who was it?" in text


def test_the_view_suits_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert isinstance(open_view(), PlainView)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_view("steps"), LiveView)
