"""Poisoned and damaged checkpoints: each is refused in words, and nothing in one is ever run."""

from __future__ import annotations

import pickle
import pickletools
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickles import PROTO, STOP, call, edited, hidden, named, pack, refused, text, unpack

from lambda_worker.archive import FormatError
from lambda_worker.checkpoint import ALLOWED, convert
from lambda_worker.engine import ModelError
from lambda_worker.inert import content
from lambda_worker.model_file import load_model

ONE = b"K\x01"
LINEAR = "torch.nn.modules.linear"


def asked(module: str, name: str) -> bytes:
    """As protocol 4 asks for a global, and for attributes of one."""
    return text(module) + text(name) + b"\x93"


def poison(canary: Path) -> dict[str, bytes]:
    """Code that leaves one value, by the global that must be named in its refusal."""
    touch, python = text(f"touch {canary}"), text(f"__import__('os').mkdir({str(canary)!r})")
    return {
        "os.system": call("os.system", touch),
        "posix.system": call("posix.system", touch),
        "nt.system": call("nt.system", touch),
        "subprocess.Popen": call("subprocess.Popen", touch),
        "builtins.eval": call("builtins.eval", python),
        "builtins.exec": call("__builtin__.exec", python),
        "builtins.open": call("builtins.open", text(str(canary)), text("w")),
        "builtins.getattr": call("builtins.getattr", ONE, text("real")),
        "builtins.__import__": call("builtins.__import__", text("antigravity")),
        "builtins.object": named("builtins.object") + b")\x81",
        "builtins.frozenset": call("builtins.frozenset"),
        "functools.partial": call("functools.partial", named("os.system"), touch),
        "operator.attrgetter": call("operator.attrgetter", text("__class__")),
        "operator.methodcaller": call("operator.methodcaller", text("system"), touch),
        "copyreg._reconstructor": call("copyreg._reconstructor", ONE),
        "copyreg.__newobj__": call("copyreg.__newobj__", ONE),
        "copy_reg._reconstructor": call("copy_reg._reconstructor", ONE),
        "numpy.core.multiarray.scalar": call("numpy.core.multiarray.scalar", ONE),
        "numpy._core.multiarray._reconstruct": call("numpy._core.multiarray._reconstruct", ONE),
        "numpy.dtype": named("numpy.dtype"),
        "pickle.loads": call("pickle.loads", ONE),
        "_pickle.loads": call("_pickle.loads", ONE),
        "torch.load": call("torch.load", text(str(canary))),
        "torch.hub.load": call("torch.hub.load", text("someone/something")),
        "torch.jit.load": call("torch.jit.load", text(str(canary))),
        "torch.serialization.load": call("torch.serialization.load", text(str(canary))),
        "torch.storage._load_from_bytes": call("torch.storage._load_from_bytes", touch),
        "torch._utils._rebuild_wrapper_subclass": call("torch._utils._rebuild_wrapper_subclass"),
        "torch._utils._rebuild_sparse_tensor": call("torch._utils._rebuild_sparse_tensor"),
        "torch.nn.modules.linear.Bilinear": named("torch.nn.modules.linear.Bilinear") + b")\x81",
        "torch.nn.modules.linear.init": named("torch.nn.modules.linear.init"),
        "torch.nn.modules.container.ModuleDict": named("torch.nn.modules.container.ModuleDict"),
        "timm.models.layers.drop.DropPath": named("timm.models.layers.drop.DropPath"),
        "blocks.photoz.torch": named("blocks.photoz.torch"),
        "NormalCell.np": named("NormalCell.np"),
        # Attributes of what is allowed.
        f"{LINEAR}.Linear.__init__": asked(LINEAR, "Linear.__init__"),
        "torch.nn.modules.linear.Linear": asked("torch.nn.modules", "linear.Linear"),
        "builtins.set.__class__": asked("builtins", "set.__class__"),
        # The other instruction that calls what it names.
        "INST os.system": b"(" + touch + b"ios\nsystem\n",
        # Calls of what may be made or named, but not called.
        "calls torch.nn.modules.linear.Linear": call("torch.nn.modules.linear.Linear", ONE, ONE),
        "calls NormalCell.NormalCell": call("NormalCell.NormalCell", ONE, ONE),
        "calls collections.OrderedDict": call("collections.OrderedDict", b"]"),
        "calls torch.FloatStorage": call("torch.FloatStorage"),
        # States that are more than attributes.
        "gives NormalCell.Mlp a state": named("NormalCell.Mlp") + b")\x81}}\x86b",
        f"gives {LINEAR}.Linear a state": named(f"{LINEAR}.Linear") + b")\x81]b",
        "gives int a state": ONE + b"}b",
        "gives Global a state": named("NormalCell.Mlp") + b"}b",
    }


