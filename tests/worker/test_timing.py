"""What a record says of time and memory limits: stages, the process's start, control groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lambda_worker import handlers, timing
from lambda_worker.cgroups import memory_limit
from lambda_worker.timing import Stopwatch
from tests.worker.worker_data import MakePt

MIB = 1 << 20


class Clocks:
    """Both clocks, which tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.monotonic = 1.8e9, 77.0
        monkeypatch.setattr(time, "time", lambda: self.wall)
        monkeypatch.setattr(time, "perf_counter", lambda: self.monotonic)

    def go_on(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def test_stages_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    watch = Stopwatch(0.25)
    for name, seconds in (("join", 1.0), (None, 0.5), ("load", 2.0), ("join", 0.125)):
        clocks.go_on(seconds)
        watch.lap(name)
    assert watch.spans == [
        ("join", 1.8e9, 1.0),
        ("load", 1.8e9 + 1.5, 2.0),
        ("join", 1.8e9 + 3.5, 0.125),
    ]
    assert (watch.seconds("join"), watch.seconds("load"), watch.seconds("tune")) == (1.125, 2.0, 0)
    assert (watch.total, watch.init) == (3.625, 0.25)


def test_setting_the_clock_changes_no_span(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    watch = Stopwatch()
    clocks.go_on(1.0)
    watch.lap("join")
    clocks.wall -= 3600
    clocks.go_on(2.0)
    watch.lap("load")
    assert watch.spans == [("join", 1.8e9, 1.0), ("load", 1.8e9 + 1, 2.0)]


def test_init_is_told_once() -> None:
    timing.ready()
    age = timing.init_seconds()
    with open("/proc/uptime") as uptime:
        assert 0 < age < float(uptime.read().split()[0])
    assert timing.init_seconds() == 0


def test_init_is_from_the_start_of_the_process() -> None:
    """Not what the process waits for its first event: Lambda may start it early."""
    code = (
        "import time; time.sleep(0.5); from lambda_worker import handlers, timing;"
        "time.sleep(1); print(timing.init_seconds())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 <= float(done.stdout) < time.monotonic() - began - 0.9


def test_a_programs_name_is_no_field(tmp_path: Path) -> None:
    """/proc/self/stat has it second, unescaped."""
    program = tmp_path / "a) 1 2 (b"
    program.symlink_to(sys.executable)
    code = "from lambda_worker import timing; timing.ready(); print(timing.init_seconds())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([program, "-c", code], capture_output=True, text=True, env=env)
    assert 0 < float(done.stdout) < 60, done.stderr


# -- control groups ------------------------------------------------------------------------------


def make(root: Path, groups: str, limits: dict[str, object]) -> Path:
    for name, content in {"proc/self/cgroup": groups, **limits}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("groups", "limits", "mib"),
    [
        ("0::/", {}, None),
        ("0::/", {f"{V2}/memory.max": "max"}, None),
        ("0::/", {f"{V2}/memory.max": 512 * MIB}, 512),
        ("0::/a/b", {f"{V2}/a/memory.max": 64 * MIB, f"{V2}/a/b/memory.max": 99 * MIB}, 64),
        ("0::/a/b", {f"{V2}/memory.max": 64 * MIB}, 64),  # a host's path, in a container
        ("4:memory:/x\n3:cpu:/y", {f"{V1}/x/memory.limit_in_bytes": 7 * MIB}, 7),
        ("4:memory:/x", {f"{V1}/memory.limit_in_bytes": 7 * MIB}, 7),
        ("4:memory:/", {f"{V1}/memory.limit_in_bytes": (1 << 63) - 4096}, None),
        # Both: version 1 limits, and version 2 is mounted beside it, without controllers.
        ("4:memory:/\n0::/", {f"{V1}/memory.limit_in_bytes": 7 * MIB}, 7),
        ("1:name=systemd:/\n", {f"{V2}/memory.max": 5 * MIB}, None),
        ("nonsense", {f"{V2}/memory.max": 5 * MIB}, None),
        ("0::/", {f"{V2}/memory.max": "much"}, None),
    ],
)
def test_the_limit_of_a_container(
    tmp_path: Path, groups: str, limits: dict[str, object], mib: int | None
) -> None:
    expected = None if mib is None else mib * MIB / 1e6
    assert memory_limit(make(tmp_path, groups, limits), {}) == expected


def test_the_limit_of_a_function(tmp_path: Path) -> None:
    """Lambda's MB are 2^20 bytes, ours 10^6."""
    size = {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1769"}
    assert memory_limit(tmp_path, size) == pytest.approx(1854.93, abs=0.01)
    make(tmp_path, "0::/", {f"{V2}/memory.max": 512 * MIB})
    assert memory_limit(tmp_path, size) == 512 * MIB / 1e6
    assert memory_limit(tmp_path, {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "all"}) == 512 * MIB / 1e6


# -- in records ----------------------------------------------------------------------------------


def record(make_pt: MakePt, tmp_path: Path, **fields: Any) -> dict[str, Any]:
    """The only rank's record."""
    event = {"data": str(make_pt("some.pt", 20)), "results": str(tmp_path / "out"), **fields}
    (task,) = handlers.init({"world_size": 1, **event})["ranks"]
    return handlers.infer(task)


def test_the_first_event_of_a_process_has_an_init_time(make_pt: MakePt, tmp_path: Path) -> None:
    timing.ready()  # as the import of the handlers does
    first, second = (record(make_pt, tmp_path, run=name) for name in "ab")
    assert first["init_time (seconds)"] > 0
    assert second["init_time (seconds)"] == 0
    written = json.loads((tmp_path / "out/a/0.json").read_text())
    assert written == first


@pytest.mark.parametrize(
    ("batch_size", "stages"), [(8, ["load", "infer"]), ("auto", ["load", "tune", "infer"])]
)
def test_without_a_job_nobody_joins_or_waits(
    make_pt: MakePt, tmp_path: Path, batch_size: object, stages: list[str]
) -> None:
    own = record(make_pt, tmp_path, batch_size=batch_size)
    assert [name for name, _, _ in own["spans"]] == stages
    assert own["join_time (seconds)"] == own["collective_time (seconds)"] == 0


def test_spans_are_the_records_times(make_pt: MakePt, tmp_path: Path, rendezvous: str) -> None:
    before = time.time()
    own = record(make_pt, tmp_path, rendezvous_endpoint=rendezvous, batch_size="auto")
    after = time.time()
    spans = {name: (start, seconds) for name, start, seconds in own["spans"]}
    assert list(spans) == ["join", "load", "tune", "barrier", "infer", "allreduce"]
    assert spans["join"][1] == own["join_time (seconds)"]
    assert spans["load"][1] == own["load_time (seconds)"]
    assert spans["infer"][1] >= own["inference_time (seconds)"]
    assert sum(seconds for _, seconds in spans.values()) <= own["wall_time (seconds)"]
    moments = [(start, start + seconds) for start, seconds in spans.values()]
    slack = 1e-6  # what a float of a Unix time can tell
    assert before - 0.05 < moments[0][0]
    assert moments[-1][1] < after + 0.05
    for (_, end), (start, _) in pairwise(moments):
        assert end <= start + slack


def test_what_is_done_between_two_stages_is_in_neither(
    make_pt: MakePt, tmp_path: Path, rendezvous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lambda_worker.inference.judge", lambda *arguments: time.sleep(0.5))
    own = record(make_pt, tmp_path, rendezvous_endpoint=rendezvous)
    (_, start, seconds), (_, after, _) = own["spans"][-2:]
    assert after - (start + seconds) > 0.49
    assert own["wall_time (seconds)"] > 0.49 + sum(seconds for _, _, seconds in own["spans"])
