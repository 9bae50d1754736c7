"""A drop-in for the Python module ``fmi`` of the C++ FMI library, on our ranks and channels.

Change the import::

    import fmi_client.fmi as fmi

    comm = fmi.Communicator(rank, size, "fmi.json", "job name", 512)
    comm.hint(fmi.hints.fast)
    total = comm.allreduce(3, fmi.func(fmi.op.sum), fmi.types(fmi.datatypes.int))

or change nothing: ``python -m fmi_client.fmi script.py ARGUMENTS``, or ``fmi_client.fmi.alias()``
before the code that says ``import fmi``. docs/from-fmi.md lists what is different.

Tokens and keys come from FMI_TOKEN and FMI_KEY, as everywhere.
"""

from __future__ import annotations

import contextlib
import enum
import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import reduce as fold
from os import PathLike
from types import ModuleType
from typing import Any

import numpy as np

from fmi_client import fmi_config, ops, sync
from fmi_client.errors import FmiError
from fmi_client.hints import Choice
from fmi_client.payloads import Array

__all__ = ["Communicator", "alias", "datatypes", "func", "hints", "op", "types"]

JOIN_SECONDS = 30.0
"""Ranks start at different moments: to join they have so long, or `max_timeout` if that is more."""


class hints(enum.Enum):
    """What the channel is chosen for."""

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


_OPS = {op.sum: ops.SUM, op.prod: ops.PROD, op.max: ops.MAX, op.min: ops.MIN}


class types:
    """The type of what is sent.

    Args:
        type: one of `datatypes`.
        num_objects: how many numbers a list has; None: as many as it has.
    """

    def __init__(self, type: datatypes, num_objects: int | None = None) -> None:
        self.type = datatypes(type)
        self.num_objects = None if num_objects is None else operator.index(num_objects)
        self.is_list = self.type in (datatypes.int_list, datatypes.double_list)
        whole = self.type in (datatypes.int, datatypes.int_list)
        self.dtype: np.dtype[Any] = np.dtype(np.int64 if whole else np.float64)

    def __repr__(self) -> str:
        many = "" if self.num_objects is None else f", {self.num_objects}"
        return f"types({self.type.name}{many})"

    def array(self, value: Any) -> Array:
        """Return a copy of a value as array, of no dimension for a single number.

        Raises:
            TypeError: it is not of this type; a float is no int.
            ValueError: a list has another length.
            OverflowError: an int needs more than 64 bits.
        """
        array = np.array(value)
        fits = array.dtype.kind in ("iub" if self.dtype.kind == "i" else "iubf")
        if (array.size and not fits) or array.ndim != self.is_list:
            raise self._error(TypeError, repr(value))
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise OverflowError(f"{value!r} needs more than 64 bits")
        array = array.astype(self.dtype)
        self._check_length(array)
        return array

    def value(self, array: Any, sender: str) -> Any:
        """Return what came as a number or list, checked: it may have been sent as another type."""
        if not isinstance(array, np.ndarray | np.generic) or array.dtype != self.dtype:
            raise self._error(TypeError, f"what {sender} sent ({array!r})")
        if array.ndim != self.is_list:
            raise self._error(TypeError, f"what {sender} sent ({array!r})")
        self._check_length(array)
        return array.tolist()

    def _check_length(self, array: Any) -> None:
        if self.is_list and self.num_objects not in (None, len(array)):
            raise self._error(ValueError, f"a list of {len(array)}")

    def _error(self, kind: type[Exception], what: str) -> Exception:
        return kind(f"{what} is not {self!r}")


class func:
    """What a reduction combines with.

    Args:
        op: one of `op`.
        function: of two numbers, for ``op.custom``; gets those of the lower ranks on the left.
        commutative: whether the order of ranks may be changed.
        associative: whether partial results may be combined. If not, the values are combined one
            after the other in rank order, which takes more messages.
    """

    def __init__(
        self,
        op: op,
        function: Callable[[Any, Any], Any] | None = None,
        commutative: bool = True,
        associative: bool = True,
    ) -> None:
        if (op in _OPS) == (function is not None):
            raise TypeError("op.custom needs a function, and nothing else takes one")
        # One name for all: ranks may each have their own lambda.
        self.op = _OPS.get(op) or ops.Op(
            "custom", function or min, _elementwise(function or min), commutative and associative
        )
        self.in_order = not associative


def _elementwise(function: Callable[[Any, Any], Any]) -> Callable[[Array, Array, Array], object]:
    """Return a function of arrays of one that takes two numbers."""

    def combine(left: Array, right: Array, out: Array) -> None:
        pairs = zip(left.ravel().tolist(), right.ravel().tolist(), strict=True)
        results = [function(a, b) for a, b in pairs]
        if out.dtype.kind == "i":
            results = [operator.index(result) for result in results]
        out[...] = np.array(results, out.dtype).reshape(out.shape)

    return combine


