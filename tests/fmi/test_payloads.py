"""What travels arrives equal, in the same types, and without a copy on the way out."""

from __future__ import annotations

import collections
import contextlib
import enum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fmi_client
from fmi_client.communicator import Communicator
from fmi_client.errors import ProtocolError
from fmi_client.payloads import MAX_DEPTH, pack, unpack
from tests.support import run_ranks

torch = pytest.importorskip("torch")

TORCH_DTYPES = [
    *("float32", "float64", "float16", "bfloat16", "complex64"),
    *("int8", "uint8", "int16", "int32", "int64", "bool"),
]

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(max_size=10)
    | st.binary(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=10,
)


def there_and_back(obj: Any) -> Any:
    meta, parts = pack(obj)
    return unpack(meta, memoryview(bytearray(b"".join(parts))))


@given(plain)
def test_plain_objects(obj: Any) -> None:
    got = there_and_back(obj)
    assert got == obj
    assert type(got) is type(obj)


@given(
    hnp.arrays(
        hnp.array_dtypes() | hnp.scalar_dtypes(),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
    )
)
def test_arrays_of_every_dtype(array: np.ndarray[Any, Any]) -> None:
    for each in (array, np.asfortranarray(array), array[..., ::-1] if array.ndim else array):
        got = there_and_back(each)
        assert got.dtype == each.dtype
        assert got.shape == each.shape
        assert got.tobytes() == each.tobytes()


@pytest.mark.parametrize("obj", [np.arange(3.0), torch.arange(3.0)], ids=["array", "tensor"])
def test_bytes_may_begin_at_any_address(obj: Any) -> None:
    """As those of an item inside a bundle do."""
    meta, (part,) = pack(obj)
    got = unpack(meta, memoryview(bytearray(b"x" + part))[1:])
    assert got.tolist() == [0, 1, 2]
    at = got.ctypes.data if isinstance(got, np.ndarray) else got.data_ptr()
    assert at % got.itemsize == 0


def test_tuples_are_nested_only_so_deep() -> None:
    obj: Any = ()
    for _ in range(MAX_DEPTH - 1):
        obj = (obj,)
    assert there_and_back(obj) == obj
    with pytest.raises(TypeError, match=f"more than {MAX_DEPTH} tuples or arrays"):
        pack((obj,))


@pytest.mark.parametrize("name", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_tensors_of_every_dtype(name: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(12)[: max(1, np.prod(shape, dtype=int))] % 2).to(getattr(torch, name))
    tensor = tensor.reshape(shape) if 0 not in shape else torch.empty(shape, dtype=tensor.dtype)
    for each in (tensor, tensor.T if tensor.ndim == 2 else tensor):
        got = there_and_back(each)
        assert got.dtype == each.dtype
        assert torch.equal(got, each)


def test_containers_may_hold_arrays_and_subclasses() -> None:
    class Colour(enum.IntEnum):
        RED = 3

    obj = {"a": [np.arange(3), (torch.ones(2), Colour.RED)], "b": collections.OrderedDict(x=1)}
    got = there_and_back(obj)
    assert got["a"][0].tolist() == [0, 1, 2]
    assert torch.equal(got["a"][1][0], torch.ones(2))
    assert got["a"][1][1] == 3
    assert got["b"] == {"x": 1}


def test_contiguous_arrays_and_tensors_are_not_copied() -> None:
    array, tensor = np.zeros(5), torch.zeros(5)
    for obj, memory in ((array, array), (tensor, tensor.numpy())):
        (part,) = pack(obj).parts
        assert np.shares_memory(np.frombuffer(part, np.uint8), memory)


def test_what_only_pickle_could_carry_is_refused() -> None:
    structure, sparse = np.zeros(1, [("a", "O")]), torch.eye(2).to_sparse()
    for obj in (object(), np.array([None]), {"a": {1, 2}}, lambda: 0, structure, sparse):
        with pytest.raises(TypeError):
            pack(obj)


@pytest.mark.parametrize(
    "meta",
    [
        ["n", "|O", [1]],
        ["n", [["a", "|O"]], [1]],
        ["n", "<f4", [7]],
        ["n", "<f4", [-1, -1]],
        ["n", "nonsense", [2]],
        ["t", "__file__", [2]],
        ["t", "load", [2]],
        ["x"],
        "n",
        5,
    ],
)
def test_lying_descriptions_are_refused(meta: Any) -> None:
    import msgpack

    with pytest.raises(ProtocolError):
        unpack(msgpack.packb(meta), b"8 bytes.")


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_bytes_give_an_object_or_a_protocol_error(meta: bytes, data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        unpack(meta, data)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "int64"])
async def test_tensors_are_reduced_and_stay_tensors(name: str) -> None:
    import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16; ONNX and JAX bring it)

    dtype = getattr(torch, name)

    async def rank(comm: Communicator) -> Any:
        mine = torch.full((2, 3), comm.rank + 1).to(dtype)
        out = torch.empty_like(mine)
        assert await comm.allreduce(mine, out=out) is out
        assert (mine == comm.rank + 1).all()
        twice = await comm.allreduce(mine.T, lambda a, b: torch.add(a, b))
        assert torch.equal(out.T, twice)
        return await comm.allreduce(mine, fmi_client.MAX), out

    for largest, total in await run_ranks(4, rank):
        assert largest.dtype == total.dtype == dtype
        assert torch.equal(largest, torch.full((2, 3), 4).to(dtype))
        assert torch.equal(total, torch.full((2, 3), 10).to(dtype))


async def test_numpy_scalars_count_as_arrays_without_axes() -> None:
    for got in await run_ranks(3, lambda comm: comm.allreduce(np.float32(1.5))):
        assert got.dtype == np.float32
        assert got.shape == ()
        assert got == 4.5


async def test_results_do_not_share_memory_with_the_input() -> None:
    async def rank(comm: Communicator) -> None:
        mine = np.ones(3)
        own = (await comm.allgather(mine))[comm.rank]
        own[:] = 7
        total = await comm.allreduce(mine)
        total[:] = 7
        part = await comm.reduce_scatter(mine)
        part[:] = 7
        assert (mine == 1).all()

    for size in (1, 2):
        await run_ranks(size, rank)
