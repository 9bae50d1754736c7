"""The engines without torch, on files of `cosmic model export`: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lambda_worker import exported, storage
from lambda_worker.engine import (
    DEMO_MODEL,
    LIBRARIES,
    Array,
    Engine,
    EngineError,
    ModelError,
    Precision,
    open_engine,
)
from lambda_worker.model import AstroMAE, ModelConfig
from lambda_worker.model_file import load_model, save_model
from tests.worker.worker_data import SMALL, tensors, trained
from workflow import export as export_module
from workflow.export import export

pytestmark = pytest.mark.timeout(180)  # an export takes half a minute, more beside other tests

ENGINES: list[Engine] = ["onnx", "openvino"]
DEMO_EXPORT = DEMO_MODEL.with_suffix(".onnx")


def rows(count: int) -> tuple[Array, Array]:
    images, magnitudes, _ = tensors(count)
    return images.numpy(), magnitudes.numpy()


def by_torch(model: AstroMAE, images: Array, magnitudes: Array) -> Array:
    with torch.inference_mode():
        found: Array = model(torch.from_numpy(images), torch.from_numpy(magnitudes)).numpy()
    return found


def cosmic(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workflow", *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the published size, with random weights, and its export beside it."""
    path = tmp_path_factory.mktemp("full") / "model.safetensors"
    save_model(trained(ModelConfig()), path)
    done = cosmic("model", "export", str(path))  # not in here: pytest takes all that torch logs
    assert done.returncode == 0, done.stderr
    size, difference, use = done.stdout.splitlines()
    assert re.fullmatch(rf"{path.with_suffix('.onnx')}: \d\d\.\d MB", size)
    assert re.fullmatch(r"largest .* on 48 rows: \d\.\de-0[78]", difference)
    assert use.endswith("model.onnx --engine onnx")
    assert set(re.findall("s  (?:  )?(.*?): ", done.stderr)) == {"export"}  # and no warnings
    assert len(done.stderr.splitlines()) >= 4
    return path


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo model and its export, to be spoilt."""
    for path in (DEMO_MODEL, DEMO_EXPORT):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / DEMO_MODEL.name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 3])
def test_full_size_is_exact_and_rows_do_not_depend_on_their_batch(
    full: Path, engine: Engine, threads: int
) -> None:
    images, magnitudes = rows(67)
    predict = open_engine(full, engine=engine, threads=threads)
    found = predict(images, magnitudes)
    assert found.dtype == np.float32
    assert found.std() > 1e-3  # else nothing is compared
    assert abs(found - by_torch(load_model(full), images, magnitudes)).max() <= 2e-6
    for size in (1, 16, 64):
        parts = [
            predict(images[i : i + size], magnitudes[i : i + size]) for i in range(0, 67, size)
        ]
        assert np.array_equal(np.concatenate(parts), found), size


@pytest.mark.parametrize("engine", ENGINES)
def test_the_packaged_export_is_of_the_packaged_model(engine: Engine) -> None:
    assert DEMO_EXPORT.stat().st_size < 2_000_000
    exported.check(DEMO_EXPORT)  # by its fingerprint
    images, magnitudes = rows(32)
    found = open_engine(DEMO_MODEL, engine=engine, threads=1)(images, magnitudes)
    assert abs(found - by_torch(load_model(DEMO_MODEL), images, magnitudes)).max() <= 2e-6
    config = json.loads(exported.read_metadata(DEMO_EXPORT)["config"])
    assert config["depth"] == load_model(DEMO_MODEL).config.depth


def test_openvino_takes_bf16_when_told_only() -> None:
    from openvino import Core

    if "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no instructions for bfloat16")
    images, magnitudes = rows(64)
    exact = by_torch(load_model(DEMO_MODEL), images, magnitudes)
    found = open_engine(DEMO_MODEL, engine="openvino", precision="bf16", threads=1)(*rows(64))
    assert 1e-5 < abs(found - exact).max() < 3e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_cannot_be_written_to(engine: Engine) -> None:
    """As a mapped file's are, at any address."""
    images, magnitudes = rows(9)
    room = np.empty(images.size + 1, np.float32)[1:]
    odd = room.reshape(images.shape)
    odd[:] = images
    odd.flags.writeable = magnitudes.flags.writeable = False
    predict = open_engine(DEMO_MODEL, engine=engine, threads=1)
    assert np.array_equal(predict(odd, magnitudes), predict(images.copy(), magnitudes))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_result_stays_when_the_next_batch_comes(engine: Engine) -> None:
    images, magnitudes = rows(8)
    predict = open_engine(DEMO_MODEL, engine=engine, threads=1)
    first = predict(images[:4], magnitudes[:4])
    before = first.copy()
    predict(images[4:], magnitudes[4:])
    assert np.array_equal(first, before)