class Communicator:
    """The ranks of a job. All must be there for the first operation, which joins it.

    Every operation raises `fmi_client.FmiError` when it fails, on all ranks, and it never changes
    what it was given. Garbage collection, the end of the process and `close` leave the job.

    Args:
        peer_id: rank of this process, from 0.
        num_peers: number of ranks.
        config_path: the library's JSON configuration.
        comm_name: name of the job; jobs that run at the same time need different ones.
        faas_memory: MB that each rank's function is given, for the prediction of prices.

    Raises:
        OSError, ValueError: as `fmi_config.read`.
    """

    def __init__(
        self,
        peer_id: int,
        num_peers: int,
        config_path: str | PathLike[str],
        comm_name: str,
        faas_memory: int = 128,
    ) -> None:
        self._settings = fmi_config.read(config_path)
        self._rank, self._size = operator.index(peer_id), operator.index(num_peers)
        self._job, self._memory_mb = str(comm_name), faas_memory
        self._joined: dict[str, sync.Communicator] = {}
        self._leave = weakref.finalize(self, _leave, self._joined)
        self.hint(hints.fast)

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
    def send(self, obj: Any, dst: int, type: types) -> None:
        """Send a number or list to rank `dst`."""
        array = type.array(obj)  # what is wrong is said before waiting for the others
        self._comm().send(array, dst)

    def recv(self, src: int, type: types) -> Any:
        """Return what rank `src` sent, in the order of sending."""
        return type.value(self._comm().recv(src), f"rank {src}")

    # ------------------------------------------------------------------- collectives
    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self._comm().barrier()

    def bcast(self, obj: Any, root: int, type: types) -> Any:
        """Return the root's number or list on every rank; the others' is ignored."""
        mine = type.array(obj) if root == self._rank else None
        return type.value(self._comm().bcast(mine, root), f"rank {root}")

    def gather(self, obj: Any, root: int, type: types) -> list[Any]:
        """Return everybody's numbers in one list, in rank order, at the root; [] elsewhere."""
        mine = type.array(obj)
        parts = self._comm().gather(mine, root) or []
        values = [type.value(part, f"rank {rank}") for rank, part in enumerate(parts)]
        if any(len(part) != mine.size for part in map(np.atleast_1d, parts)):
            raise ValueError("gather: the ranks' lists have different lengths")
        return [x for value in values for x in (value if type.is_list else [value])]

    def scatter(self, objs: Any, root: int, type: types) -> list[Any]:
        """Return part `rank` of `size` equal parts of the root's list, on every rank.

        Args:
            objs: the list, at the root; ignored elsewhere.
            type: that of the whole list.
        """
        if not type.is_list:
            raise TypeError(f"scatter takes a list, not {type!r}")
        if type.num_objects is not None and type.num_objects % self._size:
            raise self._uneven(type.num_objects)
        parts: list[Array] | None = None
        if root == self._rank:
            whole = type.array(objs)
            if len(whole) % self._size:
                raise self._uneven(len(whole))
            parts = np.split(whole, self._size)
        length = None if type.num_objects is None else type.num_objects // self._size
        part: list[Any] = types(type.type, length).value(
            self._comm().scatter(parts, root), f"rank {root}"
        )
        return part

    def _uneven(self, length: int) -> ValueError:
        return ValueError(f"a list of {length} has no {self._size} equal parts")

    # -------------------------------------------------------------------- reductions
    def reduce(self, obj: Any, root: int, f: func, type: types) -> Any:
        """Return the combination of everybody's number or list at the root; None elsewhere.

        Lists are combined element by element.
        """
        mine, comm = type.array(obj), self._comm()
        if f.in_order:
            parts = comm.gather(mine, root)
            return None if parts is None else self._fold(parts, f, type)
        total = comm.reduce(mine, f.op, root)
        return None if total is None else total.tolist()

    def allreduce(self, obj: Any, f: func, type: types) -> Any:
        """Return the combination of everybody's number or list, on every rank."""
        mine, comm = type.array(obj), self._comm()
        if f.in_order:
            return self._fold(comm.allgather(mine), f, type)
        return comm.allreduce(mine, f.op).tolist()

    def scan(self, obj: Any, f: func, type: types) -> Any:
        """Return the combination of the numbers or lists of ranks 0 … `rank`."""
        mine, comm = type.array(obj), self._comm()
        if f.in_order:
            return self._fold(comm.allgather(mine)[: self._rank + 1], f, type)
        return comm.scan(mine, f.op).tolist()

    def _fold(self, parts: Sequence[Any], f: func, type: types) -> Any:
        """Combine from left to right; the whole list is checked, as a reduction does."""
        for rank, part in enumerate(parts):
            type.value(part, f"rank {rank}")
        if len({np.shape(part) for part in parts}) > 1:
            raise ValueError("the ranks' lists have different lengths")

        def combine(left: Array, right: Array) -> Array:
            out = np.empty_like(left)
            f.op.array(left, right, out)
            return out

        return fold(combine, map(np.asarray, parts)).tolist()

    # ------------------------------------------------------------------------ joining
    def _comm(self) -> sync.Communicator:
        """Return the communicator of the chosen channel; the first operation on it joins."""
        if not self._leave.alive:
            raise ValueError("this communicator is closed")
        channel = self._choice.channel
        if channel not in self._joined:
            self._joined[channel] = self._join(channel)
        return self._joined[channel]

    def _join(self, channel: str) -> sync.Communicator:
        settings, seconds = self._settings, self._settings.timeouts[channel]
        comm = sync.connect(
            settings.server,
            store=settings.store,
            channel=self._choice,
            job=self._job,
            rank=self._rank,
            size=self._size,
            timeout=max(seconds, JOIN_SECONDS),
        )
        comm.timeout = seconds
        return comm


def _leave(joined: dict[str, sync.Communicator]) -> None:
    while joined:
        with contextlib.suppress(FmiError):  # the job may have ended before
            joined.popitem()[1].close()


def alias() -> None:
    """Let ``import fmi`` and ``from fmilib.fmi_operations import …`` find ours in this process."""
    from fmi_client import fmi, fmi_operations

    fmilib = ModuleType("fmilib", "The astronomy code's wrapper, on fmi_client.")
    fmilib.__path__ = []  # a package
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
