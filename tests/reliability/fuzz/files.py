"""What comes in files and events: data, checkpoints, payloads, results."""

from __future__ import annotations

import atexit
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lambda_worker import dataset, events, inert, ptfile
from lambda_worker.archive import FormatError, Unusual
from lambda_worker.checkpoint import ALLOWED, convert
from lambda_worker.dataset import DatasetError
from lambda_worker.engine import ModelError
from tests.reliability.fuzz.target import MB, Target, add
from workflow.configurations import row, summarise
from workflow.published import published
from workflow.results import read

_SCRATCH = tempfile.TemporaryDirectory(prefix="fuzz-")
atexit.register(_SCRATCH.cleanup)


# ------------------------------------------------------------------------------ .pt files


def _ptfile(data: bytes, step: int) -> object:
    """A dataset, up to where its rows are."""

    def get(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length >= 0
        assert offset + length <= len(data)
        return data[offset : offset + length]

    try:
        file = ptfile.TensorFile(len(data), get)
        return [_place(file, each, data) for each in dataset._tensors(file.content, "it")]
    except (FormatError, Unusual, DatasetError) as error:
        return _said(error)


def _place(file: ptfile.TensorFile, tensor: ptfile.Tensor, data: bytes) -> int:
    start = file.start(tensor)
    assert start + tensor.shape[0] * 4 <= len(data), "rows beyond the file"
    return start


def _ptpickle(data: bytes, step: int) -> object:
    try:
        return type(ptfile.describe(data)).__name__
    except FormatError as error:
        return _said(error)


def _checkpoint(data: bytes, step: int) -> object:
    source, target = Path(_SCRATCH.name, "source.pt"), Path(_SCRATCH.name, "target")
    source.write_bytes(data)
    try:
        return convert(source, target).form
    except ModelError as error:
        return _said(error)


def _inertpickle(data: bytes, step: int) -> object:
    try:
        return type(inert.content(data, ALLOWED)).__name__
    except FormatError as error:
        return _said(error)


def _said(error: Exception) -> str:
    text = str(error)
    assert len(text) < 1000
    return text


# --------------------------------------------------------------------------------- events


def _event(data: bytes, step: int) -> object:
    """JSON, as Lambda's runtime gives it, for each of the handlers."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        return None
    forms: list[Any] = [events.RankTask, events.RankStart, events.RunInfo, events.CheckTask]
    reads = [partial(events.parse, form) for form in forms]
    found = [_attempt(read, event) for read in (_payload, *reads, events.parse_rank)]
    return [*found, events.whereabouts(event)]


def _attempt(read: Callable[[Any], object], event: Any) -> object:
    try:
        return repr(read(event))
    except events.EventError as error:
        text = str(error)
        assert "\n" not in text
        text.encode()  # it goes to logs
        return text


def _payload(event: Any) -> object:
    """What `init` makes of an event before it looks at any data."""
    payload = events.parse(events.Payload, event)
    names = [name for each in (payload.data_map or {}).values() for name in _names(each)]
    # A new name has a time in it.
    run = payload.run_name() if payload.run else "run"
    return payload, payload.results_url(run), payload.data_url, list(map(payload.file_url, names))


def _names(files: str | list[str] | None) -> list[str]:
    return [files] if isinstance(files, str) else files or []


# -------------------------------------------------------------------------------- results


def _results(data: bytes, step: int, name: str) -> object:
    """A file of results of this name, read and reported."""
    folder = Path(_SCRATCH.name, "results")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        found = read([str(folder)])
    finally:
        path.unlink()
    for run in found.runs:
        row(run)
    summarise(found.runs)
    published(found.runs)
    for finding in found.findings:
        assert finding.text.isprintable()
        assert len(finding.text) < 1500
    return found.runs, [finding.kind for finding in found.findings]


add(Target("ptfile", _ptfile))
add(Target("ptfile-pickle", _ptpickle, memory=8 * MB))
add(Target("checkpoint", _checkpoint, memory=8 * MB))
add(Target("checkpoint-pickle", _inertpickle, memory=8 * MB))
add(Target("event", _event))
for _target, _name in (
    ("results-records", "combined_data.json"),
    ("results-summary", "summary.json"),
    ("results-run", "run.json"),
    ("results-rank", "0.json"),
    ("results-sweep", "runs/w2-b32-small-r1.json"),
    ("results-other", "result-partition-25MB/1GB/1/other.json"),
    ("results-table", "state_machine_logs.csv"),
    ("results-log", "log.txt"),
):
    add(Target(_target, partial(_results, name=_name), memory=8 * MB))
