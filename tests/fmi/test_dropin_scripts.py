"""Scripts that say ``import fmi``, as processes: they find the drop-in and leave without a word."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fmi_client.fmi
from fmi_client import fmi_operations
from fmi_client.errors import RankTaken

ROOT = Path(__file__).parents[2]
SECONDS = 20


def write_config(path: Path, address: str) -> Path:
    """Write all that the library's own configuration has, with more time for busy machines."""
    host, port = address.split(":")
    waits = {"timeout": 1, "max_timeout": 10_000}
    backends = {
        "S3": {"enabled": False, "bucket_name": "b", "s3_region": "eu-central-1", **waits},
        "Redis": {"enabled": False, "host": "127.0.0.1", "port": 6379, **waits},
        "Direct": {"enabled": True, "host": host, "port": int(port), "max_timeout": 10_000},
    }
    server = {"requests_per_hour": 1000, "include_infrastructure_costs": True}
    speed = {"bandwidth": 50.0, "overhead": 40.4, "transfer_price": 0.0}
    model = {
        "FaaS": {"gib_second_price": 1.7e-5},
        "S3": {**speed, "download_price": 4e-7, "upload_price": 5e-6},
        "Redis": {**speed, "instance_price": 0.004, **server},
        "Direct": {**speed, "vm_price": 0.013, **server},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"backends": backends, "model": model}))
    return path


@contextmanager
def ranks(folder: Path, script: str, arguments: list[list[str]], **env: str) -> Iterator[list[Any]]:
    """A process for each list of arguments; they end with the block."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-W", "error", "-m", "fmi_client.fmi", "script.py"]
    found: list[Any] = []
    try:
        for each in arguments:
            found.append(
                subprocess.Popen(
                    [*command, *each],
                    env={**os.environ, "PYTHONPATH": str(ROOT), **env},
                    cwd=folder,
                    stdin=-1,
                    stdout=-1,
                    stderr=-1,
                    text=True,
                )
            )
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


# The calls of the library's example client, in its order, with numbers of our own.
CLIENT = """
import sys

import fmi

size, rank = int(sys.argv[1]), int(sys.argv[2])
comm = fmi.Communicator(rank, size, "../../config/fmi.json", "example", 512)
comm.hint(fmi.hints.fast)
comm.barrier()

INT, DOUBLE = fmi.types(fmi.datatypes.int), fmi.types(fmi.datatypes.double)
INTS, DOUBLES = fmi.datatypes.int_list, fmi.datatypes.double_list
KINDS = [
    (INT, 5 + rank),
    (DOUBLE, 0.5 + rank),
    (fmi.types(INTS, 2), [rank, 10 + rank]),
    (fmi.types(DOUBLES, 2), [rank + 0.25, 10.5]),
]


def show(operation, *values):
    print(operation, *values)


for kind, value in KINDS:
    if rank == 0:
        comm.send(value, 1, kind)
    else:
        show("recv", comm.recv(0, kind))
for kind, value in KINDS:
    show("bcast", comm.bcast(value if rank == 0 else None, 0, kind))
for kind, value in KINDS:
    show("gather", comm.gather(value, 0, kind))
for kind, value in [(fmi.types(INTS, 2), [3, 4]), (fmi.types(DOUBLES, 4), [0.5, 1.5, 2.5, 3.5])]:
    show("scatter", comm.scatter(value if rank == 0 else None, 0, kind))

own = fmi.func(fmi.op.custom, lambda a, b: 3 * (a + b), True, True)
OPS = [fmi.func(op) for op in (fmi.op.sum, fmi.op.prod, fmi.op.max, fmi.op.min)]
for kind, value in KINDS:
    for f in (*OPS, own):
        show("reduce", comm.reduce(value, 0, f, kind))
for f in (*OPS, own):
    show("allreduce", comm.allreduce(5 + rank, f, INT), comm.allreduce(0.5 + rank, f, DOUBLE))
show("allreduce", comm.allreduce([1, 2 + rank], OPS[0], fmi.types(INTS, 2)))
for f in (*OPS, own):
    show("scan", comm.scan(5 + rank, f, INT), comm.scan(0.5 + rank, f, DOUBLE))