NAMES = list(poison(Path("canary")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["alone", "hidden"])
def test_poison_is_refused_by_name(
    small_original: Path, tmp_path: Path, name: str, where: str
) -> None:
    code, path = poison(tmp_path / "canary")[name], tmp_path / "m.pt"
    if where == "alone":
        pack(path, PROTO + code + STOP)
    else:
        hidden(small_original / "parallel.pt", path, code)
    refused(path, rf"\b{name.replace('.', '[.]')}\b")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["posix.system", "os.system", "builtins.eval", "builtins.exec"])
def test_the_canary_would_have_been_touched(tmp_path: Path, name: str) -> None:
    """The poison is real: who unpickles it, runs it."""
    pickle.loads(PROTO + poison(tmp_path / "canary")[name] + STOP)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "key", ["__class__", "__dict__", "__setstate__", "__reduce__", "forward", "state", "name"]
)
def test_a_state_is_data_whatever_its_keys(small_original: Path, tmp_path: Path, key: str) -> None:
    """Attributes with names of machinery change nothing: there is none."""
    mine = named("NormalCell.Mlp") + b")\x81}" + text(key) + named("NormalCell.Mlp") + b"sb"
    path = hidden(small_original / "parallel.pt", tmp_path / "m.pt", mine)
    convert(path, tmp_path / "one")
    convert(small_original / "parallel.pt", tmp_path / "two")
    one, two = (load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_attributes_of_a_dict_do_not_shadow_its_methods(
    small_original: Path, tmp_path: Path
) -> None:
    old = rb"ccollections\nOrderedDict\n(?:q.|r....)\)R(?:q.|r....)"
    mine = call("collections.OrderedDict") + b"}" + text("items") + ONE + b"sb"
    path = edited(small_original / "parallel.pt", tmp_path / "m.pt", b"", old, mine)
    # The memo is now short of an entry, which the rest refers to: put back both.
    with pytest.raises(ModelError, match="cannot be read"):
        convert(path, tmp_path / "out")
    memo = (
        named("collections.OrderedDict") + b"r\x01\0\1\0)Rr\x02\0\1\0}" + text("items") + b"K\1sb"
    )
    assert content(PROTO + memo + STOP, ALLOWED) == {}


def tensor(storage: bytes, offset: bytes, shape: bytes, stride: bytes) -> bytes:
    return call("torch._utils._rebuild_tensor_v2", storage, offset, shape, stride, b"\x89}")


def stored(numel: bytes, kind: str = "torch.FloatStorage", key: str = "0") -> bytes:
    return b"(" + text("storage") + named(kind) + text(key) + text("cpu") + numel + b"tQ"


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


GOOD = stored(number(6))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (tensor(GOOD, number(4), sizes(3), sizes(1)), "reaches beyond its storage of 6"),
        (tensor(GOOD, number(0), sizes(7), sizes(1)), "reaches beyond"),
        (tensor(GOOD, number(0), sizes(2, 3), sizes(4, 1)), "reaches beyond"),
        (tensor(GOOD, number(0), sizes(7), sizes(0)), "reaches beyond"),
        (tensor(GOOD, number(0), sizes(1 << 62, 1 << 62), sizes(0, 0)), "reaches beyond"),
        (tensor(GOOD, number(0), sizes(1 << 900), sizes(1)), "reaches beyond"),
        (tensor(GOOD, number(1 << 900), sizes(1), sizes(1)), "reaches beyond"),
        (tensor(GOOD, number(0), sizes(0, 1 << 900), sizes(1, 1)), "empty or negative"),
        (tensor(GOOD, number(0), sizes(-2), sizes(1)), "empty or negative"),
        (tensor(GOOD, number(5), sizes(3), sizes(-1)), "empty or negative"),
        (tensor(GOOD, number(-1), sizes(3), sizes(1)), "empty or negative"),
        (tensor(GOOD, number(0), sizes(3), sizes(1, 1)), "no shape of a tensor"),
        (tensor(GOOD, number(0), sizes(*[1] * 5), sizes(*[1] * 5)), "no shape of a tensor"),
        (tensor(GOOD, number(0), b"\x88\x85", sizes(1)), "no shape of a tensor"),
        (tensor(GOOD, number(0), text("3") + b"\x85", sizes(1)), "no shape of a tensor"),
        (tensor(GOOD, number(0), b"](K\x03e", sizes(1)), "no dense tensor"),
        (tensor(ONE, number(0), sizes(3), sizes(1)), "no dense tensor"),
        (call("torch._utils._rebuild_tensor_v2"), "no dense tensor"),
        (call("torch._utils._rebuild_parameter"), "no tensor"),
        (call("torch._utils._rebuild_parameter", ONE, b"\x88}"), "no tensor"),
        (call("builtins.set", b"]"), "no tensor"),
        (named("torch._utils._rebuild_parameter"), "no tensor"),
        (tensor(stored(number(1 << 40)), number(0), sizes(1), sizes(1)), "claims 1099511627776"),
        (tensor(stored(number(5)), number(0), sizes(1), sizes(1)), "claims 5 numbers, it has 24"),
        (
            tensor(stored(number(6), key="../1"), number(0), sizes(1), sizes(1)),
            "data/../1 is missing",
        ),
        (tensor(stored(number(6), "torch.LongStorage"), number(0), sizes(1), sizes(1)), "claims 6"),
        (stored(number(6), kind="NormalCell.Mlp"), "no storage"),
        (stored(number(6), kind="builtins.set"), "no storage"),
        (b"]Q", "no storage"),
        (text("0") + b"Q", "no storage"),
    ],
)
def test_tensors_that_lie_are_refused(tmp_path: Path, value: bytes, complaint: str) -> None:
    state = b"}" + text("head.bias") + value + b"s"
    refused(pack(tmp_path / "m.pt", PROTO + state + STOP, {"0": bytes(24)}), complaint)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [(sizes(2, 2), sizes(3, 1)), (sizes(1, 5), sizes(1 << 900, 1)), (b")", b")")],
)
def test_a_tensor_that_says_the_truth_is_read(tmp_path: Path, shape: bytes, stride: bytes) -> None:
    """The counterpart of the lies above: with true numbers it is another thing that is missing."""
    state = b"}" + text("head.bias") + tensor(GOOD, number(1), shape, stride) + b"s"
    refused(pack(tmp_path / "m.pt", PROTO + state + STOP, {"0": bytes(24)}), "has no cls_token")


