"""What a run of the suite gave: as JSON, as a table, and as docs/torch-suite.md."""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tests.full.torch_suite.running import MORE_RANKS, RANKS, Outcome

PASSING = Path(__file__).with_name("passing.txt")
"""What passed with our backend when it was last written, one name a line."""

PAGE = Path(__file__).parents[3] / "docs" / "torch-suite.md"

WHY_SKIPPED = {
    "they need GPUs": "CUDA|priority stream",
    "they are another backend's (NCCL, MPI)": "(?i)nccl|mpi supports",
    "torch has switched them off": "https://|flak",
    "torchvision is not installed": "torchvision",
}
"""What the suite gives as reasons, in groups; the first that fits counts."""


class Run(NamedTuple):
    """All outcomes with one backend, and how many seconds they took together."""

    backend: str
    seconds: float
    outcomes: list[Outcome]

    def those(self, status: str) -> list[Outcome]:
        return [each for each in self.outcomes if each.status == status]

    def passed(self) -> set[str]:
        return {each.test for each in self.those("passed")}


class Record(NamedTuple):
    """Runs of several backends, and with what they were done."""

    about: dict[str, Any]
    runs: dict[str, Run]

    def lost(self) -> list[Outcome]:
        """Return what does not pass with ours, of what passes with gloo."""
        gloo = self.runs["gloo"].passed()
        ours = self.runs["fmi"]
        return [each for each in ours.outcomes if each.test in gloo - ours.passed()]

    def share(self) -> float:
        """Return how much of what passes with gloo passes with ours: 0 to 1."""
        return 1 - len(self.lost()) / len(self.runs["gloo"].passed())


def about(jobs: int) -> dict[str, Any]:
    """Return day, versions, machine, numbers of ranks, and of tests at a time."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "ranks": [RANKS, MORE_RANKS],
        "jobs": jobs,
    }


def save(record: Record, path: Path) -> None:
    runs = [(run.backend, run.seconds, run.outcomes) for run in record.runs.values()]
    path.write_text(json.dumps({"about": record.about, "runs": runs}))


def read(path: Path) -> Record:
    """Read what `save` wrote."""
    got = json.loads(path.read_text())
    runs = [
        Run(name, seconds, [Outcome(*each) for each in those])
        for name, seconds, those in got["runs"]
    ]
    return Record(got["about"], {run.backend: run for run in runs})


def publish(record: Record) -> None:
    """Write docs/torch-suite.md, and the names of what passed with ours."""
    PAGE.write_text(page(record))
    names = sorted(record.runs["fmi"].passed())
    PASSING.write_text("".join(f"{name}\n" for name in names))


def table(runs: Iterable[Run]) -> str:
    """Return a Markdown table of counts, a line for each backend."""
    lines = ["| backend | passed | failed | skipped | seconds |", "|---|---:|---:|---:|---:|"]
    for run in runs:
        counts = (len(run.those(status)) for status in ("passed", "failed", "skipped"))
        numbers = " | ".join(f"{count}" for count in counts)
        lines.append(f"| `{run.backend}` | {numbers} | {run.seconds:.0f} |")
    return "\n".join(lines)


def summary(record: Record) -> str:
    """Return the sentence that counts."""
    gloo = len(record.runs["gloo"].passed())
    return (
        f"`fmi` passes {gloo - len(record.lost())} of the {gloo} tests that `gloo` passes: "
        f"{100 * record.share():.1f} %."
    )


def failures(run: Run) -> str:
    """Return a list of what failed, with reasons."""
    lines = [f"* `{each.test}`, {each.ranks} ranks: {each.reason}" for each in run.those("failed")]
    return "\n".join(lines) or "None."


def page(record: Record) -> str:
    """Return docs/torch-suite.md."""
    given = record.about
    return PAGE_TEXT.format(
        **given,
        few=given["ranks"][0],
        many=given["ranks"][1],
        table=table(record.runs.values()),
        summary=summary(record),
        ours=failures(record.runs["fmi"]),
        gloos=failures(record.runs["gloo"]),
        large=sum(each.ranks == given["ranks"][1] for each in record.runs["gloo"].those("passed")),
        skipped=_skipped(record.runs["gloo"]),
    )


def _skipped(run: Run) -> str:
    counts = Counter(_why(each.reason) for each in run.those("skipped"))
    return "\n".join(f"* {count}: {why}" for why, count in counts.most_common())


def _why(reason: str) -> str:
    return next((why for why, like in WHY_SKIPPED.items() if re.search(like, reason)), reason)


PAGE_TEXT = """\
# torch's own tests

<!-- Written by `python -m tests.full.torch_suite --write`. -->

How much of torch's own tests of backends ours passes. torch brings a suite of them in its wheel,
`torch.testing._internal.distributed.distributed_test`. Here it runs with gloo, torch's backend for
CPUs, and with [ours](torch.md), in the same way.

{table}

**{summary}**

Taken {date} with torch {torch}, Python {python}, {machine}, {jobs} tests at a time on {cores} cores
that others used as well: the seconds say what a run costs, not which backend is faster. A test has
{few} ranks, or {many} if it skips fewer than eight, as {large} of those passed do.

    python -m tests.full.torch_suite                        # both backends; some two minutes
    python -m tests.full.torch_suite --backend fmi -k send  # tests with "send" in their names

## Failed with `fmi`

{ours}

## Failed with `gloo`

{gloos}

## Skipped

By both backends, and for the same reasons:

{skipped}

## How they are run

* The suite chooses by the backend's name what it runs, and skips most under a name it does not
  know. It is loaded as for gloo whatever runs, so that `fmi` meets all that gloo meets; then the
  name is `fmi`, which the tests check. Names of events in torch's profiler are checked, too.
* A test's ranks are processes of their own, as torch has it, but forked from one that has imported
  torch, where torch starts each anew. Ranks of `fmi` meet through a server on loopback
  (`FMI_SERVER`), the job's name goes through the suite's `file://` store.
* A test fails if it does for torch, which hears of errors from all ranks and looks at the first
  one's exit code; or if the ranks' exit codes differ; or if they have not ended in 60 s.
* A test with "gloo" in its name, or that checks the words of gloo's errors, counts like the others.
"""
