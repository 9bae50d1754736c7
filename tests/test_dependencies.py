"""docs/dependencies.md says what pyproject.toml does, and what the packages say of themselves."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fmi_client", "rendezvous_server", "lambda_worker", "workflow")
# By whom we have what we import without naming it: they promise what their own API shows of it.
BROUGHT = dict.fromkeys(("botocore", "s3transfer", "urllib3"), "boto3") | {"markupsafe": "jinja2"}
NO_EXTRA = "none"
ROW = re.compile(r"\| (?P<extras>[^|]+) \| (?P<name>[\w-]+) \| `(?P<version>[^`]+)` \| ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def page() -> dict[tuple[str, str], tuple[str, str]]:
    """Version and licence by extra and name."""
    found = {}
    for line in (ROOT / "docs/dependencies.md").read_text().splitlines():
        if row := ROW.match(line):
            licence = line[row.end() :].split(" | ")[0]
            for extra in row["extras"].split(", "):
                found[extra, row["name"]] = (row["version"], licence)
    return found


def declared() -> dict[tuple[str, str], str]:
    """Version by extra and name; those that name our other extras do not count."""
    project = PROJECT["project"]
    groups = {NO_EXTRA: project["dependencies"], "build": PROJECT["build-system"]["requires"]}
    found = {}
    for extra, requirements in {**groups, **project["optional-dependencies"]}.items():
        for requirement in requirements:
            name, version = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
            if name != "cosmic-fmi":
                found[extra, name] = version
    return found


def test_the_page_lists_what_pyproject_does() -> None:
    assert {key: version for key, (version, _) in page().items()} == declared()


@pytest.mark.parametrize(("name", "licence"), sorted({(k[1], v[1]) for k, v in page().items()}))
def test_licences_are_what_the_packages_say(name: str, licence: str) -> None:
    try:
        said = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    fields = [said.get("License-Expression", ""), said.get("License", "")]
    text = " ".join([*fields, *said.get_all("Classifier", [])])
    assert {"PSF": "Python Software Foundation"}.get(licence, licence) in text


def imported() -> set[str]:
    """Top-level modules that are neither ours nor Python's."""
    found = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - set(PACKAGES)


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    names = {
        name.replace("-", "_")
        for extra, name in declared()
        if extra not in ("bench", "dev", "docs")
    }
    wanted = {BROUGHT.get(module, module) for module in imported()}
    assert wanted - names == set()
    # AWS's client calls us, and torch imports the other.
    assert names - wanted <= {"awslambdaric", "onnxscript", "setuptools"}
