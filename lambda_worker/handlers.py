"""The steps of a job with AWS Lambda's signature: init, infer (one per rank), summarize, blame.

And `check`, for when nothing works.

Events and results are plain JSON objects; docs/payloads.md has every field. Secrets come by
reference (ARN) or by environment (FMI_KEY, FMI_TOKEN), never in an event.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambda_worker import aside, failures, shard, storage
from lambda_worker.deadline import Deadline, Progress, Watch
from lambda_worker.engine import DEMO_MODEL
from lambda_worker.events import (
    CheckTask,
    EventError,
    Payload,
    RankTask,
    RunInfo,
    parse,
    parse_rank,
)
from lambda_worker.scarce import memory_told
from lambda_worker.telemetry import observed
from lambda_worker.timing import Stopwatch, init_seconds, ready

if TYPE_CHECKING:
    from fmi_client.sync import Communicator
    from lambda_worker.engine import Array, Engine, Predict
    from lambda_worker.reading import Shard

__all__ = ["blame", "check", "infer", "init", "summarize"]

log = logging.getLogger("lambda_worker")


def _silent(stage: str, rows: int, of: int) -> None:
    pass


@observed
def init(event: object, context: object = None) -> dict[str, Any]:
    """Plan a job: which rank reads which rows, and where the results go.

    Args:
        event: a `Payload`.
        context: AWS Lambda's; not used.

    Returns:
        run, world_size, batch_size, rows, results (folder of the run), fmi_enabled, init_id, model,
        data, epoch (of the first attempt), max_epochs (which no attempt's reaches), and `ranks`:
        the event of `infer` for each rank. All of it is the event of `summarize` and `blame`.
        Nothing is written, unless the payload says `ranks_file`: then the ranks stand in
        `<results>/ranks.json`, and in their place is `ranks_file`, where that is; and the payload
        stands in `<results>/payload.json`.

    Raises:
        EventError: a field is wrong.
        DatasetError: no data there, or a file that cannot be used.
        EngineError, ModelError: the engine cannot do it, or the model's export is missing or stale.
        StorageError: a place cannot be read.
    """
    payload = parse(Payload, event)  # before torch is imported: a wrong event is told at once
    from lambda_worker import dataset

    files, data_map, world_size = _plan(payload)
    storage.check_writable(payload.results_url("run"))
    counts = aside.in_parallel(dataset.count, files, dataset.OPENERS)
    rows = dict(zip(files, counts, strict=True))
    run = payload.run_name()
    # Chosen here and nowhere else: ranks that chose for themselves would not predict the same.
    engine, model = _engine(payload)
    common = {**_common(payload, run, world_size), "model": model}
    job = {**_rendezvous(payload), "engine": engine}
    ranks = [
        {"rank": rank, "shard": [list(piece) for piece in pieces], **common, **job}
        for rank, pieces in enumerate(shard.assign(rows, world_size, data_map))
    ]
    total = sum(piece[2] - piece[1] for task in ranks for piece in task["shard"])
    data = storage.absolute(payload.data_url) if payload.data_url else "data_map"
    attempts = {"epoch": payload.epoch, "max_epochs": payload.epoch + payload.attempts}
    info = {**common, **attempts, "fmi_enabled": payload.joins, "rows": total, "data": data}
    return {**info, **_handed_on(payload, common["results"], ranks)}


@observed
def infer(event: object, context: object = None, progress: Progress = _silent) -> dict[str, Any]:
    """One rank's part of the job: join, load, meet at a barrier, predict, merge.

    Args:
        event: a `RankTask`, or `{"task": RankTask, "epoch": n}` with the attempt's number.
        context: AWS Lambda's, for the time that is left; None: any time. In the main thread an
            alarm (SIGALRM) stops what takes too long, in others only what reports progress.
        progress: called with stage ("join", "load", with batch size "auto" "tune", "infer",
            "gather", "done"), rows done and rows of this rank.

    Returns:
        The rank's record, which also stands in `<results>/<rank>.json`. Rank 0 of a job that
        joins writes `predictions.npz` and `merged.json` too; without a job each rank writes
        `<rank>.npz`, for `summarize` to merge.

    Raises:
        EventError, DatasetError, ModelError, EngineError, StorageError: this rank cannot do its
            part; the others are told so at once (`Aborted`).
        OutOfMemory: this process got no more; the others are told so, too.
        SecretError, SecretUnavailable: a secret that an ARN names cannot be read.
        DeadlineError: the function's time is almost over; the others are told so, too.
        FmiError: the job cannot go on. After any error this rank has written no record, but
            `<results>/failed/<epoch>/<rank>.json`, for `blame`, if that could be done quickly.
    """
    with failures.recorded(event):
        task = parse_rank(event)
        deadline = Deadline(context, task.rank)
        with deadline.watched():
            return _infer(task, deadline, progress)


def _infer(task: RankTask, deadline: Deadline, progress: Progress) -> dict[str, Any]:
    clock = Stopwatch(init_seconds())
    # Join first: whatever fails from here on reaches the other ranks while they wait.
    Watch(deadline, None, progress)("join", 0, 0)
    with (
        _joined(task) as comm,
        memory_told(lambda: deadline.stage),
        storage.scratch() as scratch,
    ):
        clock.lap("join" if comm else None)
        watch = Watch(deadline, comm, progress)
        try:
            return _work(task, comm, scratch, watch, clock)
        finally:
            deadline.disarm()  # what follows is goodbye


@observed
def summarize(event: object, context: object = None) -> dict[str, Any]:
    """Merge the ranks' records and predictions into the run's result.

    Args:
        event: what `init` returned; more may be in it (`RunInfo`).
        context: AWS Lambda's; not used.

    Returns:
        combined_data, summary_path, predictions (URLs), summary, and records, but these not with
        `ranks_file`: they are what grows with the ranks.

    Raises:
        EventError: a field is wrong.
        SummaryError: ranks are missing, which are named. Nothing is written.
        StorageError: a file cannot be read or written.
    """
    from lambda_worker import summary

    with memory_told(lambda: "summarize"):
        return summary.summarize(parse(RunInfo, event))


@observed
def blame(event: object, context: object = None) -> dict[str, Any]:
    """Say why an attempt failed, by what its ranks left, and whether to try again.

    Args:
        event: what `init` returned, with the attempt's `epoch`, and `error`, what Step Functions
            has caught, if that is at hand (`RunInfo`).
        context: AWS Lambda's; not used.

    Returns:
        error (class of the culprit's error), cause (one line that names the rank that failed, not
        those that noticed), rank (or None), retry (whether another attempt is left, and may end
        well) and epoch (the next attempt's).

    Raises:
        EventError: a field is wrong.
        StorageError: the ranks' records cannot be read.
    """
    return failures.blame(parse(RunInfo, event))


@observed
def check(event: object, context: object = None) -> dict[str, Any]:
    """See from inside a function whether ranks can meet at a server, and if not, why.

    Args:
        event: a `CheckTask`.
        context: AWS Lambda's; not used.

    Returns:
        The report of `fmi_client.check`: ok, advice, steps and what was measured. What a check
        finds wrong is its result, too.

    Raises:
        EventError: a field is wrong.
        SecretError, SecretUnavailable: the server's secret cannot be read.
    """
    task = parse(CheckTask, event)
    from fmi_client.check import Plan, Step, run
    from lambda_worker import secret

    def tell(step: Step) -> None:
        log.info("check: %s: %s: %s", step.name, step.status, step.text)

    try:
        given = task.model_dump(exclude={"server_secret_arn"})
        plan = Plan.make(**given, secret=secret.server_secret(task.server_secret_arn))
    except ValueError as error:
        raise EventError(str(error)) from None
    return run(plan, end=tell).as_dict()


def _common(payload: Payload, run: str, world_size: int) -> dict[str, Any]:
    return {
        "run": run,
        "world_size": world_size,
        "batch_size": payload.batch_size,
        "results": storage.absolute(payload.results_url(run)),
        # A run may be repeated under its name: files of the earlier one are told apart by this.
        "init_id": secrets.token_hex(8),
    }


def _handed_on(payload: Payload, results: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' events, or the file that a distributed Map reads them from: they may be 10,000."""
    if not payload.ranks_file:
        return {"ranks": ranks}
    asked = payload.model_dump_json(exclude_unset=True, indent=1)
    storage.write(f"{results}/payload.json", asked.encode() + b"\n")
    url = f"{results}/ranks.json"
    storage.write(url, json.dumps(ranks).encode())
    return {"ranks_file": storage.place(url)}


def _engine(payload: Payload) -> tuple[Engine, str]:
    """The engine of all ranks, and the URL of the model file that it reads."""
    from lambda_worker.exported import choose

    model = storage.absolute(payload.model or str(DEMO_MODEL))
    return choose(payload.engine, payload.precision, model)


def _rendezvous(payload: Payload) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "fmi_enabled": payload.joins,
        "timeout": payload.timeout,
        "strict": payload.strict,
        "precision": payload.precision,
    }
    if payload.joins:
        fields |= {"rendezvous_endpoint": payload.rendezvous_endpoint, "epoch": payload.epoch}
        arns = {name: getattr(payload, name) for name in ("server_secret_arn", "key_arn")}
        fields |= {name: arn for name, arn in arns.items() if arn is not None}
    if payload.threads is not None:
        fields["threads"] = payload.threads
    return fields


def _plan(payload: Payload) -> tuple[list[str], dict[int, list[str] | None], int]:
    """All files, what `data_map` gives to each rank, and the world size."""
    data_map: dict[int, list[str] | None] = {}
    for rank, names in (payload.data_map or {}).items():
        several = [names] if isinstance(names, str) else names
        data_map[int(rank)] = several and [storage.absolute(payload.file_url(n)) for n in several]
    fixed = [file for files in data_map.values() for file in files or ()]
    listed = dataset_files(payload) if not data_map or None in data_map.values() else []
    world_size = payload.world_size or len(data_map)
    if not world_size:  # as the reference does: one rank per file
        data_map = {rank: [file] for rank, file in enumerate(listed)}
        world_size = len(listed)
    return list(dict.fromkeys(listed + fixed)), data_map, world_size


def dataset_files(payload: Payload) -> list[str]:
    """URLs of the dataset's files in natural order (2.pt before 10.pt), up to `file_limit`.

    Raises:
        DatasetError: there are none.
        StorageError: the folder cannot be read.
    """
    from lambda_worker.dataset import DatasetError

    url = storage.absolute(str(payload.data_url))
    if url.endswith(".pt"):
        return [url]
    names = storage.names(url)
    size = payload.data_size
    if size and f"{size}.pt" in names:
        return [f"{url}/{size}.pt"]
    made = sorted(name for name in names if re.fullmatch(f"demo-{size}-.*\\.pt", name))
    if made:  # by `cosmic data make`; of several, say of two seeds, the first
        return [f"{url}/{made[0]}"]
    whole = payload.data is not None and any(name.endswith(".pt") for name in names)
    if size and not (whole and f"{size}/" not in names):  # else the folder itself is meant
        url, names = f"{url}/{size}", storage.names(f"{url}/{size}")
    files = sorted((name for name in names if name.endswith(".pt")), key=_natural)
    if not files:
        folders = ", ".join(name for name in names if name.endswith("/"))
        raise DatasetError(
            f"{url}: no .pt file there" + (f", only folders: {folders}" if folders else "")
        )
    return [f"{url}/{file}" for file in files[: payload.file_limit]]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]


