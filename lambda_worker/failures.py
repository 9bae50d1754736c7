"""What ended an attempt: every rank's last word, and the verdict on who is to blame.

A rank that fails leaves `<results>/failed/<epoch>/<rank>.json`. One failure ends all ranks, so that
there is one record of the culprit, or none if it was killed, and many of ranks that only noticed.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fmi_client import errors
from lambda_worker import aside, storage
from lambda_worker.events import RunInfo, whereabouts

log = logging.getLogger("lambda_worker")

WRITE_SECONDS = 2.0  # what a rank that fails may spend on saying so: it must still get to raise
SETTLE_SECONDS = 2.0  # the others may be here before the culprit, which tells them first
LOOK_SECONDS = 0.1
READERS = 32
WAVE = 256  # records that are read before those are looked for that they name
READ_SECONDS = 20.0  # a verdict on what was read by then is one, too
LONGEST = 1000  # characters: Step Functions shows a cause in one line

PERMANENT = {
    *("EventError", "DatasetError", "ModelError", "EngineError", "SecretError", "OutOfMemory")
}
"""Own errors of a rank that another attempt would only repeat."""


@dataclass(frozen=True)
class Failure:
    """A rank's last word.

    Attributes:
        type: name of the error's class.
        blamed: the rank that is named as dead or absent by an error of the communicator; None for
            an error of this rank's own, or where nobody is named.
        init_id: of the run's `init`: a run of the same name may have left records before.
        waiting: whether an own error came while the rank only waited for others (`DeadlineError`).
    """

    rank: int
    epoch: int
    type: str
    message: str
    blamed: int | None = None
    init_id: str | None = None
    waiting: bool = False

    @property
    def own(self) -> bool:
        """Whether this rank failed by itself, and has not only noticed that another one did."""
        return self.type not in errors.__all__


@dataclass(frozen=True)
class Verdict:
    """Why an attempt failed.

    Attributes:
        error: class of the error.
        cause: one line that names the rank.
        rank: the rank; None where none can be told.
        can_pass: whether another attempt may end well.
    """

    error: str
    cause: str
    rank: int | None
    can_pass: bool = True


def judge(failures: Sequence[Failure], silent: Collection[int], told: str = "") -> Verdict:
    """Find the culprit. No I/O.

    Args:
        failures: the records of one attempt.
        silent: ranks that left neither an error nor a result.
        told: what whoever started the ranks says of it, if that is known.
    """
    inorder = sorted(failures, key=lambda failure: failure.rank)
    if own := [failure for failure in inorder if failure.own]:
        return _judge_own(own)
    blamed = Counter(failure.blamed for failure in inorder if failure.blamed is not None)
    if blamed:
        most = max(blamed.values())
        culprit = min(rank for rank, count in blamed.items() if count == most)
        return _judge_blamed(culprit, inorder)
    if silent:
        return _judge_silent(sorted(silent), inorder, told)
    if not inorder:
        return Verdict("RunFailed", _line(f"no rank left an error. {told}"), None)
    # All ranks are there, and none of them blames another: the server, or the network.
    first = inorder[0]
    others = _others(len(inorder) - 1, "the same, or like it")
    return Verdict(first.type, _line(f"rank {first.rank}: {first.message}{others}"), first.rank)


def _judge_own(own: Sequence[Failure]) -> Verdict:
    # What no attempt can pass decides, whoever else had bad luck at the same time; and who ran out
    # of time while it waited, waited for somebody.
    first = min(own, key=lambda f: (f.type not in PERMANENT, f.waiting, f.rank))
    alike = all(failure.type == first.type for failure in own)
    others = _others(len(own) - 1, "the same" if alike else "an error of their own, too")
    text = f"rank {first.rank} failed: {first.type}: {first.message}{others}"
    return Verdict(first.type, _line(text), first.rank, first.type not in PERMANENT)


def _judge_blamed(culprit: int, inorder: Sequence[Failure]) -> Verdict:
    noticed = next(failure for failure in inorder if failure.blamed == culprit)
    count = sum(failure.blamed == culprit for failure in inorder)
    told = next((failure for failure in inorder if failure.rank == culprit), None)
    if told is not None:
        how = f"did not answer; its own last word: {told.type}: {told.message}"
    elif noticed.type == "Aborted":
        how = "failed, and its own record of it could not be read"
    else:
        how = "left no word of its own: killed, out of memory, or cut off by its time limit?"
    ranks = "rank" if count == 1 else "ranks"
    seen = f"noticed by {count} {ranks}: {noticed.message}"
    return Verdict(noticed.type, _line(f"rank {culprit} {how} ({seen})"), culprit)


def _judge_silent(silent: Sequence[int], inorder: Sequence[Failure], told: str) -> Verdict:
    names = ", ".join(map(str, silent[:10])) + (", ..." if len(silent) > 10 else "")
    word = f"; rank {inorder[0].rank} says: {inorder[0].message}" if inorder else ""
    text = f"rank {names} left neither a result nor an error: not started, or killed{word}. {told}"
    return Verdict("RankFailed", _line(text), silent[0])


def _others(count: int, what: str) -> str:
    if not count:
        return ""
    return f" ({count} other {'rank' if count == 1 else 'ranks'}: {what})"


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


@contextmanager
def recorded(event: object) -> Iterator[None]:
    """Leave a record of an error that ends the block, as far as that can be done quickly.

    Args:
        event: of `infer`; it says where, as far as it can be read at all.
    """
    try:
        yield
    except Exception as error:
        try:
            aside.start(partial(_write, event, error), "last word").result(WRITE_SECONDS)
        except Exception as problem:
            why = str(problem) or f"it takes longer than {WRITE_SECONDS:g} s"
            log.warning("no record of this rank's failure could be written: %s", why)
        raise


def _write(event: object, error: Exception) -> None:
    place = whereabouts(event)
    if place is None:
        return  # an event that names no folder and rank
    failure = Failure(
        rank=place.rank,
        epoch=place.epoch,
        type=type(error).__name__,
        message=words(error),
        blamed=_blames(error),
        init_id=place.init_id,
        waiting=getattr(error, "waiting", False),
    )
    content = json.dumps(asdict(failure)).encode()
    storage.write(f"{place.results}/failed/{place.epoch}/{place.rank}.json", content)


def words(error: BaseException) -> str:
    """An error's text, with what was noted of it on its way (`aside.result`)."""
    return "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])


