"""What a torch.save file says, as plain data: nothing that it names is imported or called.

Such a file is a zip archive of one pickle and raw storages. A pickle is a program for a stack
machine, and two of its instructions call what the file names. The machine here has no such thing:
a global stays a name, a call the record of it. So a file can lie about its content, which whoever
uses the records has to check, but it cannot act.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

MAX_PICKLE = 4 << 20  # bytes; the published model's has 0.2 MB, and each may cost 200 in memory
MAX_ENTRIES = 100_000  # storages in a file

# What is read as it stands: the argument is the value.
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class InertError(ValueError):
    """A file is damaged, or names what it may not name; the text says what."""


@dataclass(frozen=True)
class Allowed:
    """Globals that a file may name, written `package.module.Name`.

    Attributes:
        classes: may be made, without arguments, and given a state.
        functions: may be called with arguments.
        types: may be named, as the type of a storage.
    """

    classes: frozenset[str]
    functions: frozenset[str]
    types: frozenset[str]


@dataclass(frozen=True)
class Global:
    """The name of a class or function."""

    name: str


@dataclass(eq=False)
class Made:
    """What the file would make by calling `name(*args)` and setting `state`."""

    name: str
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """One of the file's raw arrays: its type's global, its entry's key, its claimed length."""

    type: str
    key: str
    numel: int


