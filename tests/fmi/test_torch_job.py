"""The torch backend as programs use it: joining by address or environment, the store, leaving."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch._C._distributed_c10d import _test_python_store
from torch.distributed import DistBackendError, DistStoreError, PrefixStore

from fmi_client import background, torch_join, torch_register, torch_store
from fmi_client.background import Background
from fmi_client.errors import FmiError, RankFailed
from fmi_client.torch_store import FmiStore
from tests.fmi.torch_ranks import joined
from tests.processes import RankProcess, Tell, processes
from tests.support import closed_port

SHORT = timedelta(seconds=0.2)
SOON = timedelta(seconds=15)


# ------------------------------------------------------------------------------- the store
@contextmanager
def stores(address: str, size: int) -> Iterator[list[FmiStore]]:
    with joined(address, size) as members:
        yield [FmiStore(member, SOON) for member in members]


def test_a_store_is_what_torch_expects(address: str) -> None:
    with stores(address, 1) as (store,):
        _test_python_store(store)


def test_all_ranks_see_the_same_keys(address: str) -> None:
    with stores(address, 3) as (zero, one, two):
        one.set("a", "1")
        assert zero.get("a") == two.get("a") == b"1"
        assert [each.add("n", 2) for each in (zero, one, two)] == [2, 4, 6]
        assert two.compare_set("c", "", "first") == b"first"
        assert one.compare_set("c", "other", "second") == b"first"
        assert one.compare_set("c", "first", "second") == b"second"
        assert one.compare_set("missing", "expected", "x") == b"expected"
        two.append("a", b"\x00\xff")
        assert one.multi_get(["a", "c"]) == [b"1\x00\xff", b"second"]
        one.multi_set(["x", "y"], ["1", "2"])
        assert zero.check(["x", "y"])
        assert not zero.check(["x", "z"])
        assert two.num_keys() == 5
        assert two.delete_key("x")
        assert not one.delete_key("x")


def test_a_key_is_waited_for(address: str) -> None:
    with stores(address, 2) as (zero, one), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(each.get, "late") for each in (zero, one)]
        one.set("other", b"")
        assert not any(future.done() for future in waiting)
        PrefixStore("la", zero).set("te", "x")  # its key is "la/te"
        zero.set("late", b"there")
        assert [future.result(10) for future in waiting] == [b"there", b"there"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_key_that_does_not_come(address: str, rank: int) -> None:
    with stores(address, 2) as both:
        with pytest.raises(
            DistStoreError, match=f"rank {rank}: store.wait.*nobody set b, c in 0.2 s"
        ):
            both[rank].wait(["b", "c"], SHORT)
        both[rank].set("b", "still here")
        assert both[1 - rank].get("b") == b"still here"


GARBLED: list[Any] = [
    *(None, 5, [1], ["1", "set", ["k", b""], 1.0], [1, ["set"], [], 1.0]),
    *([-1, "num_keys", [], 1.0], [2**63, "num_keys", [], 1.0], [90, "wait", [5], 1.0]),
    *([91, "wait", [["x", ["y"]]], 1.0], [92, "wait", [["x"]], "soon"]),
    *([93, "set", [["k"], b""], 1.0], [94, "set", ["k", 2**40], 1.0]),
    *([95, "append", ["k", 1], 1.0], [96, "add", ["n", "x"], 1.0], [97, "__init__", [], 1.0]),
]


@pytest.mark.parametrize("question", GARBLED, ids=str)
def test_a_garbled_question_harms_nobody(address: str, question: Any) -> None:
    with stores(address, 2) as (zero, one):
        comm = one._comm
        one._background.submit(lambda: comm.send(question, 0, torch_store.ASK_TAG)).result(10)
        one.set("a", "1")
        assert zero.get("a") == one.get("a") == b"1"
        assert zero.num_keys() == 1


def test_a_store_without_rank_0(address: str) -> None:
    with joined(address, 2) as members:
        store = [FmiStore(member, SOON) for member in members][1]
        members[0].close()
        with pytest.raises(DistStoreError, match=r"rank 1: store\.set"):
            store.set("a", "1")


# ------------------------------------------------------------------- ranks in processes
Program = Callable[[int, int], Any]


def programs(
    size: int, function: Program, **environment: str
) -> AbstractContextManager[list[RankProcess]]:
    """Let `function(rank, size)` run in processes, with what torchrun sets."""

    def be(rank: int, tell: Tell) -> None:
        os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(size))
        try:
            tell(function(rank, size))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return processes(size, be)


def run(size: int, function: Program, **environment: str) -> list[Any]:
    with programs(size, function, **environment) as ranks:
        return [rank.result() for rank in ranks]


def total(rank: int) -> float:
    tensor = torch.tensor([float(rank)])
    dist.all_reduce(tensor)
    return float(tensor.item())


def test_by_address(address: str) -> None:
    def program(rank: int, size: int) -> Any:
        key = "ab" * 32
        dist.init_process_group(
            "fmi", init_method=f"fmi://{address}/by-address?key={key}", rank=rank, world_size=size
        )
        group = dist.new_group([0, 2])
        part = None
        if rank != 1:
            tensor = torch.ones(1)
            dist.all_reduce(tensor, group=group)
            part = tensor.item()
        objects: list[Any] = [None] * size
        dist.all_gather_object(objects, {"rank": rank})
        dist.monitored_barrier()
        return dist.get_backend(), total(rank), part, [each["rank"] for each in objects]

    want = [0, 1, 2]
    assert run(3, program) == [
        ("fmi", 3.0, 2.0, want),
        ("fmi", 3.0, None, want),
        ("fmi", 3.0, 2.0, want),
    ]


def test_a_job_by_its_name_in_an_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Percent signs stand for what an address cannot hold: tokens, and others, have the name."""
    joined: list[str] = []
    monkeypatch.setattr(torch_join, "_join", lambda server, job, *_, **__: joined.append(job))
    for path in ("/my%20job/", "/my%2Fjob", "/my+job"):
        with pytest.raises(AttributeError):  # what follows needs a job
            torch_join.rendezvous(f"fmi://{address}{path}?rank=0&world_size=1")
    assert joined == ["my job", "my/job", "my+job"]


