"""The drop-in for the C++ library's Python module: every call of its example, in real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fmi_client
import fmi_client.fmi as fmi
from fmi_client.errors import CollectiveTimeout, RankFailed
from tests.processes import spawn

ROOT = Path(__file__).parents[2]
INT, DOUBLE = fmi.types(fmi.datatypes.int), fmi.types(fmi.datatypes.double)


def ints(n: int | None = None) -> fmi.types:
    return fmi.types(fmi.datatypes.int_list, n)


def doubles(n: int | None = None) -> fmi.types:
    return fmi.types(fmi.datatypes.double_list, n)


def write(path: Path, address: str, *enabled: str, **direct: Any) -> Path:
    """Write a configuration as the library's own, with some backends enabled."""
    host, port = address.split(":")
    backends = {
        "S3": {"bucket_name": "bucket", "s3_region": "us-east-1", "timeout": 100},
        "Redis": {"host": "127.0.0.1", "port": 6379, "timeout": 1},
        "Direct": {"host": host, "port": int(port), **direct},
    }
    for name, values in backends.items():
        values |= {"enabled": name in enabled, "max_timeout": values.get("max_timeout", 5000)}
    model = {
        "FaaS": {"gib_second_price": 0.0000166667},
        "S3": {"bandwidth": 50.0, "overhead": 40.4, "download_price": 4e-7, "upload_price": 5e-6},
        "Direct": {
            "bandwidth": 400.0,
            "overhead": 0.34,
            "vm_price": 0.0134,
            "include_infrastructure_costs": True,
        },
    }
    path.write_text(json.dumps({"backends": backends, "model": model}))
    return path


@pytest.fixture
def config(tmp_path: Path, address: str) -> Path:
    return write(tmp_path / "fmi.json", address, "Direct")


def run(config: Path, size: int, function: Any, job: str = "drop-in") -> list[Any]:
    """Run `function(comm, rank)` in `size` processes; results, or errors, in rank order."""

    def be(rank: int, pipe: Any) -> None:
        try:
            comm = fmi.Communicator(rank, size, str(config), job, 512)
            result = function(comm, rank)
            comm.close()
            pipe.send(result)
        except BaseException as error:
            pipe.send(error)

    def result(pipe: Any) -> Any:
        try:
            return pipe.recv() if pipe.poll(20) else "silent"
        except EOFError:
            return "died"

    pipes = [spawn.Pipe(duplex=False) for _ in range(size)]
    ranks = [spawn.Process(target=be, args=(r, pipes[r][1]), daemon=True) for r in range(size)]
    try:
        for rank in ranks:
            rank.start()
        for _, theirs in pipes:
            theirs.close()
        return [result(ours) for ours, _ in pipes]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def weave(a: Any, b: Any) -> Any:
    """Neither commutative nor associative."""
    return 2 * a - b


def woven(values: list[Any]) -> Any:
    total = values[0]
    for value in values[1:]:
        total = weave(total, value)
    return total