class Archive:
    """A torch.save file in memory.

    Args:
        data: the whole file.

    Raises:
        InertError: not such a file, truncated, compressed or otherwise damaged.
    """

    def __init__(self, data: bytes) -> None:
        if not data.startswith(b"PK\x03\x04"):
            raise InertError(
                "not a .pt file as PyTorch writes it since 1.6 (a zip archive): "
                "save it again with torch.save"
            )
        if data.count(b"PK\x01\x02") > MAX_ENTRIES:
            raise InertError(f"more than {MAX_ENTRIES:,} entries")
        self._zip = _guarded(lambda: zipfile.ZipFile(io.BytesIO(data)))
        entries = self._zip.infolist()
        pickles = [e.filename for e in entries if e.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InertError("not a .pt file: a zip archive without a single data.pkl")
        if len({e.filename for e in entries}) != len(entries):
            raise InertError("damaged: it has an entry twice")
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise InertError("compressed, which torch.save never does: save it again with it")
        if sum(e.file_size for e in entries) > len(data):
            raise InertError("damaged: its entries claim more bytes than the file has")
        self._folder = pickles[0].removesuffix("data.pkl")

    def read(self, name: str, limit: int | None = None) -> bytes:
        """An entry's bytes, checked against its checksum.

        Raises:
            InertError: missing, damaged, or longer than `limit` bytes.
        """
        try:
            entry = self._zip.getinfo(self._folder + name)
        except KeyError:
            raise InertError(f"damaged: it has no entry {printable(name)}") from None
        if limit is not None and entry.file_size > limit:
            raise InertError(f"{printable(name)} has more than {limit:,} bytes")
        return _guarded(lambda: self._zip.read(entry))

    def content(self, allowed: Allowed) -> Any:
        """The pickle's value, of dicts, lists, tuples, numbers, strings, `Made` and `Storage`.

        Raises:
            InertError: it names another global, or is no such pickle.
        """
        if "byteorder" in self and self.read("byteorder", 16) != b"little":
            raise InertError("written on a big-endian machine: save it again on a common one")
        return content(self.read("data.pkl", MAX_PICKLE), allowed)

    def __contains__(self, name: str) -> bool:
        return self._folder + name in self._zip.NameToInfo


def content(pickled: bytes, allowed: Allowed) -> Any:
    """A pickle's value; see `Archive.content`."""
    machine = _Machine(allowed)
    operations = pickletools.genops(pickled)
    try:
        for opcode, argument, _ in operations:
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except InertError:
        raise
    # An empty stack, an unknown memo, a list where a dict is wanted, text that is no UTF-8 …
    except (LookupError, TypeError, AttributeError, ValueError, Warning) as error:
        raise InertError(f"damaged: its pickle cannot be read: {_brief(error)}") from error


class _Machine:
    """The stack machine: what torch.save writes in protocols 2 to 5, and no other instruction."""

    def __init__(self, allowed: Allowed) -> None:
        self.stack: list[Any] = []
        self._allowed = allowed
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._actions: Mapping[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
            "MARK": self._mark,
            "TUPLE": lambda _: self._push(tuple(self._marked())),
            "EMPTY_LIST": lambda _: self._push([]),
            "EMPTY_DICT": lambda _: self._push({}),
            "EMPTY_SET": lambda _: self._push([]),
            "APPEND": lambda _: self._extend([self.stack.pop()]),
            "APPENDS": lambda _: self._extend(self._marked()),
            "ADDITEMS": lambda _: self._extend(self._marked()),
            "SETITEM": lambda _: self._set(self._popped(2)),
            "SETITEMS": lambda _: self._set(self._marked()),
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "BINGET": lambda index: self._push(self._memo[index]),
            "LONG_BINGET": lambda index: self._push(self._memo[index]),
            "GLOBAL": lambda names: self._name(*names.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._name(*self._popped(2)),
            "NEWOBJ": lambda _: self._make(*self._popped(2)),
            "REDUCE": lambda _: self._make(*self._popped(2)),
            "BUILD": lambda _: self._build(self.stack.pop()),
            "BINPERSID": lambda _: self._store(self.stack.pop()),
        }

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in LITERALS:
            self._push(argument)
        elif opcode in CONSTANTS:
            self._push(CONSTANTS[opcode])
        elif opcode in TUPLES:
            self._push(tuple(self._popped(TUPLES[opcode])))
        elif opcode in self._actions:
            self._actions[opcode](argument)
        else:
            # INST names a global and calls it.
            what = f"INST {printable(argument.replace(' ', '.'))}" if opcode == "INST" else opcode
            raise InertError(f"refused: its pickle uses {what}, which torch.save does not write")

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _popped(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        popped = self.stack[-count:]
        del self.stack[-count:]
        return popped

    def _mark(self, _: object) -> None:
        self._marks.append(self.stack)
        self.stack = []

    def _marked(self) -> list[Any]:
        marked, self.stack = self.stack, self._marks.pop()
        return marked

    def _put(self, index: int) -> None:
        self._memo[index] = self.stack[-1]

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("items for what is no list")
        self.stack[-1].extend(items)

    def _set(self, pairs: list[Any]) -> None:
        # Keys of numbers and text only: the hash of a tuple of tuples of … ends in the C stack.
        keys = pairs[::2]
        if type(self.stack[-1]) is not dict or any(type(key) not in (str, int) for key in keys):
            raise TypeError("keys that are neither text nor numbers")
        self.stack[-1].update(zip(keys, pairs[1::2], strict=True))

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a global whose name is no text")
        if module == "__builtin__":  # what Python 3 writes into protocol 2, for Python 2
            module = "builtins"
        full = f"{module}.{name}"
        known = self._allowed.classes | self._allowed.functions | self._allowed.types
        # `a.b` of module `c` is an attribute lookup, where `b` of `c.a` is not.
        if full not in known or "." in name:
            raise InertError(f"refused: it names {printable(full)}, which a model does not need")
        self._push(Global(full))

    def _make(self, called: Any, args: Any) -> None:
        if not isinstance(called, Global) or type(args) is not tuple:
            raise TypeError("a call of what is no global")
        if called.name not in self._allowed.functions and (
            args or called.name in self._allowed.types
        ):
            raise InertError(f"refused: it calls {called.name}, which a model does not need")
        ordered = called.name == "collections.OrderedDict"
        self._push({} if ordered else Made(called.name, args))

    def _build(self, state: Any) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            return  # attributes of an OrderedDict: torch notes versions there
        if not isinstance(target, Made) or type(state) is not dict:
            what = target.name if isinstance(target, Made) else type(target).__name__
            raise InertError(f"refused: it gives {what} a state that is no plain dict")
        if target.state:
            raise InertError(f"refused: it gives {target.name} a state twice")
        target.state = state  # no copy: one large state can be given to all that is made

    def _store(self, words: Any) -> None:
        match words:
            case ("storage", Global(kind), str(key), str(), int(numel)) if (
                kind in self._allowed.types
            ):
                self._push(Storage(kind, key, numel))
            case _:
                raise TypeError("a persistent id that is no storage")


def printable(text: str, limit: int = 100) -> str:
    """Text of a stranger's for a message: short, on one line, without control characters."""
    kept = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in kept)


def _brief(error: Exception) -> str:
    return printable(str(error) or type(error).__name__)


def _guarded(read: Callable[[], T]) -> T:
    """Whatever zipfile raises on a damaged or foreign archive, as one error."""
    try:
        return read()
    except (
        *(zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError),
        *(ValueError, LookupError, struct.error, OverflowError),
    ) as error:
        raise InertError(f"truncated or damaged: {_brief(error)}") from error
