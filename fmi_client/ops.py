"""Reduction operations: what allreduce, reduce, reduce_scatter, scan and exscan combine with.

On arrays an operation runs in place with numpy (or, for tensors of a dtype that numpy does
not have, with torch); on plain Python values with Python's own operators. The dtype never
changes: a sum of int8 wraps, a logical operation on floats gives 0.0 and 1.0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmi_client.payloads import Array

__all__ = [
    "BAND",
    "BOR",
    "BXOR",
    "LAND",
    "LOR",
    "MAX",
    "MAXLOC",
    "MIN",
    "MINLOC",
    "PROD",
    "SUM",
    "Op",
    "as_op",
    "custom",
]


@dataclass(frozen=True, slots=True)
class Op:
    """A binary operation on values of one type.

    Attributes:
        name: what ranks compare to find out that they called different things.
        scalar: combines two Python values, the lower ranks' first.
        array: combines ``(left, right, out)``; `out` may be either of them.
        commutative: whether the order of ranks may be changed to be faster.
    """

    name: str
    scalar: Callable[[Any, Any], Any]
    array: Callable[[Array, Array, Array], object]
    commutative: bool = True

    def __repr__(self) -> str:
        return f"fmi_client.{self.name}"


def custom(function: Callable[[Any, Any], Any], *, commutative: bool = False) -> Op:
    """Make an operation of an associative function of two values.

    Args:
        function: ``f(left, right)``, associative; gets two arrays of one dtype and shape (or two
            Python values), must not modify them, and returns the combined one.
        commutative: True allows the faster algorithms that change the order of ranks.
            Otherwise values are combined in rank order, lower ranks on the left.

    Returns:
        what `allreduce` and its like take as ``op``. Ranks compare the function's qualified name.
        In an operation, a result of another shape raises ValueError, and one whose dtype cannot be
        cast "same_kind" TypeError; both end the job on all ranks.
    """

    def array(left: Array, right: Array, out: Array) -> None:
        result = np.asarray(function(left, right))
        if result.shape != out.shape:
            raise ValueError(
                f"the custom operation made shape {result.shape} of two of shape {out.shape}"
            )
        np.copyto(out, result, casting="same_kind")

    name = getattr(function, "__qualname__", type(function).__name__)
    return Op(f"custom:{name}", function, array, commutative)


def as_op(op: Op | Callable[[Any, Any], Any]) -> Op:
    """Accept an `Op`, or a plain function as ``custom(function)``.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(op, Op):
        return op
    if callable(op):
        return custom(op)
    raise TypeError(f"op must be an operation such as fmi_client.SUM or a function, not {op!r}")


def _ufunc(function: np.ufunc) -> Callable[[Array, Array, Array], object]:
    return lambda left, right, out: function(left, right, out=out)


def _logical(function: np.ufunc) -> Callable[[Array, Array, Array], object]:
    return lambda left, right, out: np.copyto(out, function(left, right), casting="unsafe")


def _locate(better: np.ufunc) -> Callable[[Array, Array, Array], object]:
    def array(left: Array, right: Array, out: Array) -> None:
        names = out.dtype.names or ()
        if len(names) != 2:
            raise TypeError("MINLOC and MAXLOC need a dtype of two fields: the value, its place")
        (old, new), (old_place, new_place) = ((left[name], right[name]) for name in names)
        first = (new == old) & (new_place < old_place)
        missing = (new != new) & (old == old)  # NaN wins, as in numpy's minimum
        np.copyto(out, np.where(better(new, old) | first | missing, right, left))

    return array


def _first_highest(left: Any, right: Any) -> Any:
    return right if (right[0], -right[1]) > (left[0], -left[1]) else left


SUM = Op("sum", operator.add, _ufunc(np.add))
"""``left + right``; integers wrap at the size of their dtype."""
PROD = Op("prod", operator.mul, _ufunc(np.multiply))
"""``left * right``; integers wrap at the size of their dtype."""
MIN = Op("min", min, _ufunc(np.minimum))
"""The lower one; in arrays NaN, where there is one."""
MAX = Op("max", max, _ufunc(np.maximum))
"""The higher one; in arrays NaN, where there is one."""
LAND = Op("land", lambda a, b: bool(a) and bool(b), _logical(np.logical_and))
"""Whether both are true; in arrays 1 or 0 of their dtype."""
LOR = Op("lor", lambda a, b: bool(a) or bool(b), _logical(np.logical_or))
"""Whether one or both are true; in arrays 1 or 0 of their dtype."""
BAND = Op("band", operator.and_, _ufunc(np.bitwise_and))
"""The bits that are set in both, of integers or bools."""
BOR = Op("bor", operator.or_, _ufunc(np.bitwise_or))
"""The bits that are set in one or both, of integers or bools."""
BXOR = Op("bxor", operator.xor, _ufunc(np.bitwise_xor))
"""The bits that are set in exactly one, of integers or bools."""
MINLOC = Op("minloc", min, _locate(np.less))
"""Of pairs (value, place) the one with the lowest value, and of equals with the lowest place.

Works on tuples, and on arrays of a dtype with two fields: ``[("value", "f8"), ("rank", "i8")]``.
"""
MAXLOC = Op("maxloc", _first_highest, _locate(np.greater))
"""Of pairs (value, place) the one with the highest value, and of equals with the lowest place."""
