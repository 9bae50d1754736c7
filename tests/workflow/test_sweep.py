"""Sweeps without processes: the order, what is on disk, and how one goes on after any end."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import until
from small_plan import plan

from lambda_worker.storage import StorageError
from workflow import sweep as module
from workflow.calls import RunFailed
from workflow.sweep import (
    Manifest,
    Outcome,
    Sweep,
    SweepError,
    error_line,
    locked,
    new_folder,
    read_manifest,
)
from workflow.sweep_plan import Item, extend, order


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


def begin(folder: Path, **fields: Any) -> Sweep:
    old = read_manifest(folder)
    fresh = Manifest(kind="sweep", created="2026-01-01T00:00:00+00:00", plan=plan(**fields))
    return Sweep(folder, old or fresh)


def leave(place: Path, name: str = "0.json") -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / name).touch()


async def fine(item: Item, place: Path) -> Outcome:
    leave(place)
    return Outcome(1.0, str(place))


def silent(text: str, ok: bool) -> None:
    pass


def keys(sweep: Sweep) -> set[str]:
    return {item.key for item in sweep.items}


def manifest(**fields: Any) -> str:
    told = {"repeat": 1, "seed": 0, **fields}
    return json.dumps({"format": 1, "kind": "sweep", "created": "", "plan": told})


# -- the work ----------------------------------------------------------------------------------


async def test_every_run_is_recorded_in_the_order_of_the_plan(tmp_path: Path) -> None:
    sweep, told = begin(tmp_path), []
    await sweep.work(fine, lambda text, ok: told.append((text, ok)))
    done = [json.loads((tmp_path / "runs" / f"{i.key}.json").read_text()) for i in sweep.items]
    assert [each["order"] for each in done] == [1, 2, 3, 4]
    assert [each["status"] for each in done] == ["ok"] * 4
    assert done[0]["folder"] == str(tmp_path / "runs" / sweep.items[0].key)
    assert told[0] == ("warm-up: a run that is not counted", True)
    assert [text.partition(":")[0] for text, _ in told[1:]] == [
        f"run {n} of 4" for n in range(1, 5)
    ]
    assert told[-1][0].endswith("; 1 s left")
    assert not sweep.todo


async def test_the_warm_up_leaves_nothing_and_may_fail(tmp_path: Path) -> None:
    places = []

    async def execute(item: Item, place: Path) -> Outcome:
        places.append(place)
        if place.name == "warm-up":
            leave(place)
            raise RunFailed("rank 0", "was killed")
        return await fine(item, place)

    sweep = begin(tmp_path)
    await sweep.work(execute, silent)
    assert places[0] == tmp_path / "warm-up"
    assert len(places) == 5
    assert not places[0].exists()
    assert not sweep.failed


@pytest.mark.parametrize("fields", [{"on": "aws"}, {"world_sizes": (1,), "batch_sizes": (8,)}])
async def test_there_is_no_warm_up_where_it_is_of_no_use(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    places = []

    async def execute(item: Item, place: Path) -> Outcome:
        places.append(place.name)
        return await fine(item, place)

    sweep = begin(tmp_path, **fields)
    await sweep.work(execute, silent)
    assert places == [item.key for item in sweep.items]


async def test_a_failed_run_is_recorded_and_the_others_are_done(tmp_path: Path) -> None:
    async def execute(item: Item, place: Path) -> Outcome:
        await fine(item, place)
        if item.world_size == 2 and place.parent.name == "runs":
            raise RunFailed("rank 1", "was killed by SIGKILL (out of memory?)", rank=1)
        return Outcome(1.0, str(place))

    sweep, told = begin(tmp_path), []
    await sweep.work(execute, lambda text, ok: told.append((text, ok)))
    assert [each.world_size for each in sweep.failed] == [2, 2]
    assert sweep.done == 2
    saved = json.loads((tmp_path / "runs" / "w2-b8-small-r1.json").read_text())
    message = "was killed by SIGKILL (out of memory?)"
    assert saved["error"] == {"who": "rank 1", "type": None, "message": message, "rank": 1}
    assert saved["folder"] == str(tmp_path / "runs" / "w2-b8-small-r1")  # what the others left
    assert error_line(sweep.failed[0]) == f"rank 1 {message}"
    assert ("  failed: rank 1 was killed by SIGKILL (out of memory?)", False) in told
    # The bars show a cross for the run, and for the line that says why.
    after = [ok for (before, _), (_, ok) in itertools.pairwise(told) if "failed" in before]
    assert after
    assert not any(after)


async def test_a_failed_run_is_done_again_and_its_failure_kept(tmp_path: Path) -> None:
    async def broken(item: Item, place: Path) -> Outcome:
        raise OSError(28, "no space left")

    await begin(tmp_path).work(broken, silent)
    again = begin(tmp_path)
    assert len(again.todo) == 4
    await again.work(fine, silent)
    kept = again.records["w1-b8-small-r1"]
    assert kept.status == "ok"
    assert kept.error is None
    assert kept.failures[0]["error"]["message"] == "no space left"
    assert sorted(r.order for r in again.records.values()) == [5, 6, 7, 8]
    assert not begin(tmp_path).todo


async def test_a_defect_of_ours_does_not_end_the_sweep(tmp_path: Path) -> None:
    async def broken(item: Item, place: Path) -> Outcome:
        raise KeyError("rows")

    sweep = begin(tmp_path)
    await sweep.work(broken, silent)
    assert {error_line(each) for each in sweep.failed} == {"KeyError: 'rows'"}


async def test_a_record_that_cannot_be_written_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = begin(tmp_path)

    def full(url: str, data: bytes) -> None:
        raise StorageError("No space left on device: make room, or choose another place")

    monkeypatch.setattr(module.storage, "write", full)
    with pytest.raises(StorageError, match="make room"):
        await sweep.work(fine, silent)
    monkeypatch.undo()
    assert len(begin(tmp_path).todo) == 4


async def test_what_an_earlier_attempt_left_is_not_mixed_in(tmp_path: Path) -> None:
    sweep = begin(tmp_path)
    stale = tmp_path / "runs" / sweep.items[0].key / "3.json"
    stale.parent.mkdir(parents=True)
    stale.touch()
    await sweep.work(fine, silent)
    assert not stale.exists()


# -- going on after any end --------------------------------------------------------------------


@st.composite
def crashes(draw: st.DrawFn) -> list[tuple[int, str]]:
    """Where each process is killed: at which of its runs, and when in it."""
    moments = st.sampled_from(["before", "within", "while writing", "after"])
    return draw(st.lists(st.tuples(st.integers(0, 4), moments), max_size=6))


@settings(max_examples=60)
@given(ends=crashes(), prefix=st.integers(0, 4), fails=st.sets(st.integers(1, 2)))
def test_whenever_it_is_killed_the_same_set_is_there_in_the_end(
    ends: list[tuple[int, str]], prefix: int, fails: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _live(folder, [(prefix, "before")], fails)
        _live(folder, ends, fails)
        begin(folder)
        asyncio.run(begin(folder).work(fine, silent))
        final = begin(folder)
        assert final.todo == []
        assert set(final.records) == keys(final) == {i.key for i in order(plan())}
        assert sorted(p.name for p in (folder / "runs").iterdir()) == sorted(
            f"{key}{end}" for key in keys(final) for end in ("", ".json")
        )
        for key, each in final.records.items():
            assert (each.key, each.status) == (key, "ok")
            assert [p.name for p in (folder / "runs" / key).iterdir()] == ["0.json"]
        assert sorted(p.name for p in folder.iterdir()) == ["runs", "sweep.json"]


def _live(folder: Path, ends: list[tuple[int, str]], fails: set[int]) -> None:
    """One process after the other, each killed."""
    for at, moment in ends:
        sweep, count = begin(folder), iter(range(100))

        async def execute(item: Item, place: Path) -> Outcome:
            if place.name == "warm-up":
                return await fine(item, place)
            last = next(count) == at  # noqa: B023 (called within this turn only)
            if last and moment == "before":  # noqa: B023
                raise Killed
            outcome = await fine(item, place)
            if last and moment == "within":  # noqa: B023
                leave(place, "left")
                raise Killed
            if last:
                _arm(moment)  # noqa: B023
            if item.world_size in fails:
                raise RunFailed("rank 0", "failed")
            return outcome

        with suppress(Killed):
            asyncio.run(sweep.work(execute, silent))
        _disarm()


_write, _replace = module.storage.write, os.replace


def _arm(moment: str) -> None:
    """Have this process killed at its next record: before it has its name, or right after."""

    def write(url: str, data: bytes) -> None:
        if moment == "after":
            _write(url, data)
        else:
            path = Path(url)
            path.with_name(f".{path.name}.1.part").write_bytes(data[: len(data) // 2])
        raise Killed

    module.storage.write = write


def _disarm() -> None:
    module.storage.write = _write


async def test_an_extended_sweep_does_only_what_is_new(tmp_path: Path) -> None:
    await begin(tmp_path).work(fine, silent)
    old = read_manifest(tmp_path)
    assert old is not None
    wider = extend(old.plan, {"world_sizes": (1, 2, 3), "repeat": 2})
    sweep = Sweep(tmp_path, old.model_copy(update={"plan": wider}))
    assert len(sweep.items) == 12
    assert {(i.world_size, i.repeat) for i in sweep.todo} == {(3, 1), (1, 2), (2, 2), (3, 2)}
    again = read_manifest(tmp_path)
    assert again is not None
    assert again.plan == wider
    assert again.created == old.created


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": 2}', b"\xff\xfe", b'{"key": "w1-b8-small-r1"}']
)
async def test_a_record_that_is_none_is_done_again(tmp_path: Path, content: bytes) -> None:
    await begin(tmp_path).work(fine, silent)
    (tmp_path / "runs" / "w1-b8-small-r1.json").write_bytes(content)
    sweep = begin(tmp_path)
    assert [item.key for item in sweep.todo] == ["w1-b8-small-r1"]
    assert sweep.unreadable == ["w1-b8-small-r1.json"]
    await sweep.work(fine, silent)
    assert begin(tmp_path).unreadable == []


async def test_another_runs_record_does_not_count(tmp_path: Path) -> None:
    await begin(tmp_path).work(fine, silent)
    runs = tmp_path / "runs"
    shutil.copy(runs / "w2-b8-small-r1.json", runs / "w1-b8-small-r1.json")
    assert [item.key for item in begin(tmp_path).todo] == ["w1-b8-small-r1"]


# -- the folder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("combined_data.json", "[]", "is no sweep: it has combined_data.json, but no sweep.json"),
        ("sweep.json", "{", "cannot be understood: Invalid JSON"),
        ("sweep.json", '{"format": 9}', "cannot be understood: format"),
        ("sweep.json", manifest(world_sizes=[0], data="x"), "cannot be understood: plan.world"),
        ("sweep.json", manifest(batch_sizes=[], data="x"), "cannot be understood: plan.batch"),
        ("sweep.json", manifest(), "plan: either data or data_sizes is needed"),
        ("sweep.json", manifest(data="x", command="rm"), "cannot be understood: plan.command"),
    ],
)
def test_a_folder_of_something_else(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SweepError, match=says) as caught:
        read_manifest(tmp_path)
    assert "take another --name" in str(caught.value)


def test_a_sweep_that_was_killed_at_its_very_start(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".sweep.json.1.part").touch()
    assert read_manifest(tmp_path) is None
    assert len(begin(tmp_path).todo) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "sweep.json"]


def test_new_folders_never_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "strftime", lambda *_: "20260101-000000")
    made = [new_folder(tmp_path / "results", "sweep").name for _ in range(3)]
    assert made == [f"sweep-20260101-000000{end}" for end in ("", "-2", "-3")]


_HOLD = """
import sys
from pathlib import Path
from workflow.sweep import locked
with locked(Path(sys.argv[1])):
    print("have it", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder."""
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "have it\n"
        yield process
        process.kill()


def test_two_at_once_are_refused_but_a_dead_one_is_in_nobodys_way(tmp_path: Path) -> None:
    with holding(tmp_path) as other:
        with (
            pytest.raises(SweepError, match=f"process {other.pid} is at work on it"),
            locked(tmp_path),
        ):
            pass
        other.kill()
        until(lambda: other.poll() is not None)
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
