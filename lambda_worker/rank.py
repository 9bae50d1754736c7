"""One rank's part of a job, in its order: join, load, meet at a barrier, predict, merge, write."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambda_worker import aside, shard, storage
from lambda_worker.deadline import Deadline, Progress, Watch
from lambda_worker.engine import DEMO_MODEL
from lambda_worker.events import RankTask
from lambda_worker.scarce import memory_told
from lambda_worker.timing import Stopwatch, init_seconds

if TYPE_CHECKING:
    from fmi_client.sync import Communicator
    from lambda_worker.engine import Array, Predict
    from lambda_worker.reading import Shard

log = logging.getLogger("lambda_worker")


def run(task: RankTask, deadline: Deadline, progress: Progress) -> dict[str, Any]:
    """Do a rank's part; see `handlers.infer`."""
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
    from lambda_worker import inference, metrics, records

    baseline = records.memory("VmRSS")
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
    record = records.record(task, rows, inferred, deviation, batch, clock, baseline, stats)
    _deliver(task, comm, record, records.table(rows.pieces, inferred), total)
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
    from lambda_worker import records, summary

    folder = task.results_url
    if comm is None:
        storage.write(f"{folder}/{task.rank}.npz", records.pack(table))
    else:
        parts = comm.gather({"record": record, "table": table}, root=0)
        if parts is not None:
            summary.write_merged(folder, task.init_id, parts, total)
    storage.write(f"{folder}/{task.rank}.json", records.to_json(record))