def _joined(task: RankTask) -> AbstractContextManager[Communicator | None]:
    """The job's communicator, or None without one; an error inside reaches all ranks."""
    if not task.joins:
        return nullcontext()
    import fmi_client
    from lambda_worker import secret

    return fmi_client.sync.connect(
        str(task.rendezvous_endpoint),
        job=str(task.run),
        rank=task.rank,
        size=task.world_size,
        epoch=task.epoch,
        timeout=task.timeout,
        **secret.credentials(task),
    )


def _work(
    task: RankTask, comm: Communicator | None, scratch: Path, watch: Watch, clock: Stopwatch
) -> dict[str, Any]:
    watch("load", 0, 0)  # torch first of all, which takes a second or more
    from lambda_worker import inference, metrics, summary

    baseline = summary.memory("VmRSS")
    model, predict, rows = _load(task, scratch, watch)
    clock.lap("load")
    batch_size, calibration = _batch_size(task, comm, predict, len(rows), watch)
    clock.lap("tune" if calibration else None)
    watch.at("barrier")
    if comm is not None:
        comm.barrier()  # so that the ranks' inference times are of one moment
        clock.lap("barrier")
    watch.at("infer")
    inferred = inference.run(predict, rows, batch_size, partial(watch, "infer"), watch.look)
    clock.lap("infer")
    if warning := inference.judge(inferred, rows.pieces, task.strict):
        log.warning("%s", warning)
    deviation = inference.deviation(
        model, task.engine, task.precision, task.threads, rows, inferred.z_phot, watch.look
    )
    total = metrics.sums(inferred.z_phot, inferred.z_spec)
    watch("gather", len(rows), len(rows))
    clock.lap(None)
    if comm is not None:
        total = comm.allreduce(total)
        clock.lap("allreduce")
    batch = {"batch_size": batch_size, "calibration": calibration}
    stats = comm.stats() if comm else None
    record = summary.record(task, rows, inferred, deviation, batch, clock, baseline, stats)
    _deliver(task, comm, record, summary.table(rows.pieces, inferred), total)
    watch("done", len(rows), len(rows))
    return record


