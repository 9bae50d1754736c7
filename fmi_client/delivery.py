"""What came, given to the caller: as objects of its own, or in the memory that `out=` names."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmi_client.collectives import Item
from fmi_client.payloads import is_array, is_tensor, unpack
from fmi_client.protocol.transfers import Receive
from fmi_client.values import as_like, as_numpy, check_out


def memory(out: Any) -> memoryview | None:
    """Return where a message for `out` can be received, if it can be received in place."""
    if out is None:
        return None
    array = as_numpy(out)
    if not array.flags.writeable:
        raise ValueError("out= is read-only")
    in_place = is_tensor(out) or array is out
    if not in_place or not array.nbytes:
        return None
    return array.reshape(-1).view(np.uint8).data


def received(message: Receive, out: Any) -> Any:
    """Return the object in a message, in `out` if given."""
    got = unpack(message.meta, message.data)
    return got if out is None else fill(out, got)


def fill(out: Any, got: Any) -> Any:
    """Put what came into `out`, if it has not been received there already."""
    if not is_array(got):
        raise TypeError(f"out= needs an array, but a {type(got).__name__} came")
    check_out(out, got, tuple(got.shape))
    return as_like(as_numpy(got), got, out)


def item(one: Item) -> Any:
    """Return the object that a rank gave to a collective."""
    return unpack(one.meta, one.data if one.data is not None else b"")


def places(out: Any) -> list[Any]:
    """Return where each rank's item goes: the arrays of a list, or the rows of an array."""
    return list(out) if isinstance(out, list | tuple) else [out[i, ...] for i in range(len(out))]


def collected(items: list[Item], out: Any, own: int) -> list[Any]:
    """Return everybody's objects, in `out` if given; `own` is this rank's."""
    if out is not None:
        return [fill(place, item(one)) for place, one in zip(places(out), items, strict=True)]
    # Our own item lies in the caller's memory, which the result must not share.
    items[own] = items[own]._replace(data=bytearray(items[own].data or b""))
    return [item(one) for one in items]
