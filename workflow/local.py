"""What the Step Functions state machine does, on this machine.

``init`` → one process per rank, all at once → ``summarize``: the same handlers as on AWS, each in
an operating-system process of its own, around a rendezvous server. One failed rank fails the run
at once, with that rank's own error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from asyncio.subprocess import Process
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmi_client.hosts import parse_endpoint
from lambda_worker.threads import cores
from lambda_worker.timing import Stopwatch
from workflow.calls import Call, RunFailed, with_log
from workflow.plan import Json, OnEvent, RankProgress, RunPlan, RunResult, Step, StepName
from workflow.processes import ProcessFamily, death_note, read_tail
from workflow.serving import NAME, start_server
from workflow.spans import all_spans

__all__ = ["RunFailed", "run_job"]

# How long the error of a rank that only noticed another one's end waits for the culprit's own.
_CULPRIT_WAIT = 1.0
_PROBE_SECONDS = 10.0
# Bytes of memory that a rank shares with no other: some less than was measured, 187 and 60 MB.
_LEAST_OF_TORCH, _LEAST = 150_000_000, 50_000_000


async def run_job(plan: RunPlan, on_event: OnEvent) -> RunResult:
    """Run ``plan`` to its end, telling ``on_event`` about every step.

    Cancelling this coroutine ends all processes of the run before it returns.

    Raises:
        RunFailed: a process failed, or ``plan.timeout`` has passed.
    """
    async with ProcessFamily() as family:
        job = _Job(plan, on_event, family)
        try:
            async with asyncio.timeout(plan.timeout):
                return await job.run()
        except TimeoutError as error:
            text = f"took longer than {plan.timeout:g} s (--timeout); {job.whereabouts()}"
            raise RunFailed("the run", text) from error
        finally:
            await job.stop_watching()


@dataclass
class _Job:
    plan: RunPlan
    on_event: OnEvent
    family: ProcessFamily
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    step: str = "start"
    clock: Stopwatch = field(default_factory=Stopwatch)
    at_work: dict[int, RankProgress] = field(default_factory=dict)
    failures: list[RunFailed] = field(default_factory=list)
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    async def run(self) -> RunResult:
        _check_memory(self.plan)
        secret = secrets.token_hex(32)
        endpoint = await self._rendezvous(secret) if self.plan.fmi else None
        task = await self._init(endpoint)
        if self.plan.fmi and not self.plan.rendezvous:
            self._admit(task, secret)
        await self._infer(task)
        self._tell("summarize", "summarize: merging the ranks' records")
        final = await self._call("summarize", task)
        self.clock.lap(self.step)
        names = ("combined_data", "summary_path", "predictions", "summary", "records")
        return RunResult(
            run=task["run"],
            **{name: final[name] for name in names},
            seconds=self.clock.total,
            spans=all_spans(self.clock, final["records"]),
        )

    async def stop_watching(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def whereabouts(self) -> str:
        """Say where the run stands, for the message about a timeout."""
        if not self.at_work:
            return f"it was at step {self.step}"
        places = self.at_work.values()
        ranks = [f"rank {p.rank} ({p.stage}, {p.rows} of {p.of} rows)" for p in places]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"still running: {', '.join(ranks[:8])}{more}"

    def _tell(self, step: StepName, text: str) -> None:
        self.clock.lap(None if self.step == "start" else self.step)
        self.step = step
        self.on_event(Step(step, text))

    # -- the rendezvous server ------------------------------------------------------------------

    async def _rendezvous(self, secret: str) -> str:
        # Whoever runs the server, the ranks of this run prove to each other that they belong.
        self.env["FMI_KEY"] = secrets.token_hex(32)
        if self.plan.rendezvous:
            await _probe(self.plan.rendezvous)
            return self.plan.rendezvous
        self._tell("server", "rendezvous server: starting")
        # The server reads the file once, at its start: the secret is on disk until then only.
        with _secret_file(self.family.folder, secret) as path:
            server, address = await start_server(
                self.family, self.plan.server, "--secret-file", path
            )
        self._spawn(self._watch(server))
        return address

    async def _watch(self, server: Process) -> None:
        assert server.stderr is not None
        log = await read_tail(server.stderr)
        note = f"{death_note(await server.wait())} during the run"
        self._fail(RunFailed(NAME, with_log(note, log)))

    def _admit(self, task: Json, secret: str) -> None:
        import fmi_client

        expires = int(time.time() + self.plan.timeout + 60)
        self.env["FMI_TOKEN"] = fmi_client.make_token(
            secret, job=task["run"], size=task["world_size"], expires=expires
        )

    # -- the handlers ---------------------------------------------------------------------------

    async def _init(self, endpoint: str | None) -> Json:
        plan = self.plan
        threads = max(1, cores() // plan.world_size)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        self.env |= dict.fromkeys(names, str(threads)) | {"MALLOC_ARENA_MAX": "1"}
        self.env["LOCAL_WORLD_SIZE"] = str(plan.world_size)  # who shares this machine's memory
        self._tell("init", f"init: splitting {plan.data} between {plan.world_size} ranks")
        # One limit only: the run's own, by which the launcher ends all ranks.
        event = plan.payload(endpoint, threads=threads, timeout=plan.timeout)
        return await self._call("init", event)

    async def _infer(self, task: Json) -> None:
        self._tell("infer", f"infer: {len(task['ranks'])} ranks, {task['rows']:,} rows")
        ranks = [self._spawn(self._rank(r, item)) for r, item in enumerate(task["ranks"])]
        everybody = self._spawn(asyncio.wait(ranks))
        failure = self._spawn(self.failed.wait())
        await asyncio.wait([everybody, failure], return_when=asyncio.FIRST_COMPLETED)
        if self.failures:
            raise await self._culprit()
        for rank in ranks:
            rank.result()  # a defect of ours, if anything

    async def _rank(self, rank: int, item: Json) -> None:
        rows = sum(stop - first for _, first, stop in item["shard"])
        self._progress({"stage": "start", "rows": 0, "of": rows}, rank)
        try:
            await self._call("infer", item, rank)
        except RunFailed as error:
            self._fail(error)
        finally:
            del self.at_work[rank]

    async def _culprit(self) -> RunFailed:
        """Return the first failure that is not the echo of another one, if it comes soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CULPRIT_WAIT):
                while all(failure.only_noticed for failure in self.failures) and self.at_work:
                    self.failed.clear()
                    await self.failed.wait()
        own = (failure for failure in self.failures if not failure.only_noticed)
        return next(own, self.failures[0])

    async def _call(self, handler: str, event: Json, rank: int | None = None) -> Json:
        who = handler if rank is None else f"rank {rank}"
        call = Call(who, (*self.plan.worker, handler), event, rank)
        return await call.run(self.family, self.env, lambda fields: self._progress(fields, rank))

    def _progress(self, fields: Json, rank: int | None) -> None:
        if rank is not None:
            # A rank that has not looked at its data yet says 0 of 0; init has told more.
            of = fields["of"] or (self.at_work[rank].of if rank in self.at_work else 0)
            now = RankProgress(rank, fields["stage"], fields["rows"], of)
            self.at_work[rank] = now
            self.on_event(now)

    def _fail(self, error: RunFailed) -> None:
        self.failures.append(error)
        self.failed.set()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.tasks.append(task)
        return task