def test_many_tensors_over_one_storage_take_no_memory(tmp_path: Path) -> None:
    one = tensor(stored(number(250_000)), number(0), sizes(250_000), sizes(1))
    state = b"}(" + b"".join(text(f"t{i}") + one for i in range(1000)) + b"u"
    path = pack(tmp_path / "m.pt", PROTO + state + STOP, {"0": bytes(1_000_000)})
    tracemalloc.start()
    try:
        refused(path, "its tensors claim more bytes than the file has")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("pickled", "complaint"),
    [
        (b"", "before seeing STOP"),
        (PROTO + b"N", "before seeing STOP"),
        (PROTO + STOP, "stack|empty"),
        (PROTO + b"a.", "cannot be read"),
        (PROTO + b"h\x05.", "cannot be read"),
        (PROTO + b"t.", "cannot be read"),
        (PROTO + b"R.", "underflow"),
        (PROTO + b"}]Ns.", "neither text nor numbers"),
        (PROTO + b"}(NNNu.", "cannot be read"),
        (PROTO + b"X\xff\xff\xff\xff.", "cannot be read"),
        (PROTO + b"X\1\0\0\0\xff.", "cannot be read"),
        (PROTO + b"\xff.", "cannot be read"),
        (PROTO + b"cos\n.", "cannot be read"),
        (PROTO + b"]]\x93.", "whose name is no text"),
        (PROTO + b"K\1)R.", "call of what is no global"),
        (PROTO + named("NormalCell.Mlp") + b"K\1R.", "call of what is no global"),
        (PROTO + b"I1\n.", "uses INT"),
        (PROTO + b"\x82\1.", "uses EXT1"),
        (PROTO + b"P1\n.", "uses PERSID"),
        (PROTO + b"(o.", "uses OBJ"),
        (PROTO + b"\x95\0\0\0\0\0\0\0\x80.", "cannot be read"),
        (PROTO + b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read"),
        (PROTO + b"S'\\xzz'\n.", "cannot be read"),
        (PROTO + b"S'\\q'\n.", "cannot be read|uses STRING"),
    ],
)
def test_a_broken_pickle_is_refused(tmp_path: Path, pickled: bytes, complaint: str) -> None:
    refused(pack(tmp_path / "m.pt", pickled), complaint)


