"""The published checkpoint, a pickle of a whole module, into a model file of ours.

Neither timm nor the published code is needed, and nothing from the file is executed: it is read as
plain data (`lambda_worker.inert`). All sizes follow from the tensors' shapes. What shapes cannot
tell (attention heads, epsilons, strides …) stands in the pickled modules; it is taken from there,
or compared with what our model computes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lambda_worker.archive import Archive, FormatError, Unusual, printable
from lambda_worker.engine import ModelError
from lambda_worker.inert import Allowed, Made, Storage, content
from lambda_worker.model import NORM_EPS, AstroMAE, InceptionBlock, ModelConfig
from lambda_worker.model_file import TWIN, TWIN_OF, assemble, save_model
from lambda_worker.ptfile import DTYPES, PARAMETER, TENSOR

MAX_BYTES = 1 << 30  # of a checkpoint; the published one has 64 MB
MAX_PICKLE = 4 << 20  # bytes; the published model's has 0.2 MB, and each may cost 200 in memory
MAX_NAMES = 10_000  # of modules, and of tensors; the published model has some 400 and 508
MAX_NAME = 200  # characters of a module's or tensor's dotted name
HEADS = 6  # the published number, where a file cannot say it

# What AstroMAE's tensors are of.
NUMBERS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}
PARAMETERS = (PARAMETER, f"{PARAMETER}_with_state")
PARALLEL = "torch.nn.parallel.data_parallel.DataParallel"
REGRESSOR = "blocks.model_vit_inception.ViT_Astro"
ATTENTION = "NormalCell.Attention"
NN = {
    *("activation.GELU", "activation.ReLU", "activation.SiLU", "batchnorm.BatchNorm2d"),
    *("container.ModuleList", "container.Sequential", "conv.Conv2d", "dropout.Dropout"),
    *("flatten.Flatten", "linear.Identity", "linear.Linear", "normalization.LayerNorm"),
    *("pooling.AvgPool2d", "pooling.MaxPool2d"),
}
ALLOWED = Allowed(
    kind="a model",
    classes=frozenset(
        {PARALLEL, REGRESSOR, "collections.OrderedDict"}
        | {f"blocks.photoz.{name}" for name in ("Input_Mix_Model", "InceptionBlock", "ConvBlock")}
        | {ATTENTION, "NormalCell.NormalCell", "NormalCell.Mlp"}
        | {"timm.models.layers.patch_embed.PatchEmbed"}
        | {f"torch.nn.modules.{name}" for name in NN}
    ),
    # A DataParallel from a machine with GPUs carries a device.
    functions=frozenset({TENSOR, *PARAMETERS, "builtins.set", "torch.device"}),
    types=frozenset(DTYPES),
)
# Our names of the published classes, where they differ.
NAMES = {"AstroMAE": "ViT_Astro", "InceptionMagnitude": "Input_Mix_Model", "Block": "NormalCell"}
# Attributes that decide what a module computes; the published classes' own, with the values of
# the published model. What a file leaves out is the published value.
FACTS: dict[str, dict[str, object]] = {
    "GELU": {"approximate": "none"},
    "NormalCell": {"class_token": True},
    "Input_Mix_Model": {"magnitude": True, "Inception_only": False, "uk_paper": False},
}
# The same of torch's classes, compared with the module of that name in our model.
TORCH_FACTS = (
    *("eps", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("ceil_mode", "count_include_pad", "track_running_stats", "normalized_shape"),
    *("start_dim", "end_dim"),
)
IDLE = ("Dropout", "Identity", "GELU", "AvgPool2d")  # may be where our model has no module

Array = NDArray[Any]


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote: `form` says what the file held, `heads_from` who told their number."""

    config: ModelConfig
    parameters: int
    sha256: str
    form: str
    heads_from: str


@dataclass
class _Found:
    """Tensors and modules of a checkpoint by dotted name; a plain state_dict has no modules."""

    form: str
    tensors: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, Made] = field(default_factory=dict)