def _load(task: RankTask, scratch: Path, watch: Watch) -> tuple[Path, Predict, Shard]:
    from lambda_worker import warm
    from lambda_worker.exported import export_of
    from lambda_worker.reading import Shard

    def opened() -> Shard:
        return Shard(pieces, scratch)

    pieces = _pieces(task, watch)
    of = sum(piece.stop - piece.start for piece in pieces)
    watch("load", 0, of)
    place = task.model or str(DEMO_MODEL)
    url = place if task.engine == "torch" else export_of(place)
    model, predict = warm.load(
        url,
        scratch,
        engine=task.engine,
        precision=task.precision,
        threads=task.threads,
        look=watch.look,
    )
    rows = aside.result(aside.start(opened, "open"), watch.look, "the data files to be opened")
    return model, predict, rows


def _pieces(task: RankTask, watch: Watch) -> list[shard.Piece]:
    """This rank's rows; without a shard, all of its files."""
    from lambda_worker import dataset

    if task.shard is not None:
        return [shard.Piece(*piece) for piece in task.shard]

    def counted() -> list[int]:
        return aside.in_parallel(dataset.count, task.whole_files, dataset.OPENERS)

    counts = aside.result(aside.start(counted, "open"), watch.look, "the data files to be opened")
    return [shard.Piece(file, 0, n) for file, n in zip(task.whole_files, counts, strict=True)]