IN_A_PROCESS = """
import os, sys, time
import numpy as np
from lambda_worker.engine import DEMO_MODEL, open_engine
engine, threads = sys.argv[1], int(sys.argv[2])
images, magnitudes = np.ones((96, 5, 32, 32), np.float32), np.full((96, 5), 18, np.float32)
before = len(os.listdir("/proc/self/task"))
predict = open_engine(DEMO_MODEL, engine=engine, threads=threads)
for _ in range(3):
    predict(images, magnitudes)
more = len(os.listdir("/proc/self/task")) - before
cpu = time.process_time()
time.sleep(0.2)
idle = time.process_time() - cpu
print(more, idle, *sorted({name.split(".")[0] for name in sys.modules}))
"""


def in_a_process(*words: str) -> list[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, *words],
        capture_output=True,
        text=True,
        env=settings,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_are_as_given_and_torch_stays_out(engine: Engine) -> None:
    one, idle, *modules = in_a_process(engine, "1")
    assert float(idle) < 0.1  # nobody spins when there is nothing to do
    assert LIBRARIES[engine] in modules
    others = set(LIBRARIES.values()) - {LIBRARIES[engine]}
    assert not {"safetensors", "onnx", *others} & set(modules)
    # Beside some that wait: in the one the caller's own works, in the other ours and it waits.
    two, idle, *_ = in_a_process(engine, "2")
    assert int(two) - int(one) == {"onnx": 2, "openvino": 1}[engine]
    assert float(idle) < 0.1


def test_a_stale_export_is_refused(demo: Path) -> None:
    exported.check(demo.with_suffix(".onnx"))
    save_model(trained(SMALL), demo)
    for engine in ENGINES:
        with pytest.raises(ModelError, match="from another model than model"):
            open_engine(demo, engine=engine)
    for chosen in ("onnx", "openvino", "auto"):
        with pytest.raises(ModelError, match=f"cosmic model export {demo}"):
            exported.choose(chosen, "fp32", str(demo))  # type: ignore[arg-type]


def test_an_export_needs_no_model_beside_it(demo: Path) -> None:
    export_alone = demo.with_suffix(".onnx")
    demo.unlink()
    assert len(open_engine(export_alone, engine="onnx", threads=1)(*rows(3))) == 3
    assert exported.choose("onnx", "fp32", str(export_alone)) == ("onnx", str(export_alone))
    with pytest.raises(EngineError, match=r"torch: reads \.safetensors files, not"):
        exported.choose("torch", "fp32", str(export_alone))


def test_no_export(demo: Path) -> None:
    demo.with_suffix(".onnx").unlink()
    text = f"no export at .*/model.onnx; make it: cosmic model export {demo}"
    with pytest.raises(ModelError, match=text):
        open_engine(demo, engine="openvino")
    with pytest.raises(ModelError, match=text):
        exported.choose("onnx", "fp32", str(demo))
    assert exported.choose("auto", "fp32", str(demo)) == ("torch", str(demo))


