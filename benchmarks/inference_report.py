"""The tables of a run of `inference.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Document = dict[str, Any]
Key = tuple[str, int, int]
"""Loop, processes, and threads of each."""

TITLES = {
    "reference": "reference",
    "profiled": "reference in its profiler",
    "torch-fp32": "torch",
    "torch-bf16": "torch, bf16",
    "onnx-fp32": "ONNX Runtime",
    "openvino-fp32": "OpenVINO",
    "openvino-bf16": "OpenVINO, bf16",
}
AT = "128"
"""Batch size at which single figures are given."""


def table(document: Document) -> str:
    """Return the results in Markdown: medians over rounds with their range."""
    runs = _runs(document)
    keys = sorted(
        (key for key in runs if key[0] in TITLES),
        key=lambda key: (key[1:] == (1, 1), key[2] == 1, list(TITLES).index(key[0])),
    )
    parts = [_heading(document, runs), _rates(runs, keys), _ratios(runs, keys)]
    return "\n\n".join([*parts, _figures(document, runs, keys)]) + "\n"


def _runs(document: Document) -> dict[Key, dict[int, Document]]:
    """Records by round, of each loop in each layout."""
    found: dict[Key, dict[int, Document]] = {}
    for record in document["records"]:
        if "loop" in record:
            key = record["loop"], record["ranks"], record["threads"]
            found.setdefault(key, {})[record["round"]] = record
    return found


def _heading(document: Document, runs: dict[Key, dict[int, Document]]) -> str:
    about = document["about"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    bounds = [
        f"{_spread(r['rates'][AT] for r in rounds.values())} ({_layout(key)})"
        for key, rounds in runs.items()
        if key[0] == "sgemm"
    ]
    return (
        f"{about['date']}, {about['cores']} cores of {about['cpu']}, Linux {about['kernel']}, "
        f"Python {about['python']}, {versions}; {len(next(iter(runs.values())))} rounds, median "
        "(lowest … highest).\n\nThe bound by float32 matrix products (sgemm) alone, images/s: "
        + ", ".join(bounds)
        + "."
    )


def _rates(runs: dict[Key, dict[int, Document]], keys: list[Key]) -> str:
    sizes = _sizes(runs)
    lines = _head(["images/s at batch", "layout", *sizes])
    for key in keys:
        columns = [[r["rates"].get(size) for r in runs[key].values()] for size in sizes]
        cells = ["" if None in column else _spread(column) for column in columns]
        lines.append(_row([TITLES[key[0]], _layout(key), *cells]))
    return "\n".join(lines)


def _ratios(runs: dict[Key, dict[int, Document]], keys: list[Key]) -> str:
    """Against the reference in the same layout and round; and the best batch of each."""
    sizes = _sizes(runs)
    lines = _head(["times the reference", "layout", *sizes, "best / best", "of sgemm"])
    for key in keys:
        plain, bound = ("reference", *key[1:]), ("sgemm", *key[1:])
        if key[0] in ("reference", "profiled") or plain not in runs:
            continue
        rounds = [(r, runs[plain][n]) for n, r in runs[key].items() if n in runs[plain]]
        cells = [_spread(a["rates"][s] / b["rates"][s] for a, b in rounds) for s in sizes]
        best = _spread(_best(a) / _best(b) for a, b in rounds)
        share = _of_bound(runs[key], runs.get(bound, {}))
        lines.append(_row([TITLES[key[0]], _layout(key), *cells, best, share]))
    return "\n".join(lines)


def _figures(document: Document, runs: dict[Key, dict[int, Document]], keys: list[Key]) -> str:
    """One line for each loop: what does not depend on the batch size."""
    cold = [record["cold"] for record in document["records"] if "cold" in record]
    columns = [
        "private MB",
        "largest Δz",
        f"times profiled at {AT}",
        "ranks / one",
        "cold start, s",
    ]
    lines = _head(["", *columns])
    profiled = next((key for key in runs if key[0] == "profiled"), None)
    for name in dict.fromkeys(key[0] for key in keys):
        mine = {key: runs[key] for key in keys if key[0] == name}
        together = next(iter(mine))
        cells = [
            _spread(r["private_mb"] for r in mine[together].values()),
            f"{_largest_dz(runs, name):.1e}",
            _versus(runs, together, profiled),
            _scaling(mine),
            _spread(each[name] for each in cold if name in each),
        ]
        lines.append(_row([TITLES[name], *cells]))
    imports = _spread(each["import torch"] for each in cold)
    return "\n".join(lines) + f"\n\n`import torch` by itself takes {imports} s."


def _versus(runs: dict[Key, dict[int, Document]], key: Key, other: Key | None) -> str:
    if other is None or key == other:
        return ""
    rounds = [(r, runs[other][n]) for n, r in runs[key].items() if n in runs[other]]
    return _spread(a["rates"][AT] / b["rates"][AT] for a, b in rounds if AT in a["rates"])


def _scaling(mine: dict[Key, dict[int, Document]]) -> str:
    """One process a core against one process on one thread, best batch each."""
    alone = next((rounds for key, rounds in mine.items() if key[1:] == (1, 1)), None)
    ranks = next((rounds for key, rounds in mine.items() if key[1] > 1), None)
    if not alone or not ranks:
        return ""
    return _spread(_best(ranks[n]) / _best(alone[n]) for n in ranks if n in alone)


def _largest_dz(runs: dict[Key, dict[int, Document]], name: str) -> float:
    plain = next(
        r["values"] for key, rs in runs.items() if key[0] == "reference" for r in rs.values()
    )
    values = [r["values"] for key, rs in runs.items() if key[0] == name for r in rs.values()]
    return max(float(abs(a - b)) for each in values for a, b in zip(each, plain, strict=True))


def _of_bound(rounds: dict[int, Document], bounds: dict[int, Document]) -> str:
    shares = [_best(rounds[n]) / bounds[n]["rates"][AT] for n in rounds if n in bounds]
    return f"{100 * statistics.median(shares):.0f} %" if shares else ""


def _best(record: Document) -> float:
    return float(max(record["rates"].values()))


def _sizes(runs: dict[Key, dict[int, Document]]) -> list[str]:
    return sorted({s for rs in runs.values() for r in rs.values() for s in r["rates"]}, key=int)


def _layout(key: Key) -> str:
    return f"{key[1]} × {key[2]}"  # noqa: RUF001


def _spread(values: Iterable[float]) -> str:
    found = sorted(values)
    if not found:
        return ""
    form = ",.0f" if statistics.median(found) >= 20 else ".2f"
    low, middle, high = (f"{v:{form}}" for v in (found[0], statistics.median(found), found[-1]))
    return middle if len(found) == 1 else f"{middle} ({low} … {high})"


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), "|---|" + "---:|" * (len(cells) - 1)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