def convert(source: str | Path, target: str | Path, *, heads: int | None = None) -> Converted:
    """Write the model of a published checkpoint as a safetensors file.

    Args:
        source: a pickled DataParallel, its bare module, or a state_dict with or without `module.`
            before its names; float32, in torch's zip format.
        target: the file to write; replaced as a whole or not at all.
        heads: attention heads; a state_dict does not say them (default: 6).

    Raises:
        ModelError: the file is missing, damaged or not such a checkpoint, names a global that it
            does not need, or would compute something else than our model.
        OSError: the target cannot be written.
    """
    path = Path(source)
    if Path(target).is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder, name a file in it")
    try:
        data = _read(path)
        if Path(target).exists() and os.path.samefile(path, target):
            raise ModelError("would be overwritten by the result: name another file for that")
        archive = Archive(len(data), lambda offset, length: data[offset : offset + length])
        found = _find(content(archive.read("data.pkl", MAX_PICKLE), ALLOWED))
        tensors = _Tensors(archive, len(data)).load(found.tensors)
        heads, heads_from = _heads(found, heads)
        config = _infer(found, tensors, heads)
        _check_twin(tensors)
        model = _assembled(config, tensors, heads_from)
        _compare(model, found.modules)
    except (FormatError, Unusual, ModelError) as error:
        raise ModelError(f"{path}: {printable(str(error), 300)}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    done = Converted(config, parameters, hashlib.sha256(data).hexdigest(), found.form, heads_from)
    provenance = {
        "made_by": "cosmic model convert",
        "source": path.name,
        "source_sha256": done.sha256,
        "source_form": done.form,
        "heads_from": done.heads_from,
    }
    save_model(model, target, provenance)
    return done


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ModelError("is a folder, expected a file" if path.is_dir() else "no such file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise ModelError(f"more than {MAX_BYTES:,} bytes, which no AstroMAE has")
        return file.read(size)


def _find(root: Any) -> _Found:
    if isinstance(root, dict):
        for name, value in root.items():
            if isinstance(value, dict):
                raise ModelError(
                    f"holds a dict with {printable(str(name))!r} in it, expected a module or its "
                    "state_dict: save that alone with torch.save"
                )
        return _Found("a state_dict", _without_prefix(root))
    form = "the module"
    if isinstance(root, Made) and root.name == PARALLEL:
        root, form = _dict(root, "_modules").get("module"), "a DataParallel module"
    if not isinstance(root, Made) or root.name != REGRESSOR:
        what = root.name if isinstance(root, Made) else type(root).__name__
        raise ModelError(f"holds {what}, expected AstroMAE's ViT_Astro or a state_dict")
    found = _Found(form)
    for name, module in _walk(root):
        found.modules[name] = module
        for kind in ("_parameters", "_buffers"):
            values = _dict(module, kind)
            _check_number(len(found.tensors) + len(values))
            for leaf, value in values.items():
                if value is not None:
                    found.tensors[_join(name, leaf)] = value
    return found


def _without_prefix(state: dict[Any, Any]) -> dict[str, Any]:
    names = [str(name) for name in state]
    cut = len("module.") if names and all(name.startswith("module.") for name in names) else 0
    return {name[cut:]: value for name, value in zip(names, state.values(), strict=True)}


def _walk(root: Made) -> Iterator[tuple[str, Made]]:
    """Every module under its dotted name; one under two names comes twice.

    In a file that lies, modules can contain each other, or all of them the same thousand.
    """
    todo = [("", root)]
    for count in itertools.count():
        if not todo:
            return
        name, module = todo.pop()
        yield name, module
        children = _dict(module, "_modules")
        _check_number(count + len(todo) + len(children))
        for leaf, child in children.items():
            if isinstance(child, Made):
                todo.append((_join(name, leaf), child))
            elif child is not None:
                raise ModelError(f"{printable(_join(name, leaf))} is no module")


def _check_number(names: int) -> None:
    if names > MAX_NAMES:
        raise ModelError(f"more than {MAX_NAMES:,} modules or tensors, which no AstroMAE has")


def _join(name: str, leaf: str | int) -> str:
    joined = f"{name}.{leaf}" if name else str(leaf)
    if len(joined) > MAX_NAME:
        raise ModelError(f"has a name of more than {MAX_NAME} characters: {printable(joined)}")
    return joined


def _dict(module: Made, key: str) -> dict[Any, Any]:
    value = module.state.get(key, {})
    if type(value) is not dict:
        raise ModelError(f"damaged: {module.name}.{key} is no dict")
    return value


class _Tensors:
    """Arrays of an archive's tensors; all of them together at most twice the file's size."""

    def __init__(self, archive: Archive, size: int) -> None:
        self._archive = archive
        self._storages: dict[str, bytes] = {}
        self._left = 2 * size  # a state_dict has one layer under two names

    def load(self, found: dict[str, Any]) -> dict[str, Array]:
        known: dict[int, Array] = {}  # a module under two names has the same tensors
        for name, value in found.items():
            if id(value) not in known:
                known[id(value)] = self._array(value, printable(name))
        return {name: known[id(value)] for name, value in found.items()}

    def _array(self, value: Any, name: str) -> Array:
        if isinstance(value, Made) and value.name in PARAMETERS and value.args:
            value = value.args[0]
        if not isinstance(value, Made) or value.name != TENSOR:
            raise ModelError(f"{name} is no tensor")
        match value.args:
            case (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_):
                return self._view(storage, offset, shape, stride, name)
        raise ModelError(f"{name} is no dense tensor")

    def _view(self, storage: Storage, offset: int, shape: Any, stride: Any, name: str) -> Array:
        same = len(shape) == len(stride) <= 4
        if not same or any(type(n) is not int for n in (offset, *shape, *stride)):
            raise ModelError(f"{name} has no shape of a tensor")
        if min(shape, default=1) < 1 or min(offset, *stride, 0) < 0:
            raise ModelError(f"{name} has an empty or negative shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if last >= storage.numel or math.prod(shape) > storage.numel:
            raise ModelError(f"{name} reaches beyond its storage of {storage.numel} numbers")
        dtype = NUMBERS.get(DTYPES[storage.type])
        if dtype is None:
            kind = DTYPES[storage.type]
            raise ModelError(f"{name} is {kind}, expected float32: save the model's .float()")
        self._left -= math.prod(shape) * dtype.itemsize
        if self._left < 0:
            raise ModelError("its tensors claim more bytes than the file has")
        steps = [dtype.itemsize * min(step, storage.numel) for step in stride]
        raw = self._storage(storage, dtype)
        view: Array = np.ndarray(shape, dtype, raw, offset * dtype.itemsize, steps)
        if dtype.kind == "f" and not np.isfinite(view).all():
            raise ModelError(f"{name} holds NaN or infinity: the checkpoint is damaged")
        return view.copy()  # writable, aligned, in order

    def _storage(self, storage: Storage, dtype: np.dtype[Any]) -> bytes:
        if storage.key not in self._storages:
            self._storages[storage.key] = self._archive.read(f"data/{storage.key}")
        raw = self._storages[storage.key]
        if len(raw) != storage.numel * dtype.itemsize:
            raise ModelError(
                f"damaged: storage {printable(storage.key)} claims {storage.numel} numbers, "
                f"it has {len(raw)} bytes"
            )
        return raw


def _heads(found: _Found, given: int | None) -> tuple[int, str]:
    told = [m.state.get("num_heads") for m in found.modules.values() if m.name == ATTENTION]
    numbers = {number if type(number) is int else None for number in told}
    if len(numbers) > 1:
        raise ModelError("its attention layers differ in their number of heads")
    number = numbers.pop() if numbers else None
    if number is None:
        return (HEADS, "default") if given is None else (given, "--heads")
    if given not in (None, number):
        raise ModelError(f"says itself that it has {number} heads: leave out --heads")
    return number, "checkpoint"


def _infer(found: _Found, tensors: dict[str, Array], heads: int) -> ModelConfig:
    """Sizes by shape; whether all other shapes fit them is for `assemble` to see."""

    def size(name: str, dimension: int) -> int:
        if name not in tensors or tensors[name].ndim <= dimension:
            raise ModelError(f"has no {name} of AstroMAE's shape: not an AstroMAE checkpoint")
        return int(tensors[name].shape[dimension])

    width, patch = size("cls_token", 2), size("patch_embed.proj.weight", 2)
    vision = "inception_model.vis_inception"
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    return ModelConfig(
        image_size=math.isqrt(size("pos_embed", 1) - 1) * patch,
        bands=size("patch_embed.proj.weight", 1),
        patch=patch,
        width=width,
        depth=len(blocks),
        heads=heads,
        mlp_ratio=size("blocks.0.mlp.fc1.weight", 0) // width,
        pcm_groups=width // size("blocks.0.PCM.0.weight", 1),
        pcm_kernel=size("blocks.0.PCM.0.weight", 2),
        stem=size("inception_model.conv2d_init.weight", 0),
        inception=tuple(size(f"{vision}.{i}.branch1.conv.weight", 0) for i in (2, 3, 5, 6, 8)),
        magnitude_width=size("inception_model.magnitude_block.0.weight", 0),
        branch_width=size("vit_block.0.weight", 0),
        head_width=size("concat_block.0.weight", 0),
        norm_eps=_norm_eps(found),
    )


def _norm_eps(found: _Found) -> float:
    norm = found.modules.get("blocks.0.norm1")
    eps = norm.state.get("eps", NORM_EPS) if norm else NORM_EPS
    if type(eps) is not float or not 0 < eps < 1:
        raise ModelError("damaged: the eps of blocks.0.norm1 is no small number")
    return eps


def _assembled(config: ModelConfig, tensors: dict[str, Array], heads_from: str) -> AstroMAE:
    try:
        return assemble(config, {k: torch.from_numpy(v) for k, v in tensors.items()})
    except ModelError as error:
        if heads_from != "default":
            raise
        guess = f"a state_dict does not say how many heads; {HEADS} were taken: give --heads"
        raise ModelError(f"{error} ({guess}, if there are others)") from error


def _check_twin(tensors: dict[str, Array]) -> None:
    for leaf in ("weight", "bias"):
        one, two = tensors.get(TWIN + leaf), tensors.get(TWIN_OF + leaf)
        if one is None or two is None or not np.array_equal(one, two):
            raise ModelError(f"{TWIN}{leaf} and {TWIN_OF}{leaf} must be there, and be the same")


def _compare(model: AstroMAE, found: dict[str, Made]) -> None:
    """Refuse modules that compute something else than ours of the same names."""
    ours = dict(model.named_modules(remove_duplicate=False))
    for name, theirs in found.items():
        kind = theirs.name.rpartition(".")[2]
        expected = dict(FACTS.get(kind, {}))
        if kind == "Attention":
            expected["scale"] = (model.config.width // model.config.heads) ** -0.5
        if name in ours:
            expected |= _expected(ours[name], kind, name)
        elif kind not in IDLE:
            raise ModelError(f"{printable(name)} is a {kind}, which AstroMAE does not have there")
        for key, value in expected.items():
            told = theirs.state.get(key, value)
            if not _same(told, value):
                raise ModelError(
                    f"{printable(name)} has another {key} than {value}, which our model cannot do"
                )


def _expected(ours: nn.Module, kind: str, name: str) -> dict[str, object]:
    own = NAMES.get(type(ours).__name__, type(ours).__name__)
    if kind != own and {kind, own} != {"ModuleList", "Sequential"}:
        raise ModelError(f"{printable(name)} is a {kind}, where AstroMAE has a {own}")
    if isinstance(ours, InceptionBlock):
        return {"is_custom": not ours.wide}
    if not type(ours).__module__.startswith("torch.nn."):
        return {}
    return {key: getattr(ours, key) for key in TORCH_FACTS if hasattr(ours, key)}


def _same(told: Any, value: object) -> bool:
    """Whether a stranger's value is ours, where torch takes 2 for (2, 2)."""
    want = value if isinstance(value, tuple) else (value,)
    have = told if isinstance(told, tuple) else (told,)
    size = max(len(want), len(have))
    want, have = (part * size if len(part) == 1 else part for part in (want, have))
    return len(have) == len(want) and all(map(_same_number, have, want))


def _same_number(told: Any, value: object) -> bool:
    if isinstance(told, float) and isinstance(value, float):
        return math.isclose(told, value)
    return bool(told == value)