show("scan", comm.scan([1, 2 + rank], OPS[0], fmi.types(INTS, 2)))
"""

SENT = ["5", "0.5", "[0, 10]", "[0.25, 10.5]"]
REDUCED = [
    *("11", "30", "6", "5", "33"),
    *("2.0", "0.75", "1.5", "0.5", "6.0"),
    *("[1, 21]", "[0, 110]", "[1, 11]", "[0, 10]", "[3, 63]"),
    *("[1.5, 21.0]", "[0.3125, 110.25]", "[1.25, 10.5]", "[0.25, 10.5]", "[4.5, 63.0]"),
]
EVERYWHERE = [f"{a} {b}" for a, b in zip(REDUCED[:5], REDUCED[5:10], strict=True)] + ["[2, 5]"]
EXPECTED = {
    0: [
        *(f"bcast {value}" for value in SENT),
        *("gather [5, 6]", "gather [0.5, 1.5]"),
        *("gather [0, 10, 1, 11]", "gather [0.25, 10.5, 1.25, 10.5]"),
        *("scatter [3]", "scatter [0.5, 1.5]"),
        *(f"reduce {value}" for value in REDUCED),
        *(f"allreduce {value}" for value in EVERYWHERE),
        *["scan 5 0.5"] * 5,
        "scan [1, 2]",
    ],
    1: [
        *(f"recv {value}" for value in SENT),
        *(f"bcast {value}" for value in SENT),
        *["gather []"] * 4,
        *("scatter [4]", "scatter [2.5, 3.5]"),
        *["reduce None"] * 20,
        *(f"allreduce {value}" for value in EVERYWHERE),
        *(f"scan {value}" for value in EVERYWHERE),
    ],
}


def test_the_calls_of_the_librarys_example(address: str, tmp_path: Path) -> None:
    folder = tmp_path / "python" / "tests"
    folder.mkdir(parents=True)
    write_config(tmp_path / "config" / "fmi.json", address)
    with ranks(folder, CLIENT, [["2", "0"], ["2", "1"]]) as processes:
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=SECONDS)
            assert (out.splitlines(), err) == (EXPECTED[rank], "")
            assert process.returncode == 0


# What the astronomy code's inference does about communication.
INFERENCE = """
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


