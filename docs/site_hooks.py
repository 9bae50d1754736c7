"""Makes a site of pages whose links are written for the repository; mkdocs calls it.

On the code host a page may link to the README, to another folder's page, or to a source file. On
the site, where only docs/ has pages, these become pages and files, too, and links lead there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

import workflow.cli
from rendezvous_server.options import make_parser

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
    "examples/README.md": "examples.md",
}
"""Pages outside docs/, and what they are called on the site."""

SOURCES = "source"
"""The folder of the site that holds the source files that pages link to."""

COMMANDS = "::: commands"
"""Stands for what all commands say with ``--help``."""

LINK = re.compile(r"\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand outside docs/."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where their files are on the site; others stay, and mkdocs judges them."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(_commands()))
    uri = page.file.src_uri
    home = {uri: path for path, uri in PAGES.items()}.get(uri, f"docs/{uri}")

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(home), link["path"]))
        place = _on_site(path, config, files)
        if place is None:
            return link[0]
        relative = posixpath.relpath(place, posixpath.dirname(uri))
        return f"]({relative}{link['anchor'] or ''})"

    return LINK.sub(moved, markdown)


def _on_site(path: str, config: MkDocsConfig, files: Files) -> str | None:
    """Return where a file of the repository is on the site; None if it is no file."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if not (ROOT / path).is_file():
        return None
    place = f"{SOURCES}/{path}"
    if files.get_file_from_path(place) is None:
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return place


def _commands() -> Iterator[str]:
    """Return a section for each command of `cosmic`, and one for the server."""
    yield from _help(get_command(workflow.cli.app), "cosmic")
    server = make_parser()
    server.formatter_class = partial(server.formatter_class, width=80)
    yield f"## {server.prog}\n\n```text\n{server.format_help()}```\n"


def _help(command: Any, name: str, parent: Any = None) -> Iterator[str]:
    context = command.context_class(command, info_name=name, parent=parent, terminal_width=80)
    within = getattr(command, "commands", {})
    if not within:
        yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    for each, inner in within.items():
        yield from _help(inner, each, context)
