"""What came, given to the caller: as objects of its own, or in the memory that `out=` names."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmi_client.collectives import Item
from fmi_client.payloads import is_array, is_tensor, unpack
from fmi_client.protocol.transfers import Receive
from fmi_client.values import as_like, as_numpy, check_out


def check_place(out: Any) -> None:
    """Refuse an `out` that nothing can be put into.

    Raises:
        TypeError: it is no array or tensor.
        ValueError: it is read-only.
    """
    if out is not None and not is_array(out):
        raise TypeError(f"out= needs an array or tensor, not {type(out).__name__}")
    if isinstance(out, np.ndarray | np.generic) and not out.flags.writeable:
        raise ValueError("out= is read-only")


def memory(out: Any) -> memoryview | None:
    """Return where a message for `out` can be received, if it can be received in place.

    Raises:
        TypeError, ValueError: as of `check_place`.
    """
    check_place(out)
    if out is None:
        return None
    array = as_numpy(out)
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


def places(out: Any, size: int) -> list[Any] | None:
    """Return where each rank's item goes: the arrays of a list, or the rows of an array.

    Raises:
        TypeError, ValueError: there is not one place for each rank; or as of `check_place`.
    """
    if out is None:
        return None
    if not isinstance(out, list | tuple):
        check_place(out)
        out = [out[i, ...] for i in range(len(out) if out.ndim else 0)]
    if len(out) != size:
        raise ValueError(f"out= has room for {len(out)} items, not for one of each of {size} ranks")
    for place in out:
        check_place(place)
    return list(out)


def collected(items: list[Item], places: list[Any] | None, own: int) -> list[Any]:
    """Return everybody's objects, in `places` if given; `own` is this rank's."""
    if places is not None:
        return [fill(place, item(one)) for place, one in zip(places, items, strict=True)]
    # Our own item lies in the caller's memory, which the result must not share.
    items[own] = items[own]._replace(data=bytearray(items[own].data or b""))
    return [item(one) for one in items]