def _batch_size(
    task: RankTask, comm: Communicator | None, predict: Predict, rows: int, progress: Progress
) -> tuple[int, dict[str, Any] | None]:
    """Rows of a batch, the same on all ranks of a job, and how "auto" came to it (or None)."""
    if task.batch_size != "auto":
        return task.batch_size, None
    import fmi_client
    from lambda_worker import batching

    progress("tune", 0, rows)

    def predict_and_look(images: Array, magnitudes: Array) -> Array:
        if comm is not None:
            comm.poll()
        return predict(images, magnitudes)

    trials = batching.calibrate(predict_and_look, rows)
    rates = trials.rates if comm is None else comm.allreduce(trials.rates, fmi_client.MIN)
    return batching.choose(rates), batching.report(trials, rates)


def _deliver(
    task: RankTask, comm: Communicator | None, record: dict[str, Any], table: Any, total: Any
) -> None:
    """Write what this rank has to; its record comes last and says that the rest is there."""
    from lambda_worker import summary

    folder = task.results_url
    if comm is None:
        storage.write(f"{folder}/{task.rank}.npz", summary.pack(table))
    else:
        parts = comm.gather({"record": record, "table": table}, root=0)
        if parts is not None:
            summary.write_merged(folder, task.init_id, parts, total)
    storage.write(f"{folder}/{task.rank}.json", summary.to_json(record))


ready()
