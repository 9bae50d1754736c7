"""How a process joins the job of its process groups: by an address, or by a store of torch's."""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections import Counter
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fmi_client.background import Background
from fmi_client.torch_register import NAME
from fmi_client.torch_store import FmiStore

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""As gloo's."""

KNOWN = ("key", "token", "tls", "channel", "epoch", "rank", "world_size", "use_libuv")
"""What may stand behind the "?" of a URL; `use_libuv` is torch's own, and does nothing here."""


class Job:
    """What this process has joined: one job at a time, as torch has one default group."""

    def __init__(self) -> None:
        self.background: Background | None = None
        self.store: FmiStore | None = None  # torch keeps its C++ half only
        self.attempts = itertools.count()
        self.groups: Counter[str] = Counter()


joined = Job()


def rendezvous(
    url: str, timeout: timedelta = DEFAULT_TIMEOUT, **_: Any
) -> tuple[FmiStore, int, int]:
    """Join the job that a URL names: ``fmi://host:port/job?key=…&token=…&rank=…&world_size=…``.

    What is left out comes from FMI_SERVER, FMI_JOB, FMI_KEY, FMI_TOKEN, RANK and WORLD_SIZE;
    ``tls=1`` encrypts everything, ``epoch=`` and ``channel=`` are those of `fmi_client.connect`.

    Returns:
        The store, this process's rank, the world size.

    Raises:
        ValueError: something is missing or malformed.
        FmiError: the server refuses, or not all ranks came.
    """
    parts = urlsplit(url)
    given = _query(parts.query)
    server = ("tls://" if given.get("tls") == "1" else "") + parts.netloc
    place = f"{NAME}://host:port/job"
    background = _join(
        server if parts.netloc else _environment("FMI_SERVER", place),
        unquote(parts.path).strip("/") or _environment("FMI_JOB", place),
        timeout,
        rank=_number("rank", given.get("rank") or _environment("RANK", "rank=…")),
        size=_number("size", given.get("world_size") or _environment("WORLD_SIZE", "world_size=…")),
        epoch=_number("epoch", given["epoch"]) if "epoch" in given else _restarts(),
        **{name: given[name] for name in ("key", "token", "channel") if name in given},
    )
    joined.store = FmiStore(background, timeout)
    return joined.store, background.comm.rank, background.comm.size


def _query(text: str) -> dict[str, str]:
    pairs = parse_qs(text, keep_blank_values=True)
    given = {name: values[-1] for name, values in pairs.items()}
    unknown = ", ".join(sorted(given.keys() - KNOWN))
    if unknown:
        raise ValueError(f"{NAME}://… takes {', '.join(KNOWN)} behind its ?, not {unknown}")
    if given.get("tls", "0") not in ("0", "1"):
        raise ValueError(f"tls={given['tls']} is neither 0 nor 1")  # not: then in plain text
    return given


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}={text} is not a number")
    return int(text)


def _join(server: str, job: str, timeout: timedelta, **options: Any) -> Background:
    if joined.background is not None:
        raise ValueError("this process is in a job already: destroy_process_group() first")
    joined.background = Background(server, job=job, timeout=timeout.total_seconds(), **options)
    joined.groups.clear()
    return joined.background


def join_by_store(store: Any, rank: int, size: int, timeout: timedelta) -> Background:
    """Join through FMI_SERVER; rank 0 tells the others the job's name and key by torch's store."""
    server = _environment("FMI_SERVER", f'init_method="{NAME}://host:port/job"')
    # torchrun keeps its store when it begins anew, and in it what was said in the last attempt.
    place = f"{NAME}/{_restarts()}/{next(joined.attempts)}"
    if rank == 0:
        job = os.environ.get("FMI_JOB") or f"torch-{secrets.token_hex(8)}"
        key = os.environ.get("FMI_KEY") or secrets.token_hex(32)
        store.set(place, json.dumps([job, key]))
    job, key = json.loads(store.get(place))
    return _join(server, job, timeout, rank=rank, size=size, key=key, epoch=_restarts())


def _restarts() -> int:
    """Return how often torchrun has begun anew: ranks of an earlier attempt are not to join."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def _environment(name: str, instead: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"backend {NAME!r} needs {instead}, or {name} in the environment")
    return value
