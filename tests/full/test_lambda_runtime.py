"""All handlers in AWS Lambda's runtime: eight ranks at once, cold and warm, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import fmi_client
from fmi_client.protocol import frames
from lambda_worker import handlers, storage
from lambda_worker.engine import DEMO_MODEL
from lambda_worker.model_file import save_model
from lambda_worker.storage import s3
from tests.full.rie import Instance, emulator, instance
from tests.processes import serve_rendezvous
from tests.worker.sparse import sparse_pt
from tests.worker.worker_data import SMALL, tensors, trained
from workflow.local import RunPlan, RunResult, run_job

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(emulator() is None, reason="make tools was not run"),
]

SIZE, ROWS, RUN = 8, 203, "in-lambda"
SECRET, KEY = secrets.token_hex(32), secrets.token_hex(32)
HANDLERS = "lambda_worker.handlers"

Json = dict[str, Any]


def token(run: str, size: int) -> str:
    return fmi_client.make_token(SECRET, job=run, size=size, expires=int(time.time()) + 3600)


TOKEN = token(RUN, SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rie")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """host:port of a rendezvous server that only admits whom its secret admits."""
    with serve_rendezvous(secret=SECRET) as server:
        yield server


@dataclass
class Functions:
    """The functions of a deployment: one instance of each, and of `infer` one for each rank."""

    init: Instance
    summarize: Instance
    blame: Instance
    check: Instance
    ranks: list[Instance]

    def infer(self, plan: Json, epoch: int = 0, more: dict[int, Json] | None = None) -> list[Any]:
        """What all ranks return, called at once as the Map does, by rank."""
        tasks = json.loads(Path(plan["ranks_file"]["path"]).read_text())
        events = [
            {"task": {**task, **(more or {}).get(task["rank"], {})}, "epoch": epoch}
            for task in tasks
        ]
        with ThreadPoolExecutor(len(events)) as pool:
            return list(pool.map(Instance.invoke, self.ranks, events))


@pytest.fixture(scope="module")
def functions(folder: Path) -> Iterator[Functions]:
    env = {"FMI_KEY": KEY, "FMI_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:

        def start(name: str, place: str, more: Mapping[str, str] = env) -> Instance:
            return stack.enter_context(instance(f"{HANDLERS}.{name}", folder / place, more))

        yield Functions(
            **{name: start(name, name) for name in ("init", "summarize", "blame")},
            check=start("check", "check", {"FMI_TOKEN": token("checked", 1)}),
            ranks=[start("infer", f"rank-{n}") for n in range(SIZE)],
        )


@pytest.fixture(scope="module")
def payload(folder: Path, server: str) -> Json:
    torch.save(TensorDataset(*tensors(ROWS, seed=5)), folder / "data.pt")
    shutil.copy(DEMO_MODEL, folder / "model.safetensors")
    return {
        "data": str(folder / "data.pt"),
        "model": str(folder / "model.safetensors"),
        "results": str(folder / "results"),
        "run": RUN,
        "world_size": str(SIZE),
        "batch_size": 16,
        "rendezvous_endpoint": server,
        "threads": 1,
        "ranks_file": True,
    }


def whole_run(functions: Functions, payload: Json) -> tuple[list[Any], Json]:
    """Records and summary, of all steps."""
    plan = functions.init.invoke(payload)
    assert "ranks" not in plan, plan
    records = functions.infer(plan)
    assert not [record for record in records if "errorType" in record], records
    return records, functions.summarize.invoke(plan)


@pytest.fixture(scope="module")
def cold(functions: Functions, payload: Json) -> tuple[list[Any], Json]:
    return whole_run(functions, payload)


@pytest.fixture(scope="module")
def warm(cold: object, functions: Functions, payload: Json) -> tuple[list[Any], Json]:
    return whole_run(functions, payload)


@pytest.fixture(scope="module")
def local(payload: Json, folder: Path) -> RunResult:
    """The same job by the launcher on this machine."""
    plan = RunPlan(
        data=payload["data"],
        model=payload["model"],
        world_size=SIZE,
        batch_size=16,
        results=str(folder / "local"),
        run="local",
    )
    return asyncio.run(run_job(plan, lambda event: None))


def predictions(url: str) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(url) as table:
        return dict(table)


def entries(place: Instance, message: str) -> list[Json]:
    """Log entries whose message starts so."""
    return [line for line in place.lines() if str(line.get("message", "")).startswith(message)]


def metrics(place: Instance) -> list[Json]:
    return [line for line in place.lines() if "_aws" in line]


def moment(entry: Json) -> float:
    return datetime.fromisoformat(entry["timestamp"]).timestamp()


def test_eight_ranks_give_what_the_local_launcher_gives(
    cold: tuple[list[Any], Json], local: RunResult
) -> None:
    records, result = cold
    assert [record["rank"] for record in records] == list(range(SIZE))
    assert sum(record["rows"] for record in records) == ROWS
    assert result["summary"]["metrics"] == local.summary["metrics"]
    assert all(record["links"]["relay"] == 0 for record in records)
    ours, theirs = predictions(result["predictions"]), predictions(local.predictions)
    assert ours["z_phot"].tobytes() == theirs["z_phot"].tobytes()
    assert ours["row"].tolist() == list(range(ROWS))


def test_warm_ranks_load_nothing_and_predict_the_same(
    cold: tuple[list[Any], Json], warm: tuple[list[Any], Json], functions: Functions
) -> None:
    assert warm[1]["summary"]["metrics"] == cold[1]["summary"]["metrics"]
    for rank, place in enumerate(functions.ranks):
        first, second = entries(place, "infer: done")[:2]
        assert (first["cold_start"], second["cold_start"]) == (True, False)
        assert (first["rank"], first["run"], first["epoch"]) == (rank, RUN, 0)
        assert first["request_id"] != second["request_id"]
        assert len(entries(place, "model: loaded")) == 1
        assert len(entries(place, "model: the loaded one")) == 1
        assert second["result"]["load_seconds"] < first["result"]["load_seconds"]


def test_records_tell_init_limits_and_spans(
    cold: tuple[list[Any], Json], warm: tuple[list[Any], Json]
) -> None:
    for first, second in zip(cold[0], warm[0], strict=True):
        assert 0.05 < first["init_time (seconds)"] < 60
        assert second["init_time (seconds)"] == 0
        assert first["memory_limit (MB)"] == second["memory_limit (MB)"] == 2048 * 2**20 / 1e6
        for record in (first, second):
            assert [name for name, _, _ in record["spans"]] == [
                *("join", "load", "barrier", "infer", "allreduce")
            ]


def test_metrics_of_every_rank(warm: object, functions: Functions) -> None:
    for rank, place in enumerate(functions.ranks):
        first, second = metrics(place)[:2]
        (told,) = first["_aws"]["CloudWatchMetrics"]
        assert told["Namespace"] == "cosmic"
        assert told["Dimensions"] == [["function"]]
        units = {metric["Name"]: metric["Unit"] for metric in told["Metrics"]}
        assert units == {
            "cold_start": "Count",
            "rows_per_second": "Count/Second",
            "join_seconds": "Seconds",
            "collective_seconds": "Seconds",
            "links_direct": "Count",
            "links_relayed": "Count",
        }
        assert (first["rank"], first["run"], first["engine"]) == (rank, RUN, "torch")
        assert (first["cold_start"], second["cold_start"]) == ([1.0], [0.0])
        assert first["rows_per_second"][0] > 0
        assert first["collective_seconds"][0] > 0
        assert first["links_direct"][0] >= 1


def test_one_rank_fails_and_the_others_know_within_a_second(
    warm: object, functions: Functions, payload: Json
) -> None:
    plan = functions.init.invoke(payload)
    wrong = {"shard": [[payload["data"], ROWS - 1, ROWS + 7]]}
    answers = functions.infer(plan, 4, {5: wrong})
    assert answers[5]["errorType"] == "DatasetError", answers[5]
    assert f"row {ROWS + 6} is wanted" in answers[5]["errorMessage"]
    others = [answer for rank, answer in enumerate(answers) if rank != 5]
    assert {answer["errorType"] for answer in others} == {"Aborted"}
    assert all("rank 5" in answer["errorMessage"] for answer in others)
    failed = [entries(place, "infer: failed")[-1] for place in functions.ranks]
    assert {entry["epoch"] for entry in failed} == {4}
    assert failed[5]["error"] == "DatasetError"
    moments = [moment(entry) for entry in failed]
    assert max(moments) - moments[5] < 1.0

    error = {"Error": "States.ExceedToleratedFailureThreshold", "Cause": "one failed"}
    verdict = functions.blame.invoke({**plan, "epoch": 4, "error": error})
    assert (verdict["rank"], verdict["error"], verdict["retry"]) == (5, "DatasetError", False)
    assert "rank 5" in verdict["cause"]


def test_after_a_failure_the_same_instances_go_on(
    warm: tuple[list[Any], Json], functions: Functions, payload: Json
) -> None:
    _, result = whole_run(functions, payload)
    assert result["summary"]["metrics"] == warm[1]["summary"]["metrics"]


def test_check_from_inside_a_function(functions: Functions, server: str) -> None:
    report = functions.check.invoke({"server": server, "job": "checked", "size": 1, "rank": 0})
    assert report["ok"], report["advice"]
    assert report["round_trip_seconds"] > 0


@pytest.mark.parametrize("name", ["init", "summarize", "blame", "check"])
def test_a_wrong_event_is_told_in_one_line(functions: Functions, name: str) -> None:
    place = getattr(functions, name)
    answer = place.invoke({"wolrd_size": 3})
    assert answer["errorType"] == "EventError"
    assert "wolrd_size" in answer["errorMessage"]
    assert "\n" not in answer["errorMessage"]
    assert entries(place, f"{name}: failed: EventError")[-1]["error"] == "EventError"
    assert place.invoke([1])["errorMessage"] == "got [1], expected a JSON object"


@contextmanager
def eavesdropper(server: str) -> Iterator[tuple[str, list[bytes]]]:
    """An address that leads to the server, and the first bytes that each client has sent there."""
    seen: list[bytes] = []
    host, _, port = server.rpartition(":")

    def copy(source: socket.socket, target: socket.socket) -> None:
        while part := source.recv(65536):
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection((host, int(port))) as upstream:
            first = client.recv(65536)
            seen.append(first)
            upstream.sendall(first)
            back = threading.Thread(target=copy, args=(upstream, client))
            back.start()
            copy(client, upstream)
            back.join()

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)


def hellos(seen: list[bytes]) -> list[Json]:
    """What a rank has said of itself at each join."""
    found: list[Json] = []
    for first in seen:
        messages = frames.FrameReader().feed(first.removeprefix(frames.PREFACE))
        found += [message for message, _ in messages if message["t"] == "hello"]
    return found


def test_every_join_of_a_warm_rank_has_a_nonce_of_its_own(
    warm: object, functions: Functions, payload: Json, server: str
) -> None:
    with eavesdropper(server) as (address, seen):
        for _ in range(3):
            plan = functions.init.invoke(payload)
            answers = functions.infer(plan, 0, {3: {"rendezvous_endpoint": address}})
            assert not [answer for answer in answers if "errorType" in answer], answers
    said = hellos(seen)
    assert [(hello["job"], hello["rank"]) for hello in said] == [(RUN, 3)] * 3
    assert len({hello["nonce"] for hello in said}) == 3
    assert not entries(functions.ranks[3], "infer: done")[-1]["cold_start"]


def test_a_model_in_s3_is_fetched_once_and_again_when_it_changes(
    bucket: Path, folder: Path, payload: Json
) -> None:
    """One rank, without a job."""
    s3.close()  # of another test's server
    url = "s3://bucket/models/m.safetensors"
    storage.write(url, DEMO_MODEL.read_bytes())
    own = ("data", "results", "batch_size", "threads")
    event = {name: payload[name] for name in own} | {"world_size": 1, "model": url}
    task = handlers.init(event)["ranks"][0]
    with instance(f"{HANDLERS}.infer", folder / "alone") as place:
        first, again = place.invoke(task), place.invoke(task)
        save_model(trained(SMALL, seed=3), folder / "other.safetensors")
        storage.write(url, (folder / "other.safetensors").read_bytes())
        other = place.invoke(task)
        said = [line["message"] for line in entries(place, "model: ")]
        kept = list(place.folder.glob("cosmic-model-*"))
    s3.close()
    assert first["MAE"] == again["MAE"] != other["MAE"], (first, again, other)
    assert [text.partition(":")[0] + text.partition(":")[2][:12] for text in said] == [
        "model loaded into",
        "model the loaded ",
        "model loaded into",
    ]
    assert len(kept) == 1


def test_a_rank_that_runs_short_of_time_says_so_and_ends_the_job(
    folder: Path, server: str, payload: Json
) -> None:
    seconds, run = 12, "too-short"
    sparse_pt(folder / "long.pt", 500_000)  # minutes of work
    names = ("results", "rendezvous_endpoint", "threads")
    event = {name: payload[name] for name in names} | {"run": run, "engine": "onnx"}
    plan = handlers.init({**event, "data": str(folder / "long.pt"), "world_size": 2})
    plan["ranks"][0]["shard"] = []  # waits for the other one
    env = {"FMI_KEY": KEY, "FMI_TOKEN": token(run, 2)}
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        places = [
            stack.enter_context(instance(f"{HANDLERS}.infer", folder / f"{run}-{n}", env, **limits))
            for n, limits in enumerate(({}, {"seconds": seconds}))
        ]
        waiting, short = pool.map(Instance.invoke, places, plan["ranks"])
        moments = [moment(entries(place, "infer: failed")[-1]) for place in places]
    assert short["errorType"] == "DeadlineError", short
    assert short["errorMessage"].startswith("rank 1 has only "), short
    assert "(stage infer)" in short["errorMessage"], short
    assert waiting["errorType"] == "Aborted", waiting
    assert "rank 1" in waiting["errorMessage"]
    assert moments[0] - moments[1] < 1.0
    verdict = handlers.blame({**plan, "epoch": 0})
    assert (verdict["rank"], verdict["error"]) == (1, "DeadlineError")


def test_no_secret_reaches_a_log(warm: object, functions: Functions) -> None:
    """The last test: what went well and what failed has been logged."""
    places = [functions.init, functions.summarize, functions.blame, *functions.ranks]
    said = [place.everything() for place in places]
    assert all(": done" in text and "INIT START" in text for text in said)
    for secret in (SECRET, KEY, TOKEN.rpartition(".")[2]):
        assert not [text for text in said if secret in text]
