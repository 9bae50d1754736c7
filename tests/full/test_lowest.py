"""The lowest versions that pyproject.toml allows: a part of the suite that needs all of them.

torch is ours: PyPI has older ones only with CUDA, gigabytes of it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_FOR_USERS = {"bench", "dev"}
SUITE = (
    *("tests/test_layers.py", "tests/test_readme.py"),
    *("tests/fmi/test_payloads.py", "tests/fmi/test_reductions.py", "tests/fmi/test_store.py"),
    *("tests/server/test_server.py", "tests/server/test_live.py", "tests/server/test_status.py"),
    *("tests/worker/test_worker_events.py", "tests/worker/test_worker_s3.py"),
    *("tests/worker/test_exported.py", "tests/worker/test_telemetry.py"),
    *("tests/worker/test_worker_secret.py", "tests/science/test_model.py"),
    *("tests/workflow/test_cosmic.py", "tests/workflow/test_infer.py"),
    *("tests/workflow/test_plot.py", "tests/workflow/test_prices.py"),
    *("tests/workflow/test_progress.py", "tests/workflow/test_report.py"),
    *("tests/workflow/test_table.py", "tests/reliability/test_tls.py"),
)
NOT_WITH_OLD = (  # older powertools leave the logger to themselves, once another test has used them
    "tests/worker/test_telemetry.py::test_without_powertools_there_are_plain_lines"
)
MINUTES = 15

pytestmark = [pytest.mark.full, pytest.mark.nightly, pytest.mark.timeout(60 * MINUTES)]


def lowest() -> list[str]:
    """Each requirement of those who use this, with its lower bound as the version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].items()
    groups = [project["dependencies"], *(v for k, v in extras if k not in NOT_FOR_USERS)]
    requirements = {each for group in groups for each in group}
    ours = {each for each in requirements if each.startswith(("cosmic-fmi[", "torch>="))}
    return sorted(_at_its_bound(each) for each in requirements - ours)


def _at_its_bound(requirement: str) -> str:
    match = re.fullmatch(r"([\w-]+)>=([\w.]+)(,.*)?", requirement)
    assert match, f"{requirement} has no lower bound"
    return f"{match[1]}=={match[2]}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has those, and of ours what is missing then."""
    venv = tmp_path_factory.mktemp("lowest")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    subprocess.run([*pip, "--only-binary", ":all:", *lowest()], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(f"{metadata.distribution('torch').locate_file('')}\n")
    return python


def test_the_lowest_versions_do(python: Path, tmp_path: Path) -> None:
    # Old releases warn of what is newer than they are, which says nothing about us.
    options = ("-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-W", "ignore")
    # In pytest's own folder many sessions would remove the oldest, with the environment in it.
    options += ("--basetemp", str(tmp_path / "base"), "--deselect", NOT_WITH_OLD)
    result = subprocess.run(
        [str(python), "-m", "pytest", *options, "-m", "not full and not nightly", *SUITE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