def test_by_environment_without_the_import(address: str, tmp_path: Path) -> None:
    """As any program that torchrun starts: torch finds the backend by its entry point."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('fmi')\n"
        "tensor = torch.ones(3) * dist.get_rank()\n"
        "dist.all_reduce(tensor)\n"
        "os.write(1, f'{dist.get_backend()} {tensor.sum().item()}\\n'.encode())\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"FMI_SERVER": address, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fmi 3.0\n" * 2


def test_one_job_after_another_by_a_file(address: str, tmp_path: Path) -> None:
    def program(rank: int, size: int) -> list[float]:
        totals = []
        for number in range(3):
            place = f"file://{tmp_path}/{number}"
            dist.init_process_group("fmi", init_method=place, rank=rank, world_size=size)
            totals.append(total(rank))
            dist.destroy_process_group()
        return totals

    assert run(2, program, FMI_SERVER=address) == [[1.0] * 3] * 2


def test_one_job_after_another_of_the_same_name(address: str) -> None:
    def program(rank: int, size: int) -> list[float]:
        totals = []
        for _ in range(5):
            dist.init_process_group("fmi", init_method=f"fmi://{address}/again")
            totals.append(total(rank))
            dist.destroy_process_group()
        return totals

    assert run(3, program) == [[3.0] * 5] * 3


def test_one_job_after_another_that_was_aborted(address: str) -> None:
    def program(rank: int, size: int) -> Any:
        dist.init_process_group("fmi", init_method=f"fmi://{address}/aborted")
        dist.barrier()
        text = ""
        if rank == 0:
            dist.distributed_c10d._abort_process_group()
        else:
            try:
                dist.recv(torch.zeros(1), 0)
            except DistBackendError as error:
                text = str(error)
            dist.destroy_process_group()
        dist.init_process_group("fmi", init_method=f"fmi://{address}/anew")
        return text, total(rank)

    (_, first), (text, second) = run(2, program)
    assert "abort() of the process group" in text
    assert (first, second) == (1.0, 1.0)


def test_a_killed_rank_is_named_at_once(address: str) -> None:
    def program(rank: int, size: int) -> Any:
        dist.init_process_group("fmi", init_method=f"fmi://{address}/killed")
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begun = time.monotonic()
        try:
            total(rank)
        except DistBackendError as error:
            return str(error), type(error.__cause__), time.monotonic() - begun

    with programs(3, program) as ranks:
        answers = [ranks[rank].result() for rank in (0, 2)]
    for text, cause, seconds in answers:
        assert "rank 1" in text
        assert cause is RankFailed
        assert seconds < 3


def test_who_forgets_to_leave_leaves_in_order(address: str, tmp_path: Path) -> None:
    """A program without destroy_process_group() ends, and so do the others."""
    script = tmp_path / "forgets.py"
    script.write_text(
        "import sys, torch.distributed as dist\n"
        f"dist.init_process_group('fmi', init_method='fmi://{address}/forgets',\n"
        "                        rank=int(sys.argv[1]), world_size=2)\n"
        "dist.barrier()\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, str(script), str(rank)], env=environment, stderr=-1)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert errors == [b"", b""]


def test_ctrl_c_while_others_are_awaited(address: str, tmp_path: Path) -> None:
    """It ends the wait at once, and nothing stays behind: the next attempt is as the first."""
    script = tmp_path / "alone.py"
    script.write_text(
        "import signal, threading, sys, time\n"
        "from fmi_client.background import Background\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.5)\n"
        "try:\n"
        f"    Background('{address}', job='alone', rank=0, size=2, timeout=60)\n"
        "except KeyboardInterrupt:\n"
        "    left = [t for t in threading.enumerate() if t.name == 'fmi-background']\n"
        "    sys.exit(5 if not left else 'the thread lives on')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (5, "")


def test_a_forked_process_is_no_rank(address: str, tmp_path: Path) -> None:
    script = tmp_path / "forks.py"
    script.write_text(
        "import os, signal, torch, torch.distributed as dist\n"
        f"place = 'fmi://{address}/forks'\n"
        "dist.init_process_group('fmi', init_method=place, rank=0, world_size=1)\n"
        "if not (child := os.fork()):\n"
        "    signal.alarm(20)\n"
        "    try:\n"
        "        dist.barrier()\n"
        "    except dist.DistBackendError as error:\n"
        "        os._exit(4 if 'forked from a rank' in str(error) else 1)\n"
        "    os._exit(2)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_torch_that_has_changed_can_still_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.Backend, "backend_list", [])
    monkeypatch.setattr(dist.Backend, "register_backend", None)
    # The package has a function of the module's name.
    rendezvous = sys.modules["torch.distributed.rendezvous"]
    monkeypatch.setattr(rendezvous, "_rendezvous_handlers", {})
    with pytest.warns(UserWarning, match="no backend 'fmi'"):
        torch_register.autoload()


# ----------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("fmi://", "needs fmi://host:port/job, or FMI_SERVER"),
        ("fmi://127.0.0.1:1/j", "needs rank=…, or RANK"),
        ("fmi://127.0.0.1:1/j?rank=0", "needs world_size=…, or WORLD_SIZE"),
        ("fmi://127.0.0.1:1?rank=0&world_size=1", "needs fmi://host:port/job, or FMI_JOB"),
        ("fmi://127.0.0.1:1/j?rank=0&world_size=1&key=ab", "key"),
        ("fmi://127.0.0.1:1/j?rank=0&world_size=1&kye=ab", "kye"),
        ("fmi://127.0.0.1:1/j?rank=0&world_size=1&key=", "key"),
        ("fmi://127.0.0.1:1/j?rank=0&world_size=1&tls=yes", "tls=yes is neither"),
        ("fmi://127.0.0.1:1/j?rank=0&world_size=1&tls=", "tls= is neither"),
        ("fmi://127.0.0.1:1/j?rank=one&world_size=1", "rank=one"),
    ],
)
def test_what_is_missing_is_said(url: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FMI_SERVER", "FMI_JOB", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=text):
        torch_join.rendezvous(url)
    assert torch_join.joined.background is None


def test_joining_that_takes_long_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "WORD_SECONDS", 0.05)
    nobody = f"127.0.0.1:{closed_port()}"
    with pytest.raises(FmiError):
        Background(nobody, job="j", rank=0, size=2, timeout=0.3)
    (said,) = caplog.messages
    assert said.startswith(f"rank 0 has not joined job 'j' at {nobody} yet: is the server there")


def test_a_thread_that_could_not_join_ends() -> None:
    with pytest.raises(ValueError, match="rank=3"):
        Background("127.0.0.1:1", job="j", rank=3, size=2)
