"""Both images on a Docker engine: what is in them, a whole job, a death, and a drain."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from docker.models.containers import Container
from docker.models.networks import Network
from torch.utils.data import TensorDataset

import fmi_client
from lambda_worker import handlers
from tests.full import containers
from tests.full.conftest import Images
from tests.full.containers import Play, address, client, invoke, said, until
from tests.worker.worker_data import tensors

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

SECRET = "0123456789abcdef" * 2
KEY = bytes(range(32)).hex()
SERVER_MEGABYTES = 45
NOTICE_SECONDS = 1.0

DRAIN_SECONDS = 10
SECOND = 1_000_000_000
LAMBDA: dict[str, Any] = {"ipc_mode": "none", "user": "993:990", "mem_limit": "2g"}
"""What functions have on AWS: no /dev/shm, and a user that no image knows."""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that containers read and write, whoever they are."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "secret").write_text(SECRET)
    return folder


class Job:
    """A server, and ranks on two networks that cannot reach each other."""

    def __init__(self, play: Play, images: Images, shared: Path) -> None:
        self.play, self.images, self.shared = play, images, shared
        self.networks = (play.network(), play.network())
        self.server = play.start(
            *(images.server, "--secret-file", "/shared/secret"),
            on=self.networks,
            name="server",
            volumes={str(shared): {"bind": "/shared", "mode": "ro"}},
            healthcheck={"interval": SECOND // 5},
        )
        until(self.healthy, "the server's health", self.server)

    def healthy(self) -> bool:
        self.server.reload()
        return bool(self.server.attrs["State"]["Health"]["Status"] == "healthy")

    def environment(self, job: str, size: int) -> dict[str, str]:
        expires = int(time.time()) + 600
        token = fmi_client.make_token(SECRET, job=job, size=size, expires=expires)
        return {"FMI_KEY": KEY, "FMI_TOKEN": token}

    def rank(self, job: str, rank: int, size: int, network: Network) -> Container:
        """A rank that meets the others until the file `stop` is there."""
        script = Path(__file__).with_name("container_rank.py")
        return self.play.start(
            *(self.images.worker, "/rank.py", job, str(rank), str(size), "/shared/stop"),
            on=(network,),
            entrypoint=["/opt/worker/bin/python"],
            environment=self.environment(job, size),
            volumes={
                str(self.shared): {"bind": "/shared", "mode": "ro"},
                str(script): {"bind": "/rank.py", "mode": "ro"},
            },
        )

    def function(self, handler: str, network: Network, environment: dict[str, str]) -> Container:
        return self.play.start(
            *(self.images.function, f"lambda_worker.handlers.{handler}"),
            on=(network,),
            environment=environment,
            volumes={str(self.shared): {"bind": "/shared", "mode": "rw"}},
            **LAMBDA,
        )

    def ready(self) -> int:
        """HTTP status of /readyz; 0: nobody answers."""
        url = f"http://{address(self.server)}:10001/readyz"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


@pytest.fixture
def job(play: Play, images: Images, shared: Path) -> Job:
    return Job(play, images, shared)


def meet(*ranks: Container) -> None:
    """Wait until ranks have met."""
    until(lambda: all(last(r)["says"] == "meets the others" for r in ranks), "a meeting", *ranks)


def last(rank: Container) -> dict[str, Any]:
    return (said(rank) or [{"says": "nothing"}])[-1]


def end(container: Container) -> int:
    return int(container.wait(timeout=60)["StatusCode"])


# -- what is in the images -----------------------------------------------------------------------

CONTENTS = """
import importlib.util, json, os, shutil
names = ("torch", "numpy", "boto3", "pip", "setuptools", "typer", "pydantic", "uvloop")
programs = ("cc", "gcc", "clang", "ld", "make", "pip")
print(json.dumps({
    "modules": [name for name in names if importlib.util.find_spec(name)],
    "programs": [name for name in programs if shutil.which(name)],
    "user": os.getuid(),
    "writable": [path for path in ("/", "/opt/server", "/tmp", "/etc") if os.access(path, os.W_OK)],
}))
"""


def test_the_server_is_small_and_has_nothing_that_it_does_not_need(
    play: Play, images: Images
) -> None:
    looked = play.start(
        *(images.server, "-c", CONTENTS),
        on=(play.network(),),
        entrypoint=["/opt/server/bin/python"],
        tmpfs={},
    )
    assert end(looked) == 0, looked.logs().decode()
    found = said(looked)[0]
    assert found["modules"] == ["uvloop"]
    assert found["programs"] == []
    assert found["user"] > 0
    assert found["writable"] == []
    server, base = (client().images.get(tag).attrs for tag in (images.server, containers.BASE))
    assert server["Config"]["User"] == "10000:10000"
    assert 0 < server["Size"] - base["Size"] <= SERVER_MEGABYTES * 1_000_000


@pytest.mark.parametrize("engine_name", ["onnx", "torch"])
def test_a_function_predicts_in_what_lambda_gives_it(
    engine_name: str, play: Play, images: Images, shared: Path, request: pytest.FixtureRequest
) -> None:
    image = images.function if engine_name == "onnx" else request.getfixturevalue("torch_function")
    write_data(shared, rows=40)
    task = {"rank": 0, "world_size": 1, "batch_size": 16, "shard": [["/shared/data.pt", 0, 40]]}
    task |= {"results": "/tmp/results", "run": "alone", "init_id": "1", "engine": engine_name}
    function = play.start(
        image,
        on=(play.network(),),
        volumes={str(shared): {"bind": "/shared", "mode": "ro"}},
        **LAMBDA,
    )
    record = invoke(function, task)
    assert record.get("rows") == 40, record
    assert record["MAE"] == pytest.approx(alone(shared, "torch")["MAE"], abs=1e-5)


def test_outside_lambda_a_worker_says_what_it_lacks(play: Play, images: Images) -> None:
    worker = play.start(images.worker, on=(play.network(),))
    assert end(worker) == 1
    assert b"outside AWS Lambda this image needs /usr/local/bin/aws-lambda-rie" in worker.logs()


@pytest.fixture(scope="module")
def torch_function(engine: None) -> Any:
    """The worker with torch, and the emulator."""
    tags = ("cosmic-test-torch", "cosmic-test-torch-function")
    try:
        containers.build_worker(tags[0], engine="torch")
        containers.add_emulator(tags[1], tags[0])
        yield tags[1]
    finally:
        for tag in reversed(tags):
            containers.remove(tag)


# -- a job -----------------------------------------------------------------------------------------


def write_data(shared: Path, rows: int) -> None:
    torch.save(TensorDataset(*tensors(rows)), shared / "data.pt")
    (shared / "results").mkdir(mode=0o777)
    (shared / "results").chmod(0o777)


def alone(shared: Path, engine: str) -> dict[str, Any]:
    """The same rows in this process, without any container."""
    plan = {"data": str(shared / "data.pt"), "results": str(shared / "alone"), "engine": engine}
    ready = handlers.init(plan | {"world_size": 1, "fmi_enabled": False})
    return handlers.infer(ready["ranks"][0])


def test_a_whole_job_over_two_networks(job: Job) -> None:
    write_data(job.shared, rows=203)
    environment = job.environment("job", 4)
    here, there = job.networks
    steps = [job.function(name, here, {}) for name in ("init", "summarize")]
    ranks = [job.function("infer", network, environment) for network in (here, here, there, there)]
    plan = invoke(
        steps[0],
        {
            "run": "job",
            "world_size": 4,
            "data": "/shared/data.pt",
            "results": "/shared/results",
            "engine": "onnx",
            "rendezvous_endpoint": "server:10000",
        },
    )
    assert "ranks" in plan, plan
    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(invoke, ranks, plan["ranks"]))
    assert [record.get("rows") for record in records] == [50, 51, 51, 51], records
    summary = invoke(steps[1], plan)["summary"]
    expected = alone(job.shared, "onnx")
    assert summary["metrics"]["mae"] == pytest.approx(expected["MAE"], abs=1e-6)
    # Rank by rank, so each link is counted at both ends: pairs of one network, and all others.
    assert summary["links"]["direct"] == 4
    assert summary["links"]["relay"] > 0
    table = np.load(job.shared / "results/job/predictions.npz")
    assert sorted(table["row"]) == list(range(203))


def test_when_a_rank_is_killed_all_others_name_it_at_once(job: Job) -> None:
    here, there = job.networks
    places = (here, there, here, there)
    ranks = [job.rank("deadly", number, 4, network) for number, network in enumerate(places)]
    meet(*ranks)
    ranks.pop(2).kill()
    killed = time.time()
    for rank in ranks:
        assert end(rank) == 1
        assert last(rank)["says"] == "RankFailed", rank.logs().decode()
        assert last(rank)["rank"] == 2
        assert "rank 2 was lost" in last(rank)["why"]  # by the server; links alone take longer
        assert last(rank)["at"] - killed < NOTICE_SECONDS


def test_a_server_that_is_stopped_sends_waiters_away_and_leaves_links_alone(job: Job) -> None:
    here, _ = job.networks
    linked = [job.rank("linked", number, 2, here) for number in range(2)]
    meet(*linked)
    waiting = job.rank("waiting", 0, 2, here)
    until(lambda: ["waiting", 0] in joined(job), "a rank that waits", waiting, job.server)
    assert job.ready() == 200
    stopper = threading.Thread(target=job.server.stop, kwargs={"timeout": DRAIN_SECONDS})
    stopper.start()
    try:
        until(lambda: job.ready() == 503, "a server that is not ready", job.server)
        assert end(waiting) == 1
        assert last(waiting)["says"] == "ServerDraining", waiting.logs().decode()
    finally:
        stopper.join()
    assert end(job.server) == 0  # later than that the engine would have killed it
    gone = time.time()
    (job.shared / "stop").touch()
    for rank in linked:
        assert end(rank) == 0, rank.logs().decode()
        assert last(rank)["says"] == "done"
        assert last(rank)["at"] > gone
        assert list(last(rank)["kinds"].values()) == ["direct"]


def joined(job: Job) -> list[list[Any]]:
    entries = [entry for entry in said(job.server) if entry["event"] == "joined"]
    return [[entry["job"], entry["rank"]] for entry in entries]


def test_everything_written_is_json(job: Job) -> None:
    job.server.stop(timeout=DRAIN_SECONDS)
    lines = job.server.logs().decode().splitlines()
    assert [json.loads(line)["event"] for line in lines][-1] == "stopped"
