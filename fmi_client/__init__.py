"""Collectives between serverless workers over punched TCP connections.

Async:

    async with fmi_client.connect("host:10000", job="run-42", rank=r, size=n) as comm:
        total = await comm.allreduce(array)

Blocking:

    with fmi_client.sync.connect("host:10000", job="run-42", rank=r, size=n) as comm:
        total = comm.allreduce(array)

Names are loaded when they are first used (PEP 562): the server imports `fmi_client.errors`
and `fmi_client.protocol` and must not need numpy for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmi_client import sync as sync
    from fmi_client.communicator import Communicator as Communicator
    from fmi_client.communicator import connect as connect
    from fmi_client.communicator import memory_world as memory_world
    from fmi_client.cost_model import Model as Model
    from fmi_client.errors import *  # noqa: F403
    from fmi_client.hints import Choice as Choice
    from fmi_client.hints import Prices as Prices
    from fmi_client.hints import choose as choose
    from fmi_client.ops import BAND as BAND
    from fmi_client.ops import BOR as BOR
    from fmi_client.ops import BXOR as BXOR
    from fmi_client.ops import LAND as LAND
    from fmi_client.ops import LOR as LOR
    from fmi_client.ops import MAX as MAX
    from fmi_client.ops import MAXLOC as MAXLOC
    from fmi_client.ops import MIN as MIN
    from fmi_client.ops import MINLOC as MINLOC
    from fmi_client.ops import PROD as PROD
    from fmi_client.ops import SUM as SUM
    from fmi_client.ops import Op as Op
    from fmi_client.ops import custom as custom
    from fmi_client.protocol.auth import make_token as make_token

_HOMES = {
    "fmi_client.communicator": ("Communicator", "connect", "memory_world"),
    "fmi_client.hints": ("Choice", "Prices", "choose"),
    "fmi_client.cost_model": ("Model",),
    "fmi_client.ops": (
        *("SUM", "PROD", "MIN", "MAX", "LAND", "LOR", "BAND", "BOR", "BXOR"),
        *("MINLOC", "MAXLOC", "Op", "custom"),
    ),
    "fmi_client.protocol.auth": ("make_token",),
    "fmi_client.errors": (
        *("Aborted", "AuthenticationFailed", "CollectiveMismatch", "CollectiveTimeout"),
        *("FmiError", "JobFull", "JoinTimeout", "ProtocolError", "PunchFailed", "RankFailed"),
        *("RankTaken", "RendezvousError", "ServerDraining"),
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("errors", "ops", "protocol", "sync")

__all__ = sorted([*_HOME, "sync"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fmi_client.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fmi_client' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