def _check_memory(plan: RunPlan) -> None:
    """Fail early where ranks would fill the memory until the kernel kills some process."""
    from lambda_worker.batching import available

    each = _LEAST_OF_TORCH if plan.engine == "torch" else _LEAST
    need, left = plan.world_size * each, available()[0]
    if need > left > 0:
        text = f"needs {need / 1e9:,.1f} GB of memory or more for {plan.world_size:,} ranks"
        room = f"{left / 1e9:,.1f} GB are free: take a smaller --world-size, or --on aws"
        raise RunFailed("the run", f"{text}, and {room}")


async def _probe(endpoint: str) -> None:
    """Fail early where nobody listens: ranks would go on trying until the run's timeout."""
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_connection(*parse_endpoint(endpoint))
    except OSError as error:  # TimeoutError is one
        known = error.errno is not None and error.errno > 0  # asyncio's own text has no reason
        reason = os.strerror(error.errno or 0) if known else str(error) or "no answer"
        text = f"at {endpoint} cannot be reached ({reason}); start it, or leave out --rendezvous"
        raise RunFailed("the rendezvous server", text) from error
    writer.close()


@contextlib.contextmanager
def _secret_file(folder: str, secret: str) -> Iterator[str]:
    path = Path(folder, "secret")
    path.touch(mode=0o600)
    try:
        path.write_text(secret)
        yield str(path)
    finally:
        path.unlink()
