"""What a pickle of `torch.save` says, as plain data: nothing that it names is imported or called.

A pickle is a program for a stack machine, and two of its instructions call what the file names. The
machine here has no such thing: a global stays a name, a call the record of it. So a file can lie
about its content, which whoever uses the records has to check, but it cannot act.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lambda_worker.archive import Damaged, FormatError, Refused, printable

MAX_NAME = 100  # characters of a name that fits a pattern: few bytes of pickle repeat it

# What is read as it stands: the argument is the value.
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
}
MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": MARK}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Allowed:
    """Globals that a file may name, written `package.module.Name`.

    Attributes:
        kind: what such a file holds, for messages.
        classes: may be made, without arguments, and given a state.
        functions: may be called with arguments.
        types: may be named, as the type of a storage.
        others: may be named and called, too, by a pattern of names.
    """

    kind: str
    classes: frozenset[str]
    functions: frozenset[str]
    types: frozenset[str]
    others: re.Pattern[str] = re.compile("(?!)")  # none

    def has(self, name: str) -> bool:
        """Whether a file may name it."""
        known = name in self.classes | self.functions | self.types
        return known or (len(name) <= MAX_NAME and bool(self.others.fullmatch(name)))

    def may_call(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether a file may call it with these arguments."""
        free = name in self.functions or self.others.fullmatch(name)
        return bool(free) or (name in self.classes and not args)


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
    """One of the file's raw arrays: its type's global, its part's key, device, claimed length."""

    type: str
    key: str
    place: str
    numel: int


def content(pickled: bytes, allowed: Allowed) -> Any:
    """A pickle's value, of dicts, lists, tuples, numbers, strings, `Global`, `Made` and `Storage`.

    Raises:
        Refused: it names another global. Damaged: it is no pickle as `torch.save` writes it.
    """
    machine = _Machine(allowed)
    operations = pickletools.genops(pickled)
    try:
        for opcode, argument, _ in operations:
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except FormatError:
        raise
    # An empty stack, an unknown memo, a list where a dict is wanted, text that is no UTF-8 …
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, Warning) as error:
        brief = printable(str(error) or type(error).__name__)
        raise Damaged(f"its pickle cannot be read: {brief}") from error


class _Machine:
    """The stack machine: what torch.save writes in protocols 2 to 5, and no other instruction."""

    def __init__(self, allowed: Allowed) -> None:
        self.stack: list[Any] = []
        self._allowed = allowed
        self._memo: dict[int, Any] = {}
        self._actions: Mapping[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
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
            raise self._refused(f"its pickle uses {what}, which torch.save does not write")

    def _refused(self, what: str) -> Refused:
        return Refused(what, self._allowed.kind)

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _popped(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        popped = self.stack[-count:]
        del self.stack[-count:]
        return popped

    def _marked(self) -> list[Any]:
        marked = []
        while (value := self.stack.pop()) is not MARK:
            marked.append(value)
        return marked[::-1]

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
        # `a.b` of module `c` is an attribute lookup, where `b` of `c.a` is not.
        if not self._allowed.has(full) or "." in name:
            raise self._refused(f"it needs {printable(full)} to be loaded")
        self._push(Global(full))

    def _make(self, called: Any, args: Any) -> None:
        if not isinstance(called, Global) or type(args) is not tuple:
            raise TypeError("a call of what is no global")
        if not self._allowed.may_call(called.name, args):
            raise self._refused(f"it calls {called.name}")
        ordered = called.name == "collections.OrderedDict"
        self._push({} if ordered else Made(called.name, args))

    def _build(self, state: Any) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            return  # attributes of an OrderedDict: torch notes versions there
        if not isinstance(target, Made) or type(state) is not dict:
            what = target.name if isinstance(target, Made) else type(target).__name__
            raise self._refused(f"it gives {what} a state that is no plain dict")
        if target.state:
            raise self._refused(f"it gives {target.name} a state twice")
        target.state = state  # no copy: one large state can be given to all that is made

    def _store(self, words: Any) -> None:
        match words:
            case ("storage", Global(kind), str(key), str(place), int(numel)) if (
                kind in self._allowed.types
            ):
                self._push(Storage(kind, key, place, numel))
            case _:
                raise TypeError("a persistent id that is no storage")
