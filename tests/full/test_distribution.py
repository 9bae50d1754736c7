"""What is handed out: what wheel and sdist hold, and that the wheel is enough by itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from workflow.processes import ProcessFamily
from workflow.serving import start_server

ROOT = Path(__file__).parents[2]
PACKAGES = ("fmi_client", "rendezvous_server", "lambda_worker", "workflow")
BESIDE = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
MADE = {"PKG-INFO", "setup.cfg"}
CONSUMER = """
from typing import assert_type
import fmi_client

async def main() -> None:
    async with fmi_client.connect("server:10000", job="j", rank=0, size=1) as comm:
        assert_type(comm, fmi_client.Communicator)

with fmi_client.sync.connect("server:10000", job="j", rank=0, size=1) as blocking:
    assert_type(blocking, fmi_client.sync.Communicator)
    fmi_client.sync.connect("server:10000", job="j", rank="0", size=1)
"""

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git's list of files"),
]


def said(*command: str | Path, cwd: Path | None = None, code: int = 0) -> str:
    """Run it without our environment's PYTHONPATH; returns stdout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


def files() -> set[str]:
    """What git has, or would add."""
    listed = said("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def packaged() -> set[str]:
    return {name for name in files() if name.split("/")[0] in PACKAGES}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both, built from a copy: a build leaves traces where it works."""
    source = tmp_path_factory.mktemp("source")
    for name in files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    said(sys.executable, "-m", "build", "--no-isolation", source)
    return source / "dist"


@pytest.fixture(scope="module")
def python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and what it needs by reference."""
    venv = tmp_path_factory.mktemp("venv")
    said(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin/python"
    (wheel,) = dist.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", python)
    said(*pip, "install", "-q", "--no-deps", "--no-index", wheel)
    # Only now: pip would take our own installation, which is there too, for this one.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(f"{metadata.distribution('torch').locate_file('')}\n")
    return python


def test_the_wheel_holds_the_packages_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith("/entry_points.txt")]
        text = archive.read(entry_points).decode()
    assert {name for name in names if ".dist-info/" not in name} == packaged()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "[torch.backends]\nfmi = fmi_client.torch_register:autoload" in text
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_makes_the_wheel(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in names if not name.startswith("cosmic_fmi.egg-info/")}
    assert names == packaged() | BESIDE | MADE


def test_the_wheel_runs_a_job(python: Path, tmp_path: Path) -> None:
    said(python.parent / "cosmic", "run", "--world-size", "2", "--run", "wheel", cwd=tmp_path)
    records = json.loads((tmp_path / "results/wheel/combined_data.json").read_text())
    assert [record["rows"] for record in records] == [626, 627]
    assert (tmp_path / "results/wheel/redshift.png").stat().st_size > 10_000


async def test_the_wheel_runs_the_example_of_the_readme(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    async with ProcessFamily() as family:
        _, address = await start_server(family, (str(python), "-m", "rendezvous_server"))
        out = said(python, "-c", code.replace("127.0.0.1:10000", address))
    assert out == "[10. 10. 10.] ['rank 0', 'rank 1', 'rank 2', 'rank 3']\n"


def test_torch_finds_the_backend_of_the_wheel(python: Path, tmp_path: Path) -> None:
    code = """if True:
        import torch.distributed, fmi_client
        assert "fmi" in torch.distributed.Backend.backend_list
        print(fmi_client.__file__)"""
    home = Path(said(python, "-W", "error", "-c", code, cwd=tmp_path).strip())
    assert home.is_relative_to(python.parents[1])


def test_type_checkers_read_the_wheel(python: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    options = ("--strict", "--config-file", os.devnull, "--python-executable", python)
    command = (sys.executable, "-m", "mypy", *options, "consumer.py")
    told = said(*command, cwd=tmp_path, code=1)
    wrong = re.findall(r"consumer\.py:(\d+): error: .*\[([a-z-]+)\]", told)
    assert wrong == [("11", "arg-type")], told
