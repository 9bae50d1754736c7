"""Let ranks meet in a lab, and say how it went."""

from __future__ import annotations

import json
import math
import select
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from tests.net.lab import ROOT, Host, Lab, Nat, Site

_jobs = count()


@dataclass(frozen=True, slots=True, repr=False)
class Try:
    """One job, seen by all its ranks."""

    records: list[dict[str, Any]]

    @property
    def errors(self) -> list[str]:
        return [f"{each['error']}: {each['why']}" for each in self.records if "error" in each]

    @property
    def kinds(self) -> set[str]:
        return {kind for each in self.records for kind in each.get("kinds", {}).values()}

    @property
    def kind(self) -> str:
        """How the links were made: "direct", "relay", "mixed" or "failed"."""
        if self.errors:
            return "failed"
        return self.kinds.pop() if len(self.kinds) == 1 else "mixed"

    @property
    def seconds(self) -> float:
        """From "all are there" to the end of the first barrier, on the slowest rank."""
        return max(float(each["linked"]) for each in self.records)

    def __repr__(self) -> str:
        if self.errors:
            return "; ".join(self.errors)
        return f"{self.kind} in {1e3 * self.seconds:.1f} ms"


@dataclass(frozen=True, slots=True)
class Summary:
    """Many tries of one pair."""

    tries: list[Try]

    def count(self, kind: str) -> int:
        return sum(each.kind == kind for each in self.tries)

    @property
    def milliseconds(self) -> list[float]:
        return sorted(1e3 * each.seconds for each in self.tries if not each.errors)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def p99(self) -> float:
        """The time that 99 of 100 tries kept; of fewer than 100, the longest."""
        times = self.milliseconds
        return times[math.ceil(0.99 * len(times)) - 1]


def play(lab: Lab, tries: int = 1, hosts: Sequence[Host] = (), timeout: float = 60) -> list[Try]:
    """Run one rank on each host, in `tries` jobs one after the other."""
    hosts = hosts or lab.hosts
    job = f"play{next(_jobs)}"
    with ExitStack() as stack:
        ranks = []
        for seat, host in enumerate(hosts):
            arguments = [lab.server, job, str(seat), str(len(hosts)), str(tries)]
            command = host.command(sys.executable, "-m", "tests.net.rank", *arguments)
            rank = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            stack.enter_context(rank)
            stack.callback(rank.kill)
            ranks.append(rank)
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("a rank crashed; its traceback is above")
    lines = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    return [Try(list(records)) for records in zip(*lines, strict=True)]


class Rank:
    """A program on a host that goes from stop to stop: it says where it is, and awaits a line."""

    def __init__(self, host: Host, module: str, *words: str) -> None:
        command = host.command(sys.executable, "-m", module, *words)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    def _line(self, seconds: float) -> str:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise TimeoutError("the rank says nothing")
        return self.process.stdout.readline().strip()

    def comes_to(self, stop: str, seconds: float = 10) -> None:
        line = self._line(seconds)
        assert line == stop, line

    def go(self, word: str = "") -> None:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)

    def ends(self, seconds: float = 20) -> dict[str, Any]:
        """Return what it says at the end."""
        result: dict[str, Any] = json.loads(self._line(seconds))
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def start_rank(lab: Lab, number: int, *stops: str, size: int = 2) -> Rank:
    """Start a rank; see `tests.net.steps`."""
    words = [lab.server, "steps", str(number), str(size), *stops]
    return Rank(lab.hosts[number], "tests.net.steps", *words)


@contextmanager
def ranks(lab: Lab, *stops: str) -> Iterator[list[Rank]]:
    """One rank on each host; they stop where they are told to."""
    with ExitStack() as stack:
        them = []
        for number in range(len(lab.hosts)):
            them.append(start_rank(lab, number, *stops, size=len(lab.hosts)))
            stack.callback(them[-1].close)
        yield them


def sites_of(one: Nat, other: Nat, *, together: bool = False) -> list[Site]:
    """Return the sites for a pair of hosts; `together`: both behind one NAT."""
    return [Site(one, hosts=2)] if together else [Site(one), Site(other)]
