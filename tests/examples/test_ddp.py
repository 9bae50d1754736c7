"""examples/ddp.py under torchrun: the same command line, by gloo and by our backend."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.processes import serve_rendezvous

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

# torch starts in each process, and its launcher is one, too.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve_rendezvous() as address:
        yield address


@contextmanager
def torchrun(
    server: str, backend: str, ranks: int, *words: str, options: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Start the example; its workers end with the launcher, and that with the block."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FMI_")}
    env |= {"FMI_SERVER": server, "OMP_NUM_THREADS": "1"}
    where = ("--standalone", "--nproc-per-node", str(ranks), *options)
    command = [*TORCHRUN, *where, "-m", "examples.ddp", "--backend", backend, *words]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def weights(out: str) -> list[str]:
    """Return the hash of each rank's weights."""
    return [found for _, found in sorted(re.findall(r"rank (\d+): weights ([0-9a-f]{16})", out))]


def trained(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    return weights(out)


def test_the_program_knows_nothing_of_us() -> None:
    source = (ROOT / "examples" / "ddp.py").read_text()
    assert not re.search(r"fmi_client|rendezvous_server", source)


def test_the_command_of_the_readme_trains() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    ((command, shown),) = re.findall(r"\$ \S+ (-m workflow.launch .*ddp.*)\n([^`]*)```", page)
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    # Bits depend on the processor; which rank speaks first, on chance.
    lines = [re.sub(r"\w+$", "", line) for line in sorted(done.stdout.splitlines())]
    assert lines == [re.sub(r"\w+$", "", line) for line in sorted(shown.splitlines())]
    assert len(set(weights(done.stdout))) == 1


def test_torchrun_trains_by_fmi_the_weights_that_it_trains_by_gloo(server: str) -> None:
    with torchrun(server, "fmi", 2, "--epochs", "1") as ours:
        first, second = trained(ours)
    with torchrun(server, "gloo", 2, "--epochs", "1") as theirs:
        out, _ = theirs.communicate(timeout=110)  # at times gloo's threads abort at the very end
    assert first == second
    assert weights(out) == [first, second]


@pytest.mark.full
def test_torchrun_trains_by_fmi_on_an_odd_number_of_ranks(server: str) -> None:
    with torchrun(server, "fmi", 3, "--epochs", "1") as process:
        hashes = trained(process)
    assert hashes == [hashes[0]] * 3


@pytest.mark.full
def test_when_a_rank_is_killed_torchrun_begins_anew(server: str) -> None:
    """All ranks meet again, those of the first attempt with nobody."""
    options = ("--max-restarts", "1")
    with torchrun(server, "fmi", 2, "--epochs", "20", options=options) as process:
        assert process.stdout is not None
        read_to("epoch 1:", process.stdout)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        read_to("epoch 0:", process.stdout)
        first, second = trained(process)
    assert first == second


def read_to(word: str, source: IO[str]) -> None:
    # Ranks share the pipe: a line may begin behind another one.
    assert any(word in line for line in source), f"{word!r} never came"


def workers(launcher: int) -> list[int]:
    """Return the process ids of the ranks, in their order."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in children:
        env = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks.update({int(e[5:]): int(child) for e in env if e.startswith(b"RANK=")})
    return [ranks[rank] for rank in sorted(ranks)]
