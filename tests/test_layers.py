"""Imports go one way, and what is not needed is not loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "fmi_client/errors.py": set(),
    "fmi_client/protocol": {"fmi_client.errors", "fmi_client.protocol"},
    "fmi_client/transport": {"fmi_client.errors", "fmi_client.protocol", "fmi_client.transport"},
    "fmi_client": {"fmi_client"},
    "rendezvous_server": {"fmi_client.errors", "fmi_client.protocol", "rendezvous_server"},
    "lambda_worker": {"fmi_client", "lambda_worker"},
    "workflow": {"fmi_client", "rendezvous_server", "lambda_worker", "workflow"},
    "examples/ranks.py": {"fmi_client", "examples.launch"},
    "examples": {"fmi_client", "workflow", "examples"},
}
OURS = ("fmi_client", "rendezvous_server", "lambda_worker", "workflow", "examples")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # "from package import module" names the module, too.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_go_one_way(place: str) -> None:
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            allowed = any(name == a or name.startswith(a + ".") for a in ALLOWED[place])
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `code`."""
    script = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.split())


def test_heavy_modules_are_loaded_late() -> None:
    heavy = {"numpy", "torch", "boto3", "matplotlib"}
    assert not loaded_by("import fmi_client, fmi_client.errors") & heavy
    assert not loaded_by("import rendezvous_server.__main__") & heavy
    assert not loaded_by("import fmi_client; fmi_client.sync.connect") & (heavy - {"numpy"})
    assert not loaded_by("import workflow.cli") & heavy
    # A rank that others started, in a Lambda function say, needs the client only.
    assert not loaded_by("import examples.monte_carlo_pi") & {"workflow", "typer", "torch"}
    assert not loaded_by("import lambda_worker.handlers") & {"aws_lambda_powertools", "boto3"}


def test_the_public_names_exist_and_are_listed_once() -> None:
    import fmi_client

    assert len(set(fmi_client.__all__)) == len(fmi_client.__all__)
    for name in fmi_client.__all__:
        assert getattr(fmi_client, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        fmi_client.nonsense  # noqa: B018