TIMES = fmi.func(fmi.op.custom, lambda a, b: a * b, True, True)
IN_ORDER = fmi.func(fmi.op.custom, weave, False, False)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_operation_of_every_type(config: Path, size: int) -> None:
    def rank(comm: fmi.Communicator, r: int) -> list[Any]:
        last = size - 1
        add, most = fmi.func(fmi.op.sum), fmi.func(fmi.op.max)
        comm.barrier()
        got = [
            comm.bcast(7 if r == last else None, last, INT),
            comm.bcast([1.5, 2.5] if r == 0 else None, 0, doubles(2)),
            comm.gather(r, last, INT),
            comm.gather([r + 0.5, r], 0, doubles(2)),
            comm.scatter(list(range(2 * size)) if r == last else None, last, ints(2 * size)),
            comm.reduce(r + 1, last, add, INT),
            comm.reduce([r, 1], 0, fmi.func(fmi.op.prod), ints(2)),
            comm.allreduce(r + 0.5, most, DOUBLE),
            comm.allreduce([r, -r], fmi.func(fmi.op.min), ints(2)),
            comm.scan(r + 1, add, INT),
            comm.scan([r, -r], most, ints(2)),
            comm.allreduce(r + 1, IN_ORDER, INT),
            comm.reduce([r, 2 * r], last, IN_ORDER, ints(2)),
            comm.scan(r + 1.5, IN_ORDER, DOUBLE),
            comm.allreduce([r + 1, 2], TIMES, ints(2)),
        ]
        return got

    everybody = range(size)
    for r, got in enumerate(run(config, size, rank, f"all {size}")):
        first, last = r == 0, r == size - 1
        product = 0 if size > 1 or first else 1
        assert got == [
            7,
            [1.5, 2.5],
            list(everybody) if last else [],
            [x for i in everybody for x in (i + 0.5, i)] if first else [],
            [2 * r, 2 * r + 1],
            sum(range(size + 1)) if last else None,
            [product, 1] if first else None,
            size - 0.5,
            [0, 1 - size],
            sum(range(r + 2)),
            [r, 0],
            woven([i + 1 for i in everybody]),
            [woven(list(everybody)), woven([2 * i for i in everybody])] if last else None,
            woven([i + 1.5 for i in range(r + 1)]),
            [factorial(size), 2**size],
        ]
        assert type(got[0]) is type(got[9]) is int
        assert type(got[7]) is type(got[3][1] if first else 0.0) is float


def factorial(n: int) -> int:
    return 1 if n < 2 else n * factorial(n - 1)


def test_the_senders_list_is_left_alone(config: Path) -> None:
    """The original combines into what it is given to send."""

    def rank(comm: fmi.Communicator, r: int) -> list[int]:
        mine = [r, r]
        for f in (fmi.func(fmi.op.sum), IN_ORDER):
            comm.allreduce(mine, f, ints(2))
            comm.reduce(mine, 0, f, ints(2))
            comm.scan(mine, f, ints(2))
        return mine

    assert run(config, 3, rank, "alone") == [[0, 0], [1, 1], [2, 2]]


def test_a_dead_rank_is_an_error_on_all_others(config: Path) -> None:
    """The original logs a failed send and goes on."""

    def rank(comm: fmi.Communicator, r: int) -> Any:
        comm.barrier()
        if r == 1:
            os._exit(1)
        while True:
            comm.allreduce(1, fmi.func(fmi.op.sum), INT)

    first, second, third = run(config, 3, rank, "dead")
    assert second == "died"
    for error in (first, third):
        assert isinstance(error, RankFailed)
        assert error.rank == 1


def test_a_late_rank_is_named_after_max_timeout(tmp_path: Path, address: str) -> None:
    config = write(tmp_path / "fmi.json", address, "Direct", max_timeout=200)

    def rank(comm: fmi.Communicator, r: int) -> Any:
        comm.barrier()
        return comm.recv(1, INT) if r == 0 else comm.barrier()

    assert isinstance(run(config, 2, rank, "late")[0], CollectiveTimeout)


def test_what_was_sent_is_not_read_as_another_type(config: Path) -> None:
    def rank(comm: fmi.Communicator, r: int) -> Any:
        if r == 0:
            comm.send([1.5], 1, doubles())
            comm.send([1, 2], 1, ints())
            return None
        for type in (ints(1), ints(3)):
            with pytest.raises((TypeError, ValueError), match="is not types"):
                comm.recv(0, type)
        return "refused"

    assert run(config, 2, rank, "types") == [None, "refused"]


@pytest.mark.parametrize("value", [1.5, "1", [1], None, 2**63, 2**64])
def test_what_is_no_int_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, OverflowError)):
        INT.array(value)


def test_wrong_lists_and_functions_are_refused(config: Path) -> None:
    comm = fmi.Communicator(0, 2, str(config), "never joined")
    with pytest.raises(ValueError, match="a list of 1"):
        comm.send([1], 1, ints(2))
    with pytest.raises(ValueError, match="no 2 equal parts"):
        comm.scatter([1, 2, 3], 0, ints(3))
    with pytest.raises(TypeError, match="takes a list"):
        comm.scatter(1, 0, INT)
    with pytest.raises(TypeError, match="needs a function"):
        fmi.func(fmi.op.custom)
    comm.close()
    with pytest.raises(ValueError, match="closed"):
        comm.barrier()


