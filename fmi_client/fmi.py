"""A drop-in for the Python module ``fmi`` of the C++ FMI library, on our ranks and channels.

Change the import:

    import fmi_client.fmi as fmi

    comm = fmi.Communicator(rank, size, "fmi.json", "job name", 512)
    comm.hint(fmi.hints.fast)
    total = comm.allreduce(3, fmi.func(fmi.op.sum), fmi.types(fmi.datatypes.int))

or change nothing: ``python -m fmi_client.fmi script.py ARGUMENTS``, or ``fmi_client.fmi.alias()``
before the code that says ``import fmi``. docs/from-fmi.md lists what is different.

Tokens and keys come from FMI_TOKEN and FMI_KEY, as everywhere.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 (before `_leave_all` is registered)
import enum
import operator
import os
import sys
import threading
import weakref
from array import array as machine_array
from collections.abc import Callable, Sequence
from functools import reduce as fold
from functools import wraps
from os import PathLike
from reprlib import repr as short
from types import ModuleType
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from fmi_client import fmi_config, ops, sync
from fmi_client.hints import Choice
from fmi_client.payloads import Array

__all__ = ["Communicator", "alias", "datatypes", "func", "hints", "op", "types"]

JOIN_SECONDS = 30.0
"""Ranks start at different moments: to join they have so long, or `max_timeout` if that is more."""

SLOW_BYTES = 10e6
"""Lists have a second more for each so many bytes: the library's `max_timeout` is for a pause in a
transfer, ours for a whole operation."""


class hints(enum.Enum):
    """What the channel is chosen for: predicted seconds, or predicted US dollars."""

    fast = "fast"
    cheap = "cheap"


class datatypes(enum.Enum):
    """What is sent. Integers have 64 bits."""

    int = "int"
    double = "double"
    int_list = "int_list"
    double_list = "double_list"


class op(enum.Enum):
    """What a reduction combines with."""

    sum = "sum"
    prod = "prod"
    max = "max"
    min = "min"
    custom = "custom"


_Kind = op  # where an argument has the name
_OPS = {op.sum: ops.SUM, op.prod: ops.PROD, op.max: ops.MAX, op.min: ops.MIN}

P = ParamSpec("P")
T = TypeVar("T")


class types:
    """The type of what is sent.

    Args:
        type: one of `datatypes`.
        num_objects: how many numbers a list has; None: as many as it has.

    Raises:
        ValueError: there is no such type.
    """

    def __init__(self, type: datatypes, num_objects: int | None = None) -> None:
        self.type = datatypes(type)
        self.num_objects = None if num_objects is None else operator.index(num_objects)
        self.is_list = self.type in (datatypes.int_list, datatypes.double_list)
        self.code = "q" if self.type in (datatypes.int, datatypes.int_list) else "d"
        """Of 64 bits, in the language of the modules array and struct."""

    def __repr__(self) -> str:
        many = "" if self.num_objects is None else f", {self.num_objects}"
        return f"types({self.type.name}{many})"

    def array(self, value: Any) -> Array:
        """Return a copy of a value as array of 64-bit numbers, of no dimension for a single one.

        Raises:
            TypeError: it is not of this type; a float is no int.
            ValueError: a list has another length.
            OverflowError: an int needs more than 64 bits.
        """
        if self.is_list and not (isinstance(value, Sequence) or hasattr(value, "__array__")):
            raise TypeError(f"{short(value)} is not {self!r}, a list")
        try:
            copy = numbers(value if self.is_list else [value], self.code)
        except (TypeError, OverflowError) as error:
            raise type(error)(f"{short(value)} is not {self!r}: {error}") from None
        self._check_length(copy, "a list of")
        return copy if self.is_list else copy.reshape(())

    def value(self, array: Any, sender: int) -> Any:
        """Return what came as a number or list, checked: it may have been sent as another type.

        Args:
            array: what came.
            sender: the rank it came from, for errors.

        Raises:
            TypeError: it is not of this type.
            ValueError: a list has another length.
        """
        same = isinstance(array, np.ndarray | np.generic) and array.dtype == np.dtype(self.code)
        if not same or array.ndim != self.is_list:
            raise TypeError(f"rank {sender} sent {short(array)}: that is not {self!r}")
        self._check_length(array, f"rank {sender} sent a list of")
        return array.tolist()

    def _check_length(self, array: Any, what: str) -> None:
        if self.is_list and self.num_objects not in (None, len(array)):
            raise ValueError(f"{what} {len(array)}: that is not {self!r}")


def numbers(values: Any, code: str) -> Array:
    """Convert without loss: no float to int, and no text to a number."""
    return np.array(machine_array(code, list(values)))


class func:
    """What a reduction combines with.

    Args:
        op: one of `op`.
        function: of two numbers, for ``op.custom`` only; gets those of the lower ranks on the left.
        commutative: whether the order of ranks may be changed.
        associative: whether partial results may be combined. If not, the values are combined one
            after the other in rank order, which takes more messages.
    """

    def __init__(
        self,
        op: op,
        function: Callable[[Any, Any], Any] | None = None,
        commutative: bool = False,
        associative: bool = False,
    ) -> None:
        standard = _OPS.get(_Kind(op))
        self.op = standard or _custom(function, commutative)
        self.in_order = standard is None and not associative


def _custom(function: Callable[[Any, Any], Any] | None, commutative: bool) -> ops.Op:
    """Return the operation that applies a function of two numbers to each pair in two arrays."""
    if function is None:
        raise TypeError("fmi.func: fmi.op.custom needs a function of two numbers")

    def combine(left: Array, right: Array, out: Array) -> None:
        pairs = zip(left.ravel().tolist(), right.ravel().tolist(), strict=True)
        results = [function(a, b) for a, b in pairs]
        try:
            out[...] = numbers(results, out.dtype.char).reshape(out.shape)
        except (TypeError, OverflowError) as error:
            raise type(error)(f"the function returned {short(results)}: {error}") from None

    # One name for all: ranks may each have their own lambda.
    return ops.Op("custom:fmi", function, combine, commutative)


def _placed(
    operation: Callable[Concatenate[Communicator, P], T],
) -> Callable[Concatenate[Communicator, P], T]:
    """Name rank and operation in what is raised about arguments, as `FmiError` does."""

    @wraps(operation)
    def placed(self: Communicator, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            if any(isinstance(each, datatypes | _Kind) for each in args):
                raise TypeError("say fmi.types(fmi.datatypes.…) or fmi.func(fmi.op.…)")
            return operation(self, *args, **kwargs)
        except (TypeError, ValueError, OverflowError) as error:
            error.args = (f"[rank {self._rank}, {operation.__name__}] {error}",)
            raise

    return placed


class Communicator:
    """The ranks of a job. All must be there for the first operation, which joins it.

    Every operation raises `fmi_client.FmiError` when it fails, on all ranks, and then the job is
    over; it never changes what it was given. A value that is not of the type that is said raises
    TypeError, ValueError or OverflowError before anything is sent. Garbage collection, the end of
    the process and `close` leave the job.

    Args:
        peer_id: rank of this process, from 0.
        num_peers: number of ranks.
        config_path: the library's JSON configuration.
        comm_name: name of the job; jobs that run at the same time need different ones.
        faas_memory: MB that each rank's function is given, for the prediction of prices.

    Raises:
        OSError: the configuration cannot be read.
        ValueError: it is malformed or allows no channel; or there is no such rank.
    """

    def __init__(
        self,
        peer_id: int,
        num_peers: int,
        config_path: str | PathLike[str],
        comm_name: str,
        faas_memory: int = 128,
    ) -> None:
        self._rank, self._size = operator.index(peer_id), operator.index(num_peers)
        self._check_rank("peer_id", self._rank)
        self._settings = fmi_config.read(config_path)
        self._job, self._memory_mb = comm_name, faas_memory
        self._joined: dict[str, sync.Communicator] = {}
        self._leave = weakref.finalize(self, _leave, self._joined, os.getpid())
        if threading.current_thread() is threading.main_thread():
            _of_main_thread.add(self)
        self.hint(hints.cheap)  # as theirs

    def hint(self, hint: hints) -> None:
        """Choose the channel of the operations that follow; all ranks must give the same hint."""
        self._choice = self._settings.choose(hints(hint).value, self._size, self._memory_mb)

    @property
    def choice(self) -> Choice:
        """The channel that the hint chose, and the predictions; ``print`` shows them as a table."""
        return self._choice

    def close(self) -> None:
        """Leave the job in order. Nothing can be done after it."""
        self._leave()

    # ---------------------------------------------------------------- point to point
    @_placed
    def send(self, obj: Any, dst: int, type: types) -> None:
        """Send a number or list to rank `dst`.

        Args:
            obj: a number, or for a list type a sequence or array of numbers.
            dst: rank of the receiver.
            type: what it is sent as.
        """
        mine = type.array(obj)  # what is wrong is said before waiting for the others
        self._comm(type, dst=dst).send(mine, dst)

    @_placed
    def recv(self, src: int, type: types) -> Any:
        """Return what rank `src` sent, in the order of sending.

        Args:
            src: rank of the sender.
            type: what must come; TypeError if something else does.
        """
        return type.value(self._comm(type, src=src).recv(src), src)

    # ------------------------------------------------------------------- collectives
    @_placed
    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self._comm().barrier()

    @_placed
    def bcast(self, obj: Any, root: int, type: types) -> Any:
        """Return the root's number or list on every rank; the others' is ignored."""
        mine = type.array(obj) if root == self._rank else None
        return type.value(self._comm(type, root=root).bcast(mine, root), root)

    @_placed
    def gather(self, obj: Any, root: int, type: types) -> list[Any]:
        """Return everybody's numbers in one list, in rank order, at the root; [] elsewhere."""
        mine = type.array(obj)
        parts = self._comm(type, root=root).gather(mine, root) or []
        values = _checked(parts, type)
        return [x for value in values for x in (value if type.is_list else [value])]

    @_placed
    def scatter(self, objs: Any, root: int, type: types) -> list[Any]:
        """Return part `rank` of `size` equal parts of the root's list, on every rank.

        Args:
            objs: the list, at the root; ignored elsewhere.
            root: rank whose list it is.
            type: that of the whole list.

        Raises:
            TypeError: it is no list type.
            ValueError: the length is no multiple of `size`.
        """
        if not type.is_list:
            raise TypeError(f"scatter takes a list, not {type!r}")
        each = None if type.num_objects is None else self._share(type.num_objects)
        parts: list[Array] | None = None
        if root == self._rank:
            whole = type.array(objs)
            self._share(len(whole))
            parts = np.split(whole, self._size)
        mine = self._comm(type, root=root).scatter(parts, root)
        part: list[Any] = types(type.type, each).value(mine, root)
        return part

    def _share(self, length: int) -> int:
        if length % self._size:
            raise ValueError(f"a list of {length} has no {self._size} equal parts")
        return length // self._size

    # -------------------------------------------------------------------- reductions
    @_placed
    def reduce(self, obj: Any, root: int, f: func, type: types) -> Any:
        """Return the combination of everybody's number or list at the root; None elsewhere.

        Lists are combined element by element; the ranks' must be of one length.
        """
        mine, comm = type.array(obj), self._comm(type, root=root)
        if f.in_order:
            parts = comm.gather(mine, root)
            return None if parts is None else _fold(parts, f, type)
        total = comm.reduce(mine, f.op, root)
        return None if total is None else total.tolist()

    @_placed
    def allreduce(self, obj: Any, f: func, type: types) -> Any:
        """Return the combination of everybody's number or list, on every rank."""
        mine, comm = type.array(obj), self._comm(type)
        if f.in_order:
            return _fold(comm.allgather(mine), f, type)
        return comm.allreduce(mine, f.op).tolist()

    @_placed
    def scan(self, obj: Any, f: func, type: types) -> Any:
        """Return the combination of the numbers or lists of ranks 0 … `rank`."""
        mine, comm = type.array(obj), self._comm(type)
        if f.in_order:
            return _fold(comm.allgather(mine)[: self._rank + 1], f, type)
        return comm.scan(mine, f.op).tolist()

    # ------------------------------------------------------------------------ joining
    def _comm(self, type: types | None = None, **ranks: int) -> sync.Communicator:
        """Return the communicator of the chosen channel; the first operation on it joins."""
        for name, rank in ranks.items():
            self._check_rank(name, rank)
        if not self._leave.alive:
            raise ValueError("this communicator is closed: make another")
        channel = self._choice.channel
        if channel not in self._joined:
            self._joined[channel] = self._join(channel)
        comm, objects = self._joined[channel], (type and type.num_objects) or 0
        comm.timeout = self._settings.timeouts[channel] + self._size * 8 * objects / SLOW_BYTES
        return comm

    def _join(self, channel: str) -> sync.Communicator:
        return sync.connect(
            self._settings.server,
            store=self._settings.store,
            channel=self._choice,
            job=self._job,
            rank=self._rank,
            size=self._size,
            timeout=max(self._settings.timeouts[channel], JOIN_SECONDS),
        )

    def _check_rank(self, name: str, rank: int) -> None:
        if not 0 <= operator.index(rank) < self._size:
            raise ValueError(f"{name}={rank} is not a rank of {self._size}: 0 … {self._size - 1}")


