"""The headline figures of a report: of each source the best configuration, in a few cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from workflow.configurations import Configuration, Spread
from workflow.report_page import number
from workflow.report_parts import name_of

__all__ = ["headlines"]


def headlines(configurations: Sequence[Configuration]) -> list[dict[str, Any]]:
    """Make the cards of the best configuration of each source."""
    sources = list(dict.fromkeys((c.source, c.on) for c in configurations))
    found = []
    for source, on in sources:
        of_it = [c for c in configurations if (c.source, c.on) == (source, on)]
        best = _best(of_it)
        if best is not None:
            where = "on AWS" if on == "aws" else "on one machine"
            heading = f"{source}, {where}" if len(sources) > 1 else f"O{where[1:]}"
            found.append({"heading": heading, "cards": list(_cards(best, of_it))})
    return found


def _best(configurations: Sequence[Configuration]) -> Configuration | None:
    """The fastest by wall-clock; where nobody timed that, by the sum of ranks."""
    for kind in ("wall_clock", "sum_of_ranks"):
        for unit in ("bits_per_s", "rows_per_s"):
            key = f"{unit}_{kind}"
            known = [c for c in configurations if key in c.measures]
            if known:
                return max(known, key=lambda c: c.measures[key].median)
    return None


def _cards(best: Configuration, among: Sequence[Configuration]) -> Iterable[dict[str, str]]:
    measured = f"median of {best.ok} runs" if best.ok > 1 else "one run"
    context = " ".join(part for part in (best.engine, best.precision) if part)
    theirs = best.source == "original"
    data = "data unknown" if best.data == "unknown" else best.data
    yield {
        "term": "Best configuration",
        "value": name_of(best) or best.data,
        "text": "; ".join(part for part in (_why(among), measured, data, context) if part),
    }
    yield _rate(best, "wall_clock", "Wall-clock rate", _MAP_STATE if theirs else _WALL_CLOCK)
    yield _rate(best, "sum_of_ranks", "Sum of ranks", _sum(best))
    m = best.measures
    if "total_s" in m:
        yield {
            "term": "Whole run",
            "value": f"{number(m['total_s'].median, 's')} s",
            "text": _inference(m.get("inference_s"), theirs),
        }
    if "cost_usd" in m:
        yield {
            "term": "Cost of one run",
            "value": f"${number(m['cost_usd'].median)}",
            "text": "at AWS's list prices, by the seconds of the ranks"
            f"{' in the profiler, and not those billed' if theirs else ''}; assumptions below",
        }
    if "nmad" in m:
        r2 = f"; R² {number(m['r2'].median)}" if "r2" in m else ""
        yield {
            "term": "Accuracy (NMAD)",
            "value": number(m["nmad"].median),
            "text": f"scatter of the predicted redshifts, outliers aside{r2}",
        }


_WALL_CLOCK = "All rows over the time until the last rank had done its own: what one waits for."
_SUM = (
    "What each rank did per second of its own time, added up as if all were always at work: "
    "an upper bound."
)


_MAP_STATE = (
    "All bits over the time of the Map state, in which all ranks start, load and work: what one "
    "waits for."
)
_PROFILED = (
    "Each rank's bits over its own time in torch's profiler, added up: what the original "
    "publishes, and nothing that a clock has seen."
)


def _sum(best: Configuration) -> str:
    if best.source == "original":
        return _PROFILED
    if best.source == "original, one process" and "inference_s" not in best.measures:
        return "As its file says, which does not say of what kind its seconds are."
    return _SUM


def _why(among: Sequence[Configuration]) -> str:
    """Say by what the best one is the best, and of how many that is known."""
    known = sum(
        not c.measures.keys().isdisjoint(("rows_per_s_wall_clock", "bits_per_s_wall_clock"))
        for c in among
    )
    if not known:
        return "greatest sum of ranks; no wall-clock rate is known"
    some = f", which {known} of {len(among)} configurations tell" if known < len(among) else ""
    return f"greatest wall-clock rate{some}"


def _inference(spread: Spread | None, theirs: bool) -> str:
    what = "the Map state" if theirs else "inference"
    known = f", {number(spread.median, 's')} s of it {what}" if spread else ""
    return f"from its start to its end{known}"


def _rate(c: Configuration, kind: str, term: str, text: str) -> dict[str, str]:
    rows, bits = c.measures.get(f"rows_per_s_{kind}"), c.measures.get(f"bits_per_s_{kind}")
    shown = [f"{number(rows.median)} rows/s"] if rows else []
    if bits:
        shown.append(f"{number(bits.median, 'Gbit/s')} Gbit/s")
    if c.source.startswith("original"):
        shown.reverse()  # the unit of its tables
    more = f" ({shown[1]})" if len(shown) > 1 else ""
    if not shown:
        return {
            "term": term,
            "value": number(None),
            "text": f"Not known: these files have no time for it. {text}",
        }
    return {"term": term, "value": shown[0], "text": f"{text}{more}"}