def test_two_files_do_as_well(address: str, tmp_path: Path) -> None:
    """That the document names: then the script is started as ever."""
    page = (ROOT / "docs" / "from-fmi.md").read_text()
    files = re.findall(r"`(fmi\S*\.py)` with `(from .+)`", page)
    assert len(files) == 2
    for name, text in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    config = write_config(tmp_path / "fmi.json", address)
    (tmp_path / "script.py").write_text(INFERENCE)
    done = subprocess.run(
        [sys.executable, "-W", "error", "script.py", "1", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FMI_CONFIG": str(config), "FMI_JOB": "files"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (done.stdout, done.stderr) == ("0.25\n", "")


@pytest.mark.parametrize(("size", "total"), [(1, "0.25"), (3, "3.75")])
def test_the_calls_of_the_astronomy_code(
    address: str, tmp_path: Path, size: int, total: str
) -> None:
    config = write_config(tmp_path / "fmi.json", address)
    arguments = [[str(size), str(rank)] for rank in range(size)]
    env = {"FMI_CONFIG": str(config), "FMI_JOB": f"astronomy {size}"}
    with ranks(tmp_path, INFERENCE, arguments, **env) as processes:
        results = [process.communicate(timeout=SECONDS) for process in processes]
    assert results == [(f"{total}\n", "")] + [("None\n", "")] * (size - 1)


def test_the_wrapper_has_a_configuration_of_its_own(
    monkeypatch: pytest.MonkeyPatch, address: str, tmp_path: Path
) -> None:
    monkeypatch.delenv("FMI_CONFIG", raising=False)
    monkeypatch.setattr(fmi_operations, "CONFIG", str(tmp_path / "fmi.json"))
    with pytest.raises(FileNotFoundError, match="FMI_CONFIG"):
        fmi_operations.fmi_communicator(1, 0)
    write_config(tmp_path / "fmi.json", address)
    comm = fmi_operations.fmi_communicator(1, 0)
    comm.barrier()
    with pytest.raises(RankTaken):  # of the same job
        fmi_operations.fmi_communicator(1, 0).barrier()
    monkeypatch.setenv("FMI_JOB", "another")
    other = fmi_operations.fmi_communicator(1, 0)
    other.barrier()
    other.close()
    comm.close()
    with pytest.raises(ValueError, match="peer_id=1 is not a rank of 1"):
        fmi_operations.fmi_communicator(1, 1)


def test_an_alias_is_found_however_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fmi", "fmilib", "fmilib.fmi_operations"):
        monkeypatch.setitem(sys.modules, name, None)  # and put back afterwards
    fmi_client.fmi.alias()
    found: dict[str, Any] = {}
    exec("import fmi, fmilib, fmilib.fmi_operations\nfrom fmilib import fmi_operations", found)
    assert found["fmi"] is fmi_client.fmi
    assert found["fmi_operations"] is found["fmilib"].fmi_operations is fmi_operations


# Rank 2 is done early, and says nothing of it. Then the others go on, once told to.
EARLY = """
import sys

import fmi

rank = int(sys.argv[1])
comm = fmi.Communicator(rank, 3, "fmi.json", "early")
comm.barrier()
if rank < 2:
    sys.stdin.readline()
    int_ = fmi.types(fmi.datatypes.int)
    print(comm.send(5, 1, int_) if rank == 0 else comm.recv(0, int_))
"""


def test_a_rank_that_is_done_leaves(address: str, tmp_path: Path) -> None:
    """Had it died, the others' next operations would fail."""
    write_config(tmp_path / "fmi.json", address)
    with ranks(tmp_path, EARLY, [["0"], ["1"], ["2"]]) as processes:
        *others, early = processes
        assert early.communicate(timeout=SECONDS) == ("", "")
        outputs = [process.communicate("go on\n", timeout=SECONDS) for process in others]
        assert outputs == [("None\n", ""), ("5\n", "")]


def test_a_communicator_that_is_forgotten_leaves(address: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "fmi.json", address)
    for _ in range(2):  # it would be refused as long as the first is there
        comm = fmi_client.fmi.Communicator(0, 1, config, "forgotten")
        comm.barrier()
        del comm


STORE = """
import sys

import fmi

comm = fmi.Communicator(int(sys.argv[1]), 2, "fmi.json", "store", 512)
print(comm.allreduce(2, fmi.func(fmi.op.prod), fmi.types(fmi.datatypes.int)))
"""


def test_through_a_store_a_script_ends_as_well(tmp_path: Path, bucket: Path) -> None:
    """And leaves nothing behind, though the threads that write have ended before."""
    own = bucket.with_name("scripts")
    own.mkdir()
    path = write_config(tmp_path / "fmi.json", "h:1")
    config = json.loads(path.read_text())
    config["backends"]["Direct"]["enabled"] = False
    config["backends"]["S3"] |= {"enabled": True, "bucket_name": own.name, "max_timeout": 9000}
    path.write_text(json.dumps(config))
    with ranks(tmp_path, STORE, [["0"], ["1"]]) as processes:
        assert [process.communicate(timeout=SECONDS) for process in processes] == [("4\n", "")] * 2
    assert not [file for file in own.rglob("*") if file.is_file()]


THREAD = """
import threading

import fmi


def work():
    comm = fmi.Communicator(0, 1, "fmi.json", "thread")
    comm.barrier()
    ready.set()
    threading.main_thread().join()
    print(comm.allreduce(2, fmi.func(fmi.op.sum), fmi.types(fmi.datatypes.int)))


ready = threading.Event()
threading.Thread(target=work).start()
ready.wait()
"""


def test_a_thread_goes_on_after_the_main_one(address: str, tmp_path: Path) -> None:
    write_config(tmp_path / "fmi.json", address)
    with ranks(tmp_path, THREAD, [[]]) as (process,):
        assert process.communicate(timeout=SECONDS) == ("2\n", "")


FORKING = """
import multiprocessing
import sys

import fmi

comm = fmi.Communicator(int(sys.argv[1]), 2, "fmi.json", "forking")
comm.barrier()
child = multiprocessing.get_context("fork").Process(target=len, args=([],))
child.start()
child.join()
comm.barrier()
print(child.exitcode, comm.allreduce(2, fmi.func(fmi.op.prod), fmi.types(fmi.datatypes.int)))
"""


def test_a_child_that_ends_takes_nobody_along(address: str, tmp_path: Path) -> None:
    """As a worker that loads data, say: it has the rank's connections, but is not the rank."""
    write_config(tmp_path / "fmi.json", address)
    with ranks(tmp_path, FORKING, [["0"], ["1"]]) as processes:
        results = [process.communicate(timeout=SECONDS) for process in processes]
    assert results == [("0 4\n", "")] * 2


RAISING = """
import sys

import fmi

rank = int(sys.argv[1])
comm = fmi.Communicator(rank, 2, "fmi.json", "raising")
comm.barrier()
if rank == 1:
    raise SystemExit("out of memory")
comm.recv(1, fmi.types(fmi.datatypes.int))
"""


def test_a_script_that_fails_ends_the_others(address: str, tmp_path: Path) -> None:
    """And not after a deadline only."""
    write_config(tmp_path / "fmi.json", address)
    with ranks(tmp_path, RAISING, [["0"], ["1"]]) as processes:
        errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
        codes = [process.returncode for process in processes]
    assert codes == [1, 1]
    assert "RankFailed: [rank 1, recv] rank 1 has left the job, but is needed" in errors[0]
    assert errors[1] == "out of memory\n"


def test_a_script_finds_its_neighbours_arguments_and_name(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("NUMBER = 7\n")
    script = tmp_path / "script.py"
    script.write_text("import sys, fmi, neighbour; print(neighbour.NUMBER, sys.argv, __name__)")
    done = subprocess.run(
        [sys.executable, "-m", "fmi_client.fmi", script, "a", "-b"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SECONDS,
    )
    assert (done.stdout, done.stderr) == (f"7 {[str(script), 'a', '-b']} __main__\n", "")


def test_it_says_how_it_is_called() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fmi_client.fmi"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert done.stderr == "usage: python -m fmi_client.fmi SCRIPT.py [ARGUMENT ...]\n"
