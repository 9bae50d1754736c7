"""What CloudWatch shows of a handler that AWS Lambda calls: lines of JSON, and metrics.

By aws-lambda-powertools (`cosmic-fmi[aws]`); without it there are plain lines and no metrics. An
event is never logged as a whole, and no environment at all: of an event, who this is; of a result,
what `_facts` takes from it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, ParamSpec

from lambda_worker.events import flat

log = logging.getLogger("lambda_worker")

NAMESPACE = "cosmic"
Arguments = ParamSpec("Arguments")
Result = dict[str, Any]

_cold = True


def observed(handler: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a handler log its course and tell its metrics, where AWS Lambda calls it.

    Args:
        handler: takes `event` and `context`, and perhaps `progress`, which then is logged.

    Returns:
        The same handler. Called without AWS Lambda's context it does nothing else.
    """
    form, name = inspect.signature(handler), handler.__name__

    @wraps(handler)
    def called(*args: Arguments.args, **named: Arguments.kwargs) -> Result:
        given = form.bind(*args, **named)
        context = given.arguments.get("context")
        if not hasattr(context, "aws_request_id"):
            return handler(*args, **named)
        if "progress" in form.parameters:
            given.arguments.setdefault("progress", _stages(name))
        who = _who(given.arguments["event"])
        with _lines({"handler": name, **_invocation(context), **who}) as cold:
            return _watched(name, partial(handler, *given.args, **given.kwargs), context, cold, who)

    return called


def _watched(
    name: str, work: Callable[[], Result], context: Any, cold: bool, who: Mapping[str, Any]
) -> Result:
    log.info("%s: started", name)
    started, facts = time.monotonic(), {}
    try:
        result = work()
        facts = _facts(name, result)
        log.info("%s: done", name, extra={"seconds": _since(started), "result": facts})
        return result
    except Exception as error:
        kind = type(error).__name__
        extra = {"seconds": _since(started), "error": kind}
        log.error("%s: failed: %s: %s", name, kind, error, extra=extra)
        raise
    finally:
        _emit(context, {"cold_start": int(cold), **facts}, who)


def _since(moment: float) -> float:
    return round(time.monotonic() - moment, 4)


def _stages(name: str) -> Callable[[str, int, int], None]:
    """A `progress` that logs each stage once."""
    last = ""

    def progress(stage: str, rows: int, of: int) -> None:
        nonlocal last
        if stage not in (last, "done"):
            log.info("%s: %s", name, stage, extra={"stage": stage})
        last = stage

    return progress


def _invocation(context: Any) -> dict[str, Any]:
    return {"request_id": context.aws_request_id, "function": context.function_name}


def _who(event: object) -> dict[str, Any]:
    """Run, rank and epoch, as far as an event names them."""
    known = flat(event)
    found = {name: known.get(name) for name in ("run", "rank", "epoch")}
    return {name: value for name, value in found.items() if isinstance(value, int | str)}


def _facts(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth a place in the log; of a rank, what its metrics are made of."""
    if name == "infer":
        return _rank_facts(result)
    if name == "summarize":
        result = {**result, **result["summary"]}
    names = {
        "init": ("run", "world_size", "rows", "results", "epoch"),
        "summarize": ("rows", "wall_seconds", "metrics", "summary_path"),
        "blame": ("error", "cause", "rank", "retry", "epoch"),
        "check": ("server", "ok", "advice"),
    }
    return {key: result[key] for key in names[name]}


def _rank_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "rows": record["rows"],
        "engine": record["engine"],
        "load_seconds": record["load_time (seconds)"],
        "collective_seconds": record["collective_time (seconds)"],
        "join_seconds": record["join_time (seconds)"],
        "links_direct": record["links"]["direct"],
        "links_relayed": record["links"]["relay"],
    }
    if record["rows"]:  # a rank without rows is not a slow one
        facts["rows_per_second"] = record["sample_persec"]
    return facts


UNITS = {
    "cold_start": "Count",
    "rows_per_second": "Count/Second",
    "join_seconds": "Seconds",
    "collective_seconds": "Seconds",
    "links_direct": "Count",
    "links_relayed": "Count",
}
"""Metrics, in CloudWatch's units."""


def _emit(context: Any, facts: Mapping[str, Any], who: Mapping[str, Any]) -> None:
    """Print metrics in CloudWatch's embedded format."""
    try:
        from aws_lambda_powertools.metrics import EphemeralMetrics
    except ModuleNotFoundError:
        return
    metrics = EphemeralMetrics(namespace=NAMESPACE)
    # The only dimension: CloudWatch bills each combination of their values as metrics of its own.
    metrics.add_dimension("function", context.function_name)
    more = {"request_id": context.aws_request_id, "engine": facts.get("engine"), **who}
    for key, value in more.items():
        if value is not None:
            metrics.add_metadata(key, value)
    for key, unit in UNITS.items():
        if key in facts:
            metrics.add_metric(key, unit, facts[key])
    metrics.flush_metrics()


@contextmanager
def _lines(keys: Mapping[str, Any]) -> Iterator[bool]:
    """Lines of JSON that carry `keys` and `cold_start`; gives whether this is the first event."""
    global _cold
    cold, _cold = _cold, False
    logger = _logger()
    if logger is None:
        yield cold
        return
    with logger.append_context_keys(**keys, cold_start=cold):
        yield cold


@cache
def _logger() -> Any:
    """Powertools' formatter on this package's own logger; None without powertools."""
    try:
        from aws_lambda_powertools import Logger
    except ModuleNotFoundError:
        log.setLevel(log.level or logging.INFO)  # the runtime's own handler writes plain lines
        return None
    # Its name is the logger's, so that all modules' lines become JSON.
    return Logger(service=log.name, location=None, use_rfc3339=True)
