"""The table and the plot of a run of `collectives.py`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers import NAMES

Document = dict[str, Any]

TITLES = {"sync": "ours, blocking", "async": "ours, async", "gloo": "gloo", "mpi": "Open MPI"}
LARGE = 256 * 1024
"""Bytes from which on bandwidth says more than time."""

Times = dict[tuple[int, str, str], dict[int, float]]
"""Seconds by round, of each world size, case and library."""


def times(document: Document) -> Times:
    found: Times = {}
    for record in document["records"]:
        for case, seconds in record.get("seconds", {}).items():
            place = record["world"], case, record["peer"]
            found.setdefault(place, {})[record["round"]] = seconds
    return found


def table(document: Document) -> str:
    """Return the results in Markdown: a table for each world size, medians with their range."""
    found = times(document)
    lines = _heading(document)
    for world in sorted({world for world, _, _ in found}):
        peers = [p for p in NAMES if any(w == world and p == peer for w, _, peer in found)]
        others = [peer for peer in peers if peer not in ("sync", "async")]
        over = " (oversubscribed)" if world in document["about"]["oversubscribed"] else ""
        lines += ["", f"### {world} ranks{over}", ""]
        ratios = [f"{TITLES[peer]} / ours" for peer in others] if "sync" in peers else []
        head = ["operation", "unit", *(TITLES[peer] for peer in peers), *ratios]
        lines += ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
        for case in dict.fromkeys(case for w, case, _ in found if w == world):
            here = {peer: found[world, case, peer] for peer in peers}
            cells = [_name(case), _unit(case), *(_cell(case, here[peer]) for peer in peers)]
            if ratios:
                cells += [_ratio(here[peer], here["sync"]) for peer in others]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _heading(document: Document) -> list[str]:
    about = document["about"]
    raws = [record["raw"] for record in document["records"] if "raw" in record]
    median = {key: statistics.median(raw[key] for raw in raws) for key in raws[0]}
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    return [
        f"{about['date']}, {about['cores']} cores of {about['cpu']}, Linux {about['kernel']} "
        f"({about['congestion_control']}), Python {about['python']}, {versions}; "
        f"{len(raws)} rounds, median (lowest … highest).",
        "",
        f"The machine itself: a copy in memory {median['memcpy bytes/s'] / 1e9:.1f} GB/s, one TCP "
        f"stream on loopback {median['stream bytes/s'] / 1e9:.2f} GB/s, one hop of 8 bytes "
        f"{median['hop s'] * 1e6:.1f} µs.",
    ]


def _bytes(case: str) -> int:
    return int(case.split()[1])


def _name(case: str) -> str:
    op, nbytes = case.split()[0], _bytes(case)
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{op} {nbytes // size} {unit}"
    return f"{op} {nbytes} B" if nbytes else op


def _unit(case: str) -> str:
    return "GB/s" if _bytes(case) >= LARGE else "µs"


def _number(case: str, seconds: float) -> str:
    value = _bytes(case) / seconds / 1e9 if _unit(case) == "GB/s" else seconds * 1e6
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _cell(case: str, rounds: dict[int, float]) -> str:
    values = sorted(rounds.values())
    ends = sorted((values[0], values[-1]), reverse=_unit(case) == "GB/s")
    low, high = (_number(case, each) for each in ends)
    return f"{_number(case, statistics.median(values))} ({low} … {high})"


def _ratio(theirs: dict[int, float], ours: dict[int, float]) -> str:
    """Return how many times longer theirs takes, round by round: above 1 we are faster."""
    ratios = sorted(theirs[number] / ours[number] for number in ours.keys() & theirs.keys())
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})"


def plot(document: Document, path: Path) -> None:
    """Draw time and bandwidth of allreduce against its size, a column for each world size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = times(document)
    worlds = sorted({world for world, _, _ in found})
    figure, axes = pyplot.subplots(
        2, len(worlds), figsize=(4.2 * len(worlds), 7), sharex=True, sharey="row", squeeze=False
    )
    for column, world in enumerate(worlds):
        over = ", oversubscribed" if world in document["about"]["oversubscribed"] else ""
        axes[0, column].set_title(f"allreduce, {world} ranks{over}")
        axes[1, column].set_xlabel("size of the array (bytes)")
        for peer in NAMES:
            _lines(axes[:, column], found, world, peer)
    axes[0, 0].set_ylabel("time on the slowest rank (µs)")
    axes[1, 0].set_ylabel("bandwidth, size / time (GB/s)")
    axes[0, 0].legend()
    for each in axes.flat:
        each.set_xscale("log", base=2)
        each.set_yscale("log")
        each.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _lines(axes: Any, found: Times, world: int, peer: str) -> None:
    mine = {
        _bytes(case): sorted(rounds.values())
        for (w, case, p), rounds in found.items()
        if w == world and p == peer and case.startswith("allreduce")
    }
    if not mine:
        return
    sizes = sorted(mine)
    medians = [statistics.median(mine[size]) for size in sizes]
    low, high = [mine[size][0] for size in sizes], [mine[size][-1] for size in sizes]
    (line,) = axes[0].plot(sizes, [t * 1e6 for t in medians], marker=".", label=TITLES[peer])
    band = {"alpha": 0.15, "color": line.get_color()}
    axes[0].fill_between(sizes, [t * 1e6 for t in low], [t * 1e6 for t in high], **band)
    pairs = list(zip(sizes, medians, strict=True))
    axes[1].plot(sizes, [n / t / 1e9 for n, t in pairs], marker=".", color=line.get_color())
