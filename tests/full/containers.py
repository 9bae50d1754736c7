"""The project's images, built on `base:python` (.ci/docker makes it), and containers of them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import docker
import docker.errors
from docker.models.containers import Container
from docker.models.networks import Network

from tests.full.rie import INVOKE, emulator
from tests.support import in_thread, wait_for

ROOT = Path(__file__).parents[2]
BASE = "base:python"
BASE_PYTHON = "3.11"
TORCH = "2.13.0+cpu"
START_SECONDS = 60.0


@cache
def client() -> docker.DockerClient:
    """The engine; on a busy machine a step of a build may be silent for minutes."""
    return docker.from_env(timeout=600)


@cache
def missing() -> str | None:
    """What stands in the way of the images' tests, in one line; None: nothing."""
    return no_base() or (None if emulator() else "no aws-lambda-rie: `make tools` brings it")


def no_base() -> str | None:
    """What stands in the way of containers, in one line; None: nothing."""
    try:
        client().images.get(BASE)
    except docker.errors.ImageNotFound:
        return f"no image {BASE}: .ci/docker makes it, as root"
    except docker.errors.DockerException:
        return "no Docker engine answers: .ci/docker starts one, as root"
    return None


# -- images --------------------------------------------------------------------------------------


def build_server(tag: str, base: str = BASE) -> None:
    """Build the rendezvous server's image."""
    _build(tag, "Dockerfile", {"PYTHON_IMAGE": base})


def build_worker(tag: str, engine: str = "onnx", base: str = BASE) -> None:
    """Build the image of the Lambda functions.

    Args:
        tag: what to call it.
        engine: "onnx" takes half a minute, "torch" twice that.
        base: the image to build on.
    """
    arguments = {"PYTHON_IMAGE": base, "ENGINE": engine}
    with torch_index() if engine == "torch" else contextlib.nullcontext() as index:
        arguments |= {"TORCH_INDEX": index} if index else {}
        _build(tag, "deploy/worker.Dockerfile", arguments)


def add_emulator(tag: str, worker: str) -> None:
    """Derive from `worker` an image that answers invocations on port 8080, outside AWS, too."""
    rie = emulator()
    assert rie is not None, "make tools was not run"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(rie, Path(folder, "aws-lambda-rie"))
        recipe = f"FROM {worker}\nCOPY aws-lambda-rie /usr/local/bin/\n"
        Path(folder, "Dockerfile").write_text(recipe)
        client().images.build(path=folder, tag=tag, rm=True)


def remove(tag: str) -> None:
    """Remove an image, if it is there; what its stages have left stays in the engine's cache."""
    with contextlib.suppress(docker.errors.ImageNotFound):
        client().images.remove(tag, force=True)


def forget() -> None:
    """Remove what the builds of this process have left in the engine's cache."""
    images = client().images
    while _steps:
        # A step that others' images rest on is in use, and one below it goes with it.
        with contextlib.suppress(docker.errors.APIError):
            images.remove(_steps.pop())


_steps: list[str] = []


def _build(tag: str, dockerfile: str, arguments: dict[str, str]) -> None:
    # On the host's network: what packages come from may be reachable from there only.
    options = {"network_mode": "host", "rm": True, "forcerm": True, "buildargs": arguments}
    _, log = client().images.build(path=str(ROOT), dockerfile=dockerfile, tag=tag, **options)
    base = client().images.get(arguments["PYTHON_IMAGE"]).id
    text = "".join(entry.get("stream", "") for entry in log)
    steps = re.findall(r"^ ---> ([0-9a-f]{12})$", text, re.MULTILINE)
    _steps.extend(step for step in steps if step not in base)


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def torch_index() -> Iterator[str | None]:
    """An index of packages with the torch wheel that pip finds on this machine; None: none."""
    with tempfile.TemporaryDirectory() as folder:
        where = ("--no-deps", "--only-binary=:all:", f"--python-version={BASE_PYTHON}", "--dest")
        command = [sys.executable, "-m", "pip", "download", "-q", *where, f"{folder}/torch"]
        command.append(f"torch=={TORCH}")
        if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            yield None
            return
        handler = partial(_Silent, directory=folder)
        with in_thread(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
            yield f"http://127.0.0.1:{server.server_port}"


# -- containers ----------------------------------------------------------------------------------


class Play:
    """Containers and networks of one test; they go when it ends, however it ends."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def network(self) -> Network:
        """A network of its own; from it nothing else can be reached."""
        made = client().networks.create(f"cosmic-{uuid.uuid4().hex[:12]}", internal=True)
        self._stack.callback(made.remove)
        return made

    def start(
        self, image: str, *command: str, on: tuple[Network, ...], name: str = "", **options: Any
    ) -> Container:
        """Start a container with a read-only root file system.

        Args:
            image: its tag.
            command: overrides the image's own.
            on: the networks that it is attached to.
            name: what it is called there; "": nothing.
            options: as `docker.containers.create` takes them.
        """
        defaults = {"read_only": True, "tmpfs": {"/tmp": "mode=1777"}, "network": on[0].name}
        made = client().containers.create(image, command or None, **defaults | options)
        self._stack.callback(made.remove, force=True, v=True)
        on[0].disconnect(made)  # `create` takes no other name for it
        for network in on:
            network.connect(made, aliases=[name] if name else None)
        made.start()
        made.reload()
        return made


def address(container: Container) -> str:
    """Its address, on its first network."""
    networks = container.attrs["NetworkSettings"]["Networks"].values()
    return next(str(network["IPAddress"]) for network in networks)


def said(container: Container) -> list[dict[str, Any]]:
    """The lines of JSON that it has written."""
    lines = container.logs().decode().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def until(condition: Callable[[], Any], what: str, *watched: Container) -> Any:
    """Wait until `condition()`, and return what it gives; else tell what the containers said."""
    try:
        return wait_for(condition, what, START_SECONDS)
    except AssertionError as error:
        for container in watched:
            error.add_note(container.logs(tail=20).decode())
        raise


def invoke(function: Container, event: object) -> Any:
    """A function's answer, or the error object that AWS Lambda makes of its exception."""
    url = f"http://{address(function)}:8080/{INVOKE}"
    request = urllib.request.Request(url, json.dumps(event).encode())

    def answer() -> list[bytes]:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return [response.read()]
        except ConnectionError:
            return []
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionRefusedError):
                return []
            raise

    return json.loads(until(answer, "an answer", function)[0])