def test_a_great_memo_index_takes_no_memory(tmp_path: Path) -> None:
    """CPython's own unpickler would take 64 GB for this one instruction."""
    path = pack(tmp_path / "m.pt", PROTO + b"Nr\xff\xff\xff\xff.")
    tracemalloc.start()
    try:
        refused(path, "holds NoneType")
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


MANY = 100_000  # a C stack has 8 MB: 80 bytes for each level
DEEP = b")" + MANY * b"\x85"


@pytest.mark.parametrize(
    ("pickled", "complaint"),
    [
        (DEEP, "holds tuple"),
        (MANY * b"]" + (MANY - 1) * b"a", "holds list"),
        (b"}" + DEEP + b"Ns", "neither text nor numbers"),
        (MANY * b"(" + b"N", "holds NoneType"),
        (b"]q\0" + 60 * b"h\0h\0\x86q\0", "holds tuple"),
        (b"]q\0" + 60 * b"h\0h\0\x86q\0" + b"h\0\x93", "whose name is no text"),
    ],
)
def test_deep_and_branching_values_are_no_danger(
    tmp_path: Path, pickled: bytes, complaint: str
) -> None:
    refused(pack(tmp_path / "m.pt", PROTO + pickled + STOP), complaint)


@pytest.mark.parametrize("name", ["num_heads", "eps", "kernel_size", "class_token", "scale"])
def test_deep_attributes_are_no_danger(small_original: Path, tmp_path: Path, name: str) -> None:
    place = text(name).replace(b"\0", rb"\0") + rb"(?:q.|r....)"
    value = rb"(?:K.|G........|\x88|K.K.\x86)"
    path = edited(small_original / "parallel.pt", tmp_path / "m.pt", place, value, DEEP)
    with pytest.raises(ModelError, match=r"another|small number|differ"):
        convert(path, tmp_path / "out")