def _checked(parts: Sequence[Any], type: types) -> list[Any]:
    """Return what all ranks sent, in rank order, as numbers or lists of one length."""
    values = [type.value(part, rank) for rank, part in enumerate(parts)]
    lengths = [np.size(part) for part in parts]
    if len(set(lengths)) > 1:
        raise ValueError(f"the ranks' lists have different lengths: {short(lengths)}")
    return values


def _fold(parts: Sequence[Any], f: func, type: types) -> Any:
    """Combine from left to right."""
    _checked(parts, type)

    def combine(left: Array, right: Array) -> Array:
        out = np.empty_like(left)
        f.op.array(left, right, out)
        return out

    return fold(combine, map(np.asarray, parts)).tolist()


def _leave(joined: dict[str, sync.Communicator], pid: int) -> None:
    """Leave, but not when a child that was forked ends: it has the same sockets."""
    while joined and os.getpid() == pid:
        joined.popitem()[1].close()


_of_main_thread: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _leave_all() -> None:
    """Leave when the main thread ends; others may go on, and leave when they let go."""
    for communicator in list(_of_main_thread):
        communicator.close()


# Leaving through a store needs threads that concurrent.futures ends before `atexit` calls anybody.
# For that it is in this list of threading's itself, of which the last comes first.
getattr(threading, "_register_atexit", atexit.register)(_leave_all)


def alias() -> None:
    """Let ``import fmi`` and ``from fmilib.fmi_operations import …`` find ours in this process.

    Call it before them: what is imported already stays.
    """
    from fmi_client import fmi, fmi_operations

    fmilib = ModuleType("fmilib", "The astronomy code's wrapper, on fmi_client.")
    fmilib.fmi_operations = fmi_operations  # type: ignore[attr-defined]
    sys.modules["fmi"] = fmi
    sys.modules["fmilib"] = fmilib
    sys.modules["fmilib.fmi_operations"] = fmi_operations


def main() -> None:
    """Run a script that imports ``fmi``, with ours in its place."""
    import runpy
    from pathlib import Path

    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m fmi_client.fmi SCRIPT.py [ARGUMENT ...]")
    alias()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as `python SCRIPT.py` would
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
