"""The images, built once for all tests that run containers; the browser (browser.py)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests.full import containers
from tests.full.browser import complaints, page, phone

__all__ = ["complaints", "engine", "images", "page", "phone", "play"]


class Images(NamedTuple):
    """Tags; `function` is the worker with the emulator in it."""

    server: str
    worker: str
    function: str


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    """A Docker engine with the base image; afterwards nothing of our builds is left in it."""
    if why := containers.missing():
        pytest.skip(why)
    yield
    containers.forget()


@pytest.fixture(scope="session")
def images(engine: None) -> Iterator[Images]:
    """The server, and the worker with ONNX Runtime."""
    made = Images(*(f"cosmic-test-{uuid.uuid4().hex[:12]}" for _ in Images._fields))
    with ExitStack() as stack:
        for tag in made:
            stack.callback(containers.remove, tag)
        containers.build_server(made.server)
        containers.build_worker(made.worker)
        containers.add_emulator(made.function, made.worker)
        yield made


@pytest.fixture
def play(engine: None) -> Iterator[containers.Play]:
    """What starts containers, and ends them with the test."""
    with ExitStack() as stack:
        yield containers.Play(stack)
