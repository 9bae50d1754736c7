"""The model that stays loaded between the events of one process, which AWS Lambda's runtime serves.

A process of the command line serves one event, and keeps nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from lambda_worker import aside, storage
from lambda_worker.engine import Engine, ModelError, Precision, Predict, open_engine

log = logging.getLogger("lambda_worker")

Result = TypeVar("Result")


class Loaded(NamedTuple):
    """A model file on this machine, and the engine that has read it."""

    path: Path
    predict: Predict


class _File(NamedTuple):
    key: tuple[str, str]
    path: Path
    folder: Path


# One of each: a function's memory, and its /tmp, are sized for one model.
_file: _File | None = None
_engine: tuple[tuple[object, ...], Loaded] | None = None


def load(
    url: str,
    scratch: Path,
    *,
    engine: Engine,
    precision: Precision,
    threads: int | None,
    look: aside.Look = aside.nothing,
) -> Loaded:
    """Give a model loaded into an engine: the one of the event before, where it is the same.

    Args:
        url: the file that the engine reads. Whether it has changed, S3's ETag tells, or the size
            and the times of a local file.
        scratch: folder for a download, where nothing is kept.
        engine, precision, threads: as `open_engine` takes them.
        look: called now and then while the file is waited for; it may raise to end that.

    Raises:
        ModelError, EngineError: as `open_engine`. StorageError: the file cannot be read.
    """
    global _engine
    if "AWS_LAMBDA_RUNTIME_API" not in os.environ:
        path = _waited(partial(storage.fetch, url, scratch), url, look)
        return _opened(path, url, engine, precision, threads)
    version = _waited(partial(storage.version, url), url, look)
    key = (url, version, engine, precision, threads)
    if _engine is not None and _engine[0] == key:
        log.info("model: the loaded one is used again: %s", url)
        return _engine[1]
    _engine = None  # before the next one is loaded: memory may not take both
    path = _kept(url, version, look)
    loaded = _opened(path, url, engine, precision, threads)
    log.info("model: loaded into %s: %s", engine, url)
    _engine = (key, loaded)
    return loaded


def _opened(
    path: Path, url: str, engine: Engine, precision: Precision, threads: int | None
) -> Loaded:
    try:
        predict = open_engine(path, engine=engine, precision=precision, threads=threads)
    except ModelError as error:  # it names the download, of which nobody knows
        raise ModelError(str(error).replace(str(path), url)) from error
    return Loaded(path, predict)


def _kept(url: str, version: str, look: aside.Look) -> Path:
    """A local path of this version of a file; a download stays for the events to come."""
    global _file
    if _file is not None and _file.key == (url, version):
        return _file.path
    old, _file = _file, None
    if old is not None:
        shutil.rmtree(old.folder, ignore_errors=True)
    folder = storage.temporary("cosmic-model-")
    try:
        path = _waited(partial(storage.fetch, url, folder), url, look)
        _file = _File((url, version), path, folder)
    except BaseException:  # also the alarm of a function that runs out of time
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return _file.path


def _waited(work: Callable[[], Result], url: str, look: aside.Look) -> Result:
    return aside.result(aside.start(work, "model"), look, f"the model {url} to be read")
