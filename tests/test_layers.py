"""Imports go one way, and what is not needed is not loaded."""

from __future__ import annotations

import ast
import importlib
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
    "examples/ranks.py": {"fmi_client", "workflow.launch"},
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


def all_loaded_by(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded by `code` and not by its start."""
    script = f"import sys; start = set(sys.modules)\n{code}\nprint(*set(sys.modules) - start)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.splitlines()[-1].split())


def loaded_by(code: str) -> set[str]:
    """Return the same, of top-level modules only."""
    return {name.split(".")[0] for name in all_loaded_by(code)}


def test_heavy_modules_are_loaded_late() -> None:
    heavy = {"numpy", "torch", "boto3", "matplotlib"}
    assert not loaded_by("import fmi_client, fmi_client.errors") & heavy
    assert not loaded_by("import rendezvous_server.__main__") & (heavy | {"typer", "pydantic"})
    assert not loaded_by("import fmi_client; fmi_client.sync.connect") & (heavy - {"numpy"})
    assert not loaded_by("import workflow.cli") & heavy
    # A rank that others started, in a Lambda function say, needs the client only.
    assert not loaded_by("import examples.monte_carlo_pi") & {"workflow", "typer", "torch"}
    assert not loaded_by("import lambda_worker.handlers") & {"aws_lambda_powertools", "boto3"}


HELP = """
import workflow.__main__
sys.argv[1:] = ["--help"]
try:
    workflow.__main__.main()
except SystemExit as end:
    assert not end.code
"""


def test_help_answers_at_once() -> None:
    """Counted, not timed: 60 ms for the client and 250 ms for the help are far more than this."""
    assert len(all_loaded_by("import fmi_client")) < 60
    loaded = all_loaded_by(HELP)
    assert "workflow.cli" in loaded
    assert not loaded & {"asyncio", "aiohttp", "jinja2", "numpy", "pydantic", "rich", "structlog"}
    assert len(loaded) < 250


def test_the_client_alone_is_told_what_cosmic_needs() -> None:
    code = "import sys; sys.modules['typer'] = None; import workflow.__main__ as m; m.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    wanted = "Error: cosmic needs more than the client: pip install 'cosmic-fmi[workflow]'\n"
    assert (result.returncode, result.stderr) == (1, wanted)


PACKAGES = ("fmi_client", "rendezvous_server", "lambda_worker", "workflow")
PUBLIC = (*PACKAGES, "fmi_client.fmi", "fmi_client.sync", "lambda_worker.handlers")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_names_exist_and_are_listed_once(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_type_checkers_see_the_public_names_of_the_client() -> None:
    """They do not follow `__getattr__`; for them the names are imported in so many words."""
    import fmi_client
    from fmi_client import errors

    seen = set()
    for node in ast.walk(ast.parse((ROOT / "fmi_client/__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fmi_client"):
            star = [alias.name for alias in node.names] == ["*"]
            seen |= set(errors.__all__) if star else {alias.asname for alias in node.names}
    assert seen == set(fmi_client.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        fmi_client.nonsense  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_types_are_shipped(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