def regressor(modules: bytes) -> bytes:
    """A ViT_Astro, memo 0, with these modules."""
    made = named("blocks.model_vit_inception.ViT_Astro") + b")\x81q\0"
    return made + b"}" + text("_modules") + modules + b"sb"


@pytest.mark.parametrize(
    ("modules", "complaint"),
    [
        (b"}" + text("self") + b"h\0s", "a name of more than 200 characters: self.self.self"),
        (b"}" + text(1_000_000 * "x") + b"h\0s", "a name of more than 200 characters: xxx"),
        (b"}(" + b"".join(number(i) + b"h\0" for i in range(2000)) + b"u", "more than 10,000 mod"),
        (
            b"}(" + b"".join(number(i) + b"h\0" for i in range(10_001)) + b"u",
            "more than 10,000 mod",
        ),
        (b"}" + text("blocks") + ONE + b"s", "blocks is no module"),
        (b"]", "_modules is no dict"),
    ],
)
def test_modules_in_circles_are_refused(tmp_path: Path, modules: bytes, complaint: str) -> None:
    refused(pack(tmp_path / "m.pt", PROTO + regressor(modules) + STOP), complaint)


def test_many_modules_with_the_same_thousand_tensors_are_refused(tmp_path: Path) -> None:
    values = b"}(" + b"".join(number(i) + b"K\1" for i in range(1000)) + b"u"
    attributes = b"}" + text("_parameters") + values + b"s"
    child = named("torch.nn.modules.linear.Linear") + b")\x81" + attributes + b"bq\1"
    children = b"}(" + text("0") + child
    children += b"".join(number(i) + b"h\1" for i in range(1, 20)) + b"u"
    refused(pack(tmp_path / "m.pt", PROTO + regressor(children) + STOP), "more than 10,000 mod")


def test_names_of_strangers_are_shown_without_control_characters(tmp_path: Path) -> None:
    name = text("os\x1b[2J\n" + 1000 * "x") + text("system") + b"\x93"
    refused(pack(tmp_path / "m.pt", PROTO + name + STOP), r"needs os\?\[2J\?xxx")


def outcome(run: Callable[[], object]) -> str:
    """What a refusal says, or nothing where there is none; any other exception is a failure."""
    try:
        run()
    except (FormatError, ModelError) as error:
        return str(error)
    return ""


def changes(data: bytes, seed: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(data)
    for place, new in seed:
        place %= len(changed)
        changed[place : place + len(new)] = new
    return bytes(changed)


SOME = st.lists(st.tuples(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=6)), max_size=4)


@settings(max_examples=60)
@given(seed=SOME)
def test_any_change_of_the_pickle_ends_well(
    small_original: Path, tmp_path_factory: pytest.TempPathFactory, seed: list[tuple[int, bytes]]
) -> None:
    pickled, storages = unpack(small_original / "parallel.pt")
    folder = tmp_path_factory.getbasetemp()
    path = pack(folder / "changed.pt", changes(pickled, seed), storages)
    assert outcome(lambda: convert(path, folder / "changed.safetensors")).isprintable()


@settings(max_examples=60)
@given(seed=SOME, late=st.booleans())
def test_any_change_of_the_archive_ends_well(
    small_original: Path,
    tmp_path_factory: pytest.TempPathFactory,
    seed: list[tuple[int, bytes]],
    late: bool,
) -> None:
    data = (small_original / "parallel.pt").read_bytes()
    if late:  # the directory is at the end
        seed = [(len(data) - 1 - place % 4000, new) for place, new in seed]
    folder = tmp_path_factory.getbasetemp()
    path = folder / "changed.pt"
    path.write_bytes(changes(data, seed))
    assert outcome(lambda: convert(path, folder / "changed.safetensors")).isprintable()


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(OPCODES) | st.binary(max_size=5), max_size=40))
def test_any_program_ends_well(parts: list[bytes]) -> None:
    assert outcome(lambda: content(PROTO + b"".join(parts) + STOP, ALLOWED)).isprintable()
