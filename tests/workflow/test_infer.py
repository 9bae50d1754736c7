"""`cosmic infer`: what it reports and writes, and how it fails."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launched import until
from pyarrow import parquet
from torch.utils.data import TensorDataset

from lambda_worker import batching, engine, handlers, inference, storage
from lambda_worker.dataset import DatasetError
from lambda_worker.storage import StorageError
from workflow import predictions
from workflow.demo import data_path
from workflow.infer import InferPlan, infer
from workflow.infer_view import print_report
from workflow.progress import PlainView, View

ROWS = 30
Cosmic = Callable[..., tuple[int, str, str]]

KEYS = {  # as docs/infer.md lists them; programs rely on them
    *("data", "model", "device", "engine", "precision", "precision_max_dz", "precision_rows"),
    *("batch_size", "batch_size_asked", "calibration", "batches"),
    *("rows", "rows_excluded", "excluded_rows"),
    *("seconds", "seconds.load", "seconds.inference", "seconds.cpu"),
    *("batch_seconds", "batch_seconds.mean", "batch_seconds.p50", "batch_seconds.p95"),
    *("rows_per_second", "bits_per_second"),
    *("memory_mb", "memory_mb.peak", "memory_mb.beyond_imports"),
    *("metrics", "metrics.mae", "metrics.mse", "metrics.bias", "metrics.nmad", "metrics.r2"),
    *("predictions", "plot", "profile"),
    *("environment", "environment.cpu", "environment.architecture", "environment.cores"),
    *("environment.cores_usable", "environment.threads", "environment.ram_gb"),
    *("environment.platform", "environment.versions", "environment.versions.python"),
    *("environment.versions.numpy", "environment.versions.torch"),
    "environment.versions.cosmic-fmi",
}


def rows(count: int, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    images = torch.rand((count, 5, 32, 32), generator=random) * 3
    magnitudes = 17 + torch.rand((count, 5), generator=random)
    return [images, magnitudes, 0.05 + 0.3 * torch.rand(count, generator=random)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files."""
    folder = tmp_path_factory.mktemp("data")
    torch.save(TensorDataset(*rows(ROWS - 10, 1)), folder / "2.pt")
    torch.save(TensorDataset(*rows(10, 2)), folder / "10.pt")
    return folder


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A file of 8 rows, of which three cannot be used."""
    tensors = rows(8, 3)
    tensors[0][1, 2, 3, 4] = torch.nan
    tensors[1][4, 0] = torch.inf
    tensors[2][7] = -1
    torch.save(TensorDataset(*tensors), tmp_path / "bad.pt")
    return tmp_path / "bad.pt"


@pytest.fixture
def cosmic(tmp_path: Path) -> Cosmic:
    """Run `cosmic infer` as a shell does, in an empty folder."""

    def run(*words: str, **more: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-c", "from workflow.__main__ import main; main()", "infer", *words],
            cwd=tmp_path,
            env={**environment(), **more},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}


def report(data: Path | str, **fields: Any) -> dict[str, Any]:
    with PlainView() as view:
        return infer(InferPlan(data=str(data), threads=1, **fields), view)


def keys(value: dict[str, Any], prefix: str = "") -> set[str]:
    inner = [keys(v, f"{prefix}{k}.") for k, v in value.items() if isinstance(v, dict)]
    return {prefix + key for key in value}.union(*inner)


# -- the report ----------------------------------------------------------------------------------


def test_json_has_the_documented_keys_and_nothing_else_is_on_stdout(
    cosmic: Cosmic, data: Path
) -> None:
    code, out, err = cosmic("--data", str(data), "--json", "--threads", "1")
    assert code == 0, err
    answer = json.loads(out)
    assert keys(answer) == KEYS
    assert answer["environment"]["threads"] == 1
    documented = Path(__file__).parents[2].joinpath("docs/infer.md").read_text()
    assert not [key for key in KEYS if f"`{key.rpartition('.')[2]}`" not in documented]


def test_the_numbers_fit_together(data: Path) -> None:
    found = report(data, batch_size=8)
    assert (found["rows"], found["batches"], found["batch_size"]) == (ROWS, 4, 8)
    seconds, each = found["seconds"]["inference"], found["batch_seconds"]
    assert each["mean"] == pytest.approx(seconds / 4)
    assert 0 < each["p50"] <= each["p95"]
    assert found["rows_per_second"] == pytest.approx(ROWS / seconds)
    assert found["bits_per_second"] == pytest.approx(ROWS * 32 * 5 * 1025 / seconds)
    assert 0 < found["memory_mb"]["beyond_imports"] < found["memory_mb"]["peak"]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["profile"] is found["plot"] is found["predictions"] is None


def test_metrics_are_those_of_a_run_whatever_the_batch_size(data: Path, tmp_path: Path) -> None:
    plan = handlers.init({"data": str(data), "results": str(tmp_path), "world_size": 2})
    for task in plan["ranks"]:
        handlers.infer(task)
    expected = handlers.summarize(plan)["summary"]["metrics"]
    for size in (1, 7, 32):
        found = report(data, batch_size=size)["metrics"]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_lower_precision_says_what_it_costs(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "has_bf16", lambda: True)  # else slow, but possible
    found = report(data, precision="bf16")
    assert found["precision_rows"] == ROWS
    assert 0 < found["precision_max_dz"] < 0.05
    print_report(found)
    assert f"from fp32's, on {ROWS} rows predicted twice." in capsys.readouterr().out


def test_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(TensorDataset(*rows(0, 0)), tmp_path / "none.pt")
    found = report(
        tmp_path / "none.pt",
        batch_size="auto",
        plot=str(tmp_path / "z.png"),
        profile=str(tmp_path),
        predictions=str(tmp_path / "z.parquet"),
    )
    assert (found["batches"], found["rows_per_second"]) == (0, 0)
    assert set(found["metrics"].values()) == {None}
    assert found["plot"] is found["profile"] is None
    assert parquet.read_table(tmp_path / "z.parquet").num_rows == 0
    print_report(found)
    assert "no rows" in capsys.readouterr().out


def test_batch_size_auto_is_chosen_and_told(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = np.array([100.0, 200, 190, np.inf, np.inf, np.inf, np.inf])
    trials = batching.Trials(rates, (10**9, "cgroup"), 1.25)
    monkeypatch.setattr(batching, "calibrate", lambda predict, rows: trials)
    found = report(data, batch_size="auto")
    assert (found["batch_size"], found["batch_size_asked"], found["batches"]) == (16, "auto", 2)
    assert found["calibration"] == batching.report(trials, rates)
    print_report(found)
    text = capsys.readouterr().out
    assert "Batch size auto: 16 rows, after 1.2 s of trials" in text
    assert "8: 100, 16: 200, 32: 190\n" in text


@pytest.mark.parametrize("width", ["80", "120"])
def test_tables_are_aligned_and_fit(
    bad: Path, width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.chdir(bad.parent)
    found = report(bad, profile=str(bad.parent))
    found["rows_per_second"] = 12_345.6
    found["environment"].update(cpu="AMD EPYC", platform="Linux")
    print_report(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    table = lines[: lines.index("")]
    units = (" s ", " ms ", " rows/s", " Mbit/s", " MB ")
    starts = {row.index(unit) for unit in units for row in table if unit in row}
    assert len(starts) == 1  # they stand below each other, and the numbers end before them
    assert any(row.startswith("  throughput") and " 12,345.6 " in row for row in table)
    assert "Profile: 8 rows once more, in batches of the same size" in lines
    assert next(row.split()[-1] for row in lines if "aten::" in row).endswith("%")


def test_rows_that_are_not_finite_are_named(bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(bad)
    assert (found["rows"], found["rows_excluded"]) == (8, 3)
    named = [(row["file"], row["row"], row["part"]) for row in found["excluded_rows"]]
    parts = {1: "images", 4: "magnitudes", 7: "redshift"}
    assert named == [(str(bad), row, part) for row, part in parts.items()]
    print_report(found)
    text = capsys.readouterr().out
    assert "Warning: no metric counts 3 of 8 rows" in text
    assert "bad.pt row 4 (magnitudes)" in text


def test_strict_makes_them_an_error(bad: Path) -> None:
    place = bad.parent / "z.csv"
    with pytest.raises(DatasetError, match=r"3 of 8 rows cannot be used.*bad\.pt row 1 \(images\)"):
        report(bad, strict=True, predictions=str(place))
    assert not place.exists()


# -- files ---------------------------------------------------------------------------------------


def test_predictions_as_parquet(data: Path, tmp_path: Path) -> None:
    report(data, batch_size=8, predictions=str(tmp_path / "z.parquet"))
    table = parquet.read_table(tmp_path / "z.parquet").to_pydict()
    assert tuple(table) == predictions.COLUMNS
    assert [Path(name).name for name in table["file"]] == ["2.pt"] * 20 + ["10.pt"] * 10
    assert table["row"] == [*range(20), *range(10)]
    z_spec, z_phot = np.array(table["z_spec"]), np.array(table["z_phot"])
    assert np.array_equal(z_spec[:20], rows(20, 1)[2].double().numpy())
    assert np.allclose(table["dz"], (z_phot - z_spec) / (1 + z_spec))
    assert not any(table["excluded"])
    assert set(table["flaw"]) == {None}


@pytest.mark.filterwarnings("error")
def test_excluded_rows_are_marked(bad: Path, tmp_path: Path) -> None:
    report(bad, predictions=str(tmp_path / "z.csv"))
    report(bad, predictions=str(tmp_path / "z.parquet"))
    with (tmp_path / "z.csv").open() as file:
        lines = list(csv.DictReader(file))
    flaws = ["", "images", "", "", "magnitudes", "", "", "redshift"]
    assert [line["flaw"] for line in lines] == flaws
    assert [line["excluded"] for line in lines] == [["false", "true"][bool(f)] for f in flaws]
    for line, flaw in zip(lines, flaws, strict=True):
        assert (line["z_phot"] == "nan") == (line["dz"] == "nan") == bool(flaw)
    same = parquet.read_table(tmp_path / "z.parquet").to_pydict()
    for name in ("z_spec", "z_phot", "dz"):
        kept = np.array([float(line[name]) for line in lines])
        assert np.array_equal(kept.astype(np.float32), np.float32(same[name]), equal_nan=True)


def test_a_full_disk_leaves_the_older_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "z.csv"
    place.write_text("older")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*z\.csv: No space left.*make room"):
        report(data, predictions=str(place))
    assert place.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["z.csv"]


def test_the_plot(data: Path, tmp_path: Path) -> None:
    assert report(data, plot=str(tmp_path / "a/z.png"))["plot"] == str(tmp_path / "a/z.png")
    assert (tmp_path / "a/z.png").read_bytes().startswith(b"\x89PNG")


def test_the_profile_comes_after_the_timed_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    timed, run = [], inference.run

    def watched(*words: Any) -> inference.Inferred:
        timed.append(torch.autograd.profiler._is_profiler_enabled)
        return run(*words)

    monkeypatch.setattr(inference, "run", watched)
    found = report(data, batch_size=8, profile=str(tmp_path / "profile"))["profile"]
    assert timed == [False]
    assert (found["batches"], found["rows"]) == (3, 24)
    names = [each["name"] for each in found["operations"]]
    assert any("conv" in name for name in names)
    shares = [each["share"] for each in found["operations"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1.000001
    trace = json.loads((tmp_path / "profile/trace.json").read_text())
    assert any(event.get("name") == names[0] for event in trace["traceEvents"])
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["trace.json"]
    assert "profiler" not in capfd.readouterr().err.replace("torch's profiler", "")


def test_data_and_results_on_s3(bucket: Path, data: Path) -> None:
    for name in ("2.pt", "10.pt"):
        storage.write(f"s3://bucket/set/{name}", (data / name).read_bytes())
    model = Path(handlers.__file__).with_name("demo_model") / "model.safetensors"
    storage.write("s3://bucket/m.safetensors", model.read_bytes())
    found = report(
        "s3://bucket/set",
        model="s3://bucket/m.safetensors",
        predictions="s3://bucket/out/z.parquet",
        plot="s3://bucket/out/z.png",
    )
    assert found["metrics"] == pytest.approx(report(data)["metrics"], abs=1e-6)
    assert {path.name for path in (bucket / "out").iterdir()} >= {"z.parquet", "z.png"}


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "cuda"], "'cuda' is not supported, only cpu is"),
        (["--batch-size", "0"], "'0' is neither a number of rows, 1 or more, nor auto"),
        (["--batch-size", "many"], "'many' is neither"),
        (["--data", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--model", "nowhere"], "nowhere: no such file"),
        (["--predictions", "z.txt"], "z.txt: expected a name that ends with .parquet or .csv"),
        (["--plot", "z.jpg"], "z.jpg: expected a name that ends with .png"),
        (["--plot", "/etc/passwd/z.png"], "/etc/passwd is not a folder"),
        (["--engine", "tensorflow"], "'tensorflow'"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_wrong_usage_names_the_option(cosmic: Cosmic, words: list[str], says: str) -> None:
    code, out, err = cosmic(*words)
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())
    assert words[0] in err
    assert "Traceback" not in err


def test_parquet_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "find_spec", lambda name: None)
    assert "pip install 'cosmic-fmi[parquet]'" in str(predictions.problem("z.parquet"))
    assert predictions.problem("z.csv") is None


@pytest.mark.parametrize(
    ("option", "kind"), [("--data", "DatasetError"), ("--model", "ModelError")]
)
def test_a_file_that_cannot_be_used_is_one_line(
    cosmic: Cosmic, data: Path, tmp_path: Path, option: str, kind: str
) -> None:
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04nonsense")
    code, out, err = cosmic("--data", str(data), option, "broken.pt", "--json")
    assert code == 1
    error = json.loads(out)["error"]
    assert (error["type"], error["who"]) == (kind, "cosmic")
    assert err.splitlines()[-1] == f"Error: {error['message']}"
    assert "broken.pt" in error["message"]
    assert "Traceback" not in err


def test_the_demo_data_are_made_once(cosmic: Cosmic, data: Path, tmp_path: Path) -> None:
    place = tmp_path / data_path("small", "test", 0)
    place.parent.mkdir()
    place.write_bytes((data / "10.pt").read_bytes())
    code, out, err = cosmic("--json")
    assert code == 0, err
    assert f"{data_path('small', 'test', 0)} is there already" in err
    assert json.loads(out)["rows"] == 10


def test_ctrl_c_leaves_no_half_file(data: Path, tmp_path: Path) -> None:
    torch.save(TensorDataset(*rows(4000, 1)), tmp_path / "many.pt")
    (tmp_path / "tmp").mkdir()
    words = ("infer", "--data", "many.pt", "--predictions", "z.csv", "--batch-size", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", "from workflow.__main__ import main; main()", *words],
        cwd=tmp_path,
        env={**environment(), "TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    until(lambda: "infer: 4,000 rows" in process.stderr.readline())  # type: ignore[union-attr]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == (
        "Stopped by SIGINT; nothing is left running, no file half written."
    )
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"many.pt", "tmp"}
    assert not list((tmp_path / "tmp").iterdir())


def test_the_view_sees_every_batch(data: Path) -> None:
    class Seen(PlainView):
        def update(self, who: str, stage: str, rows: int, of: int) -> None:
            seen.append((stage, rows, of))

    seen: list[tuple[str, int, int]] = []
    view: View = Seen()
    with view:
        infer(InferPlan(data=str(data), batch_size=16, threads=1), view)
    assert seen == [("infer", done, ROWS) for done in (0, 16, ROWS)]
