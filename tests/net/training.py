"""Ranks of examples/ddp.py: in a lab, or on loopback; and a look at their links.

As a program, ``python -m tests.net.training LINKS.json ARGUMENTS``, it is such a rank: it runs the
example as it is, and writes down the kinds of its links when it leaves the job. With the variable
NO_DESTROY in its environment, it ends without destroy_process_group().
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.net.lab import ROOT, Host
from tests.support import KEY, closed_port, wait_for

Environment = Mapping[str, str]


class Rank:
    """A rank in a process of its own; what it writes goes to files."""

    def __init__(
        self, folder: Path, number: int, host: Host | None, words: Sequence[str], env: Environment
    ) -> None:
        self.number = number
        self._out, self._err, self._links = (folder / f"{number}.{n}" for n in ("out", "err", "js"))
        command = [sys.executable, "-m", "tests.net.training", str(self._links), *words]
        if host is not None:
            command = host.command(*command)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FMI_")}
        place = {"RANK": str(number), "OMP_NUM_THREADS": "1"}
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**clean, **place, **env}, stdout=out, stderr=err
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def kinds(self) -> dict[str, str]:
        """Return how it was linked to each rank of which it has heard."""
        links: dict[str, str] = json.loads(self._links.read_text())
        return links

    def weights(self) -> str:
        """Return the hash of its weights."""
        found = re.search(rf"^rank {self.number}: weights (\w+)$", self.out, re.MULTILINE)
        assert found, self.out
        return found[1]

    def says(self, word: str, seconds: float = 60) -> None:
        """Wait until it has printed a word."""

        def said() -> bool:
            assert self.process.poll() is None, self.err
            return word in self.out

        wait_for(said, f"{word!r} of rank {self.number}", seconds)

    def fails(self, seconds: float) -> str:
        """Wait until it reports an error; returns all of it."""
        wait_for(lambda: "Error: " in self.err, f"an error of rank {self.number}", seconds)
        return self.err

    def ends(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"rank {self.number} goes on: {self.out} {self.err}") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def training(
    folder: Path,
    size: int,
    words: Sequence[str],
    env: Environment,
    hosts: Sequence[Host] = (),
    odd: tuple[int, Sequence[str], Environment] = (-1, (), {}),
) -> Iterator[list[Rank]]:
    """Start `size` ranks of the example; whatever they do, they end with the block.

    Args:
        folder: for what they write.
        words, env: the example's command line and environment.
        hosts: where each runs; default: all here.
        odd: a rank, and further words and environment of it alone.
    """
    folder.mkdir()
    ranks: list[Rank] = []
    env = {**env, "WORLD_SIZE": str(size)}
    try:
        for number in range(size):
            more = odd[1:] if number == odd[0] else ((), {})
            host = hosts[number] if hosts else None
            ranks.append(Rank(folder, number, host, [*words, *more[0]], {**env, **more[1]}))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def by_fmi(server: str) -> list[str]:
    """Return the words that make it train by our backend."""
    return ["--backend", "fmi", "--init-method", f"fmi://{server}/ddp?key={KEY.hex()}"]


def by_gloo() -> dict[str, str]:
    """Return the environment that makes it train by gloo, on loopback."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(closed_port())}


def main(links: str, *arguments: str) -> None:
    import torch.distributed

    from fmi_client import background

    leave = background.Background._leave

    def look_and_leave(self: background.Background) -> Any:
        found = self.comm.stats()["links"].items()
        kinds = {peer: link["kind"] for peer, link in found if link["messages_received"]}
        Path(links).write_text(json.dumps(kinds))
        return leave(self)

    background.Background._leave = look_and_leave  # type: ignore[method-assign]
    if "NO_DESTROY" in os.environ:
        torch.distributed.destroy_process_group = _do_nothing
    sys.argv = ["examples.ddp", *arguments]
    runpy.run_module("examples.ddp", run_name="__main__", alter_sys=True)


def _do_nothing(group: Any = None) -> None:
    pass


if __name__ == "__main__":
    main(*sys.argv[1:])