Spoil = Callable[[bytes], bytes]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda data: data[:-1], "no whole ONNX file"),
        (lambda data: data[: len(data) // 2], "no whole ONNX file"),
        (lambda data: b"", "none that cosmic model export wrote"),
        (lambda data: b"\x80" * 20, "no whole ONNX file"),
        (lambda data: b"PK\x03\x04" + data, "no whole ONNX file"),
        (lambda data: data.replace(b"cosmic-astromae-onnx-1", b"cosmic-astromae-onnx-2"), "wrote"),
        (lambda data: data.replace(b"LayerNormalization", b"LayerNormalisation"), "cannot be load"),
    ],
    ids=["cut", "halved", "empty", "endless", "zip", "another format", "unknown operation"],
)
def test_a_file_that_is_no_export(demo: Path, engine: Engine, spoil: Spoil, complaint: str) -> None:
    path = demo.with_suffix(".onnx")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ModelError, match=complaint) as caught:
        open_engine(demo, engine=engine, threads=1)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_foreign_onnx_file(tmp_path: Path, engine: Engine) -> None:
    number = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [number], [result])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="an ONNX file, but none that cosmic model export wrote"):
        open_engine(tmp_path / "m.onnx", engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    package = LIBRARIES[engine]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        EngineError, match=rf"{package} is not .*: pip install 'cosmic-fmi\[{engine}"
    ):
        open_engine(DEMO_MODEL, engine=engine)


@pytest.mark.parametrize(
    ("missing", "precision", "chosen"),
    [
        ([], "fp32", "openvino"),
        ([], "bf16", "openvino"),
        (["openvino"], "fp32", "onnx"),
        (["openvino"], "bf16", "torch"),
        (["openvino", "onnxruntime"], "fp32", "torch"),
        (["onnxruntime"], "fp32", "openvino"),
    ],
)
def test_auto_takes_the_fastest_that_is_there(
    monkeypatch: pytest.MonkeyPatch, missing: list[str], precision: Precision, chosen: Engine
) -> None:
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    place = DEMO_MODEL if chosen == "torch" else DEMO_EXPORT
    assert exported.choose("auto", precision, str(DEMO_MODEL)) == (chosen, str(place))


def test_onnx_has_no_bf16() -> None:
    with pytest.raises(EngineError, match="onnx: computes in fp32, not bf16"):
        exported.choose("onnx", "bf16", str(DEMO_MODEL))
    with pytest.raises(EngineError, match="onnx: computes in fp32, not bf16"):
        exported.open_exported(DEMO_MODEL, "onnx", "bf16", 1)


def test_the_export_in_a_bucket(bucket: Path) -> None:
    model = "s3://bucket/models/m.safetensors"
    storage.write(model, DEMO_MODEL.read_bytes())
    assert exported.choose("auto", "fp32", model) == ("torch", model)
    with pytest.raises(ModelError, match=r"no export at s3://bucket/models/m\.onnx"):
        exported.choose("openvino", "fp32", model)
    storage.write("s3://bucket/models/m.onnx", DEMO_EXPORT.read_bytes())
    assert exported.choose("auto", "fp32", model) == ("openvino", "s3://bucket/models/m.onnx")


@pytest.fixture
def untranslated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's slow part left out: every model becomes the demo model's export."""
    monkeypatch.setattr(export_module, "_translate", lambda plain, facts: DEMO_EXPORT.read_bytes())


def test_what_the_command_line_says_of_errors(tmp_path: Path) -> None:
    done = cosmic("model", "export", str(tmp_path / "none.safetensors"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"Error: no model file at {tmp_path}/none.safetensors"
    assert done.stdout == ""


@pytest.mark.usefixtures("untranslated")
def test_an_export_that_predicts_otherwise_is_not_written(tmp_path: Path) -> None:
    model = load_model(DEMO_MODEL)
    with torch.no_grad():
        model.concat_block[-1].bias += 1e-5
    save_model(model, tmp_path / "m.safetensors")
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(ModelError, match=r"differ by up to 1\.0e-05 from torch's"):
        export(tmp_path / "m.safetensors")
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("package", ["onnxscript", "onnx"])
def test_a_package_that_the_export_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=rf"{package} is not .*: pip install 'cosmic-fmi\[export"):
        export(DEMO_MODEL, tmp_path / "m.onnx")


@pytest.mark.usefixtures("untranslated")
def test_onnxruntime_checks_the_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        EngineError, match=r"onnxruntime is not .*: pip install 'cosmic-fmi\[export"
    ):
        export(DEMO_MODEL, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