# -------------------------------------------------------------------------- channels
def test_the_hint_chooses_and_the_prediction_shows(tmp_path: Path) -> None:
    config = write(tmp_path / "fmi.json", "h:1", "Direct", "S3")
    comm = fmi.Communicator(0, 2, config, "job", 512)
    assert comm.choice.hint == "cheap", "as the library's, before any hint"
    assert comm.choice.channel == "object", "two ranks send less than a server costs"
    comm.hint(fmi.hints.fast)
    assert comm.choice.channel == "auto"
    assert "<- chosen" in str(comm.choice)
    # 0.34 ms for a barrier, an allreduce and twice for a gather, whose 100 kB go at 400 MB/s.
    expected = pytest.approx(4 * 0.34e-3 + 1e5 / 400e6, rel=0.01)
    assert comm.choice.predictions["auto"].seconds == expected


def test_a_server_that_runs_anyway_costs_nothing(tmp_path: Path) -> None:
    config = write(tmp_path / "fmi.json", "h:1", "Direct", "S3")
    settings = json.loads(config.read_text())
    del settings["model"]["Direct"]["include_infrastructure_costs"]  # false, as in the library
    config.write_text(json.dumps(settings))
    assert fmi.Communicator(0, 2, config, "job", 512).choice.channel == "auto"


def test_s3_is_the_object_channel(tmp_path: Path, bucket: Path) -> None:
    config = write(tmp_path / "fmi.json", "h:1", "S3")

    def rank(comm: fmi.Communicator, r: int) -> Any:
        return comm.allreduce(r + 1, fmi.func(fmi.op.sum), INT)

    assert run(config, 2, rank, "s3") == [3, 3]


def test_redis_is_left_out_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "fmi.json"
    with pytest.warns(UserWarning, match="Redis here: a hint chooses from Direct only") as seen:
        fmi.Communicator(0, 2, write(path, "h:1", "Redis", "Direct"), "job")
    assert seen[0].filename == __file__
    with pytest.raises(ValueError, match=r"only Redis is enabled.*enable Direct"):
        fmi.Communicator(0, 2, write(path, "h:1", "Redis"), "job")
    with pytest.raises(ValueError, match="no backend is enabled"):
        fmi.Communicator(0, 2, write(path, "h:1"), "job")


# ----------------------------------------------------------------------------- alias
SCRIPT = """
import sys
import fmi
from fmilib.fmi_operations import fmi_communicator

size, rank = map(int, sys.argv[1:])
comm = fmi_communicator(size, rank)
comm.hint(fmi.hints.fast)
comm.barrier()
double = fmi.types(fmi.datatypes.double)
print(comm.reduce(rank + 0.25, 0, fmi.func(fmi.op.sum), double))
"""


def test_a_script_runs_unchanged(config: Path, tmp_path: Path) -> None:
    """And leaves in order without a word, as the original's destructor does."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FMI_CONFIG": str(config)}
    command = [sys.executable, "-W", "error", "-m", "fmi_client.fmi", "script.py", "2"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], env=env, cwd=tmp_path, stdout=-1, stderr=-1, text=True
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=20) for rank in ranks] == [("1.5\n", ""), ("None\n", "")]


def rows() -> list[tuple[str, str]]:
    page = (ROOT / "docs" / "from-fmi.md").read_text()
    return re.findall(r"^\| `(comm\..+)` \| `(.+)` \|$", page, re.MULTILINE)


def test_every_row_of_the_document_does_the_same_both_ways(config: Path, address: str) -> None:
    calls = rows()
    assert len(calls) == 10

    def rank(comm: fmi.Communicator, r: int) -> list[tuple[Any, Any]]:
        names = {"fmi": fmi, "fmi_client": fmi_client, "r": r}
        with fmi_client.sync.connect(address, job="new", rank=r, size=2, timeout=10) as new:
            return [
                (eval(a, {"comm": comm, **names}), eval(b, {"comm": new, **names}))
                for a, b in calls
            ]

    for results in run(config, 2, rank, "rows"):
        for old, new in results:
            assert old == new