def _blames(error: Exception) -> int | None:
    match error:
        case errors.RankFailed(rank=rank):
            return rank
        case errors.Aborted(by=rank):
            return rank
        case errors.CollectiveTimeout(missing=[rank, *_]) | errors.JoinTimeout(missing=[rank, *_]):
            return rank
        case errors.PunchFailed(peer=rank):
            return rank
    return None


def blame(run: RunInfo) -> dict[str, Any]:
    """Read what the ranks of a failed attempt left, and say who is to blame; see `handlers.blame`.

    Raises:
        StorageError: the folder cannot be read.
    """
    failures = _settled(run)
    silent: set[int] = set()
    if not any(failure.own or failure.blamed is not None for failure in failures):
        silent = _silent(run, failures)
    verdict = judge(failures, silent, _told(run.error))
    epoch = run.epoch + 1
    return {
        "error": verdict.error,
        "cause": verdict.cause,
        "rank": verdict.rank,
        "retry": verdict.can_pass and epoch < run.max_epochs,
        "epoch": epoch,
    }


def _settled(run: RunInfo) -> list[Failure]:
    """Records of the attempt: enough for a verdict, or all that come and can be read in time."""
    folder = f"{run.results}/failed/{run.epoch}"
    found: dict[str, Failure | None] = {}
    began = time.monotonic()
    while True:
        names = [name for name in storage.names(folder) if re.fullmatch(r"\d+\.json", name)]
        new = _telling_first([name for name in names if name not in found], found.values())
        found |= _read_some(folder, new[:WAVE], READ_SECONDS - (time.monotonic() - began))
        failures = [f for f in found.values() if f is not None and f.init_id == run.init_id]
        if _suffices(failures, run, len(new) <= WAVE, time.monotonic() - began):
            return failures
        if not new:
            time.sleep(LOOK_SECONDS)


def _telling_first(names: Sequence[str], read: Collection[Failure | None]) -> list[str]:
    """Those first that others blame: one word of theirs says more than 10,000 of those."""
    blamed = {f"{failure.blamed}.json" for failure in read if failure is not None}
    return sorted(names, key=lambda name: name not in blamed)


def _suffices(failures: Sequence[Failure], run: RunInfo, all_read: bool, seconds: float) -> bool:
    """Whether no record that is still missing, or unread, is worth the time to wait for it."""
    if any(failure.own and not failure.waiting for failure in failures):
        return True
    if len(failures) == run.world_size or seconds > READ_SECONDS:
        return True
    named = any(failure.own or failure.blamed is not None for failure in failures)
    return seconds > SETTLE_SECONDS and (named or all_read)


def _read_some(folder: str, names: Sequence[str], seconds: float) -> dict[str, Failure | None]:
    """What can be read in so many seconds."""
    pool = ThreadPoolExecutor(READERS)
    try:
        jobs = {name: pool.submit(_read, f"{folder}/{name}") for name in names}
        done = wait(jobs.values(), max(seconds, 0.0)).done
        return {name: job.result() for name, job in jobs.items() if job in done}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read(url: str) -> Failure | None:
    try:
        return Failure(**json.loads(storage.read(url)))
    except (storage.StorageError, ValueError, TypeError) as error:
        log.warning("%s: no record of a failure: %s", url, error)
        return None


def _silent(run: RunInfo, failures: Sequence[Failure]) -> set[int]:
    """Ranks without a record of failure, and, of these, without a result if there are such."""
    words = set(range(run.world_size)) - {failure.rank for failure in failures}
    results = {name.removesuffix(".json") for name in storage.names(run.results)}
    return {rank for rank in words if str(rank) not in results} or words


def _told(error: Any) -> str:
    """Step Functions' own words, {"Error": ..., "Cause": ...}, as far as they are that."""
    if not isinstance(error, dict):
        return ""
    words = [str(error[key]) for key in ("Error", "Cause") if error.get(key)]
    return "Step Functions says: " + ": ".join(words) if words else ""
