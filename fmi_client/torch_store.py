"""A `torch.distributed` store among ranks none of which can accept connections.

Rank 0 holds the keys. The others ask it by messages, over the links that carry the collectives:
no port, no further server. It is for the few small values that process groups tell each other
when they are made, not for data.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

from fmi_client.background import Background
from fmi_client.communicator import Communicator
from fmi_client.endpoint import MAX_SECONDS
from fmi_client.errors import FmiError

CONTEXT = 0x73746F7265
"""The store's communicator ("store" in ASCII): its messages meet no others."""

ASK_TAG = 0

ANSWER_SECONDS = 10.0
"""How much longer than rank 0 waits for a key its answer may take."""


class Keys:
    """The values, and who waits for which; lives on one event loop."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._waiting: list[tuple[list[str], asyncio.Future[None]]] = []
        self._calls: dict[str, Callable[..., Any]] = {
            "set": self._put,
            "get": self._values.__getitem__,
            "check": self._check,
            "add": self._add,
            "compare_set": self._compare_set,
            "append": self._append,
            "delete_key": lambda key: self._values.pop(key, None) is not None,
            "num_keys": lambda: len(self._values),
        }

    async def ask(self, name: str, args: list[Any], seconds: float) -> Any:
        """Do one of a store's methods.

        Raises:
            TimeoutError: the keys did not come.
            LookupError, TypeError, ValueError: there is no such method or key, or wrong arguments.
        """
        if name == "wait":
            return await self._wait(args[0], seconds)
        if name == "get":
            await self._wait(args, seconds)
        result = self._calls[name](*args)
        self._wake()
        return result

    async def _wait(self, keys: list[str], seconds: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not all(isinstance(key, str) for key in keys):
            raise TypeError("a key is a string")  # and would stop all that wait, later
        place = keys, waiter
        self._waiting.append(place)
        self._wake()
        try:
            await asyncio.wait_for(waiter, seconds)
        except TimeoutError:
            missing = [key for key in keys if key not in self._values]
            raise TimeoutError(f"nobody set {', '.join(missing)} in {seconds:.3g} s") from None
        finally:
            self._waiting.remove(place)

    def _wake(self) -> None:
        for keys, waiter in self._waiting:
            if not waiter.done() and self._check(keys):
                waiter.set_result(None)

    def _check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def _put(self, key: str, value: bytes) -> None:
        self._values[key] = _must_be_bytes(value)

    def _add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, b"0")) + amount
        self._values[key] = str(total).encode()
        return total

    def _append(self, key: str, value: bytes) -> None:
        self._values[key] = self._values.get(key, b"") + _must_be_bytes(value)

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Set where the value is `expected`, or there is none and nothing was expected."""
        if self._values.get(key, b"") == expected:
            self._values[key] = _must_be_bytes(desired)
        return self._values.get(key, expected)


class FmiStore(Store):
    """A store whose values rank 0 keeps, for as long as it is in the job.

    Every method raises `torch.distributed.DistStoreError` where a key does not come in time, or
    rank 0 is gone.
    """

    def __init__(self, background: Background, timeout: timedelta) -> None:
        super().__init__()
        self._background = background
        self._seconds = timeout.total_seconds()
        size = background.comm.size
        self._comm = background.comm.part(range(size), CONTEXT)
        self._numbers = itertools.count(1)
        self._keys: Keys | None = None
        if self._comm.rank == 0:
            self._keys = Keys()
            for peer in range(1, size):
                background.submit(_server(self._comm, self._keys, peer))

    # ------------------------------------------------------------------- torch's names
    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", key, _bytes(value))

    def get(self, key: str) -> bytes:
        return bytes(self._ask("get", key))

    def add(self, key: str, value: int) -> int:
        return int(self._ask("add", key, value))

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", list(keys)))

    def compare_set(self, key: str, expected_value: Any, desired_value: Any) -> bytes:
        return bytes(self._ask("compare_set", key, _bytes(expected_value), _bytes(desired_value)))

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("append", key, _bytes(value))

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete_key", key))

    def num_keys(self) -> int:
        return int(self._ask("num_keys"))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def clone(self) -> FmiStore:
        return self  # its methods may be called from any thread

    def has_extended_api(self) -> bool:
        return True  # append, multi_get, multi_set

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._seconds)

    def set_timeout(self, timeout: timedelta) -> None:
        self._seconds = timeout.total_seconds()

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        seconds = self._seconds if timeout is None else timeout.total_seconds()
        self._ask("wait", list(keys), seconds=seconds)

    # -------------------------------------------------------------------------- asking
    def _ask(self, name: str, *args: Any, seconds: float | None = None) -> Any:
        seconds = self._seconds if seconds is None else seconds
        asked = self._submit(name, list(args), seconds)
        try:
            return asked.result()
        except (FmiError, LookupError, OSError, TypeError, ValueError) as error:
            what = f"rank {self._comm.rank}: store.{name}({', '.join(map(repr, args[:1]))})"
            raise DistStoreError(f"{what}: {error}") from error

    def _submit(self, name: str, args: list[Any], seconds: float) -> Future[Any]:
        keys = self._keys
        if keys is not None:
            return self._background.submit(lambda: keys.ask(name, args, seconds))
        return self._background.submit(lambda: self._ask_rank_0(name, args, seconds))

    async def _ask_rank_0(self, name: str, args: list[Any], seconds: float) -> Any:
        number = next(self._numbers)
        limit = seconds + ANSWER_SECONDS
        await self._comm.send([number, name, args, seconds], 0, ASK_TAG, timeout=limit)
        problem, value = await self._comm.recv(0, number, timeout=limit)
        if problem is not None:
            raise TimeoutError(problem)
        return value


def _server(comm: Communicator, keys: Keys, peer: int) -> Callable[[], Any]:
    """Return what answers one rank until it has left."""

    async def serve() -> None:
        answers: set[asyncio.Task[None]] = set()
        with contextlib.suppress(FmiError):
            while True:
                question = await comm.recv(peer, ASK_TAG, timeout=MAX_SECONDS)
                task = asyncio.create_task(_answer(comm, keys, peer, question))
                answers.add(task)  # the loop itself keeps no task alive
                task.add_done_callback(answers.discard)

    return serve


async def _answer(comm: Communicator, keys: Keys, peer: int, question: Any) -> None:
    match question:
        case [int(number), str(name), list(args), int() | float() as seconds] if 0 < number < 2**63:
            pass
        case _:
            return  # no store asks like that, and nobody awaits an answer
    try:
        answer = [None, await keys.ask(name, args, seconds)]
    except (TimeoutError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        answer = [str(error), None]
    with contextlib.suppress(FmiError):
        await comm.send(answer, peer, number)


def _must_be_bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"a value is bytes, not {type(value).__name__}")
    return value


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
