"""What people are told to type exists: programs and their options, targets, extras."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from rendezvous_server import options as server
from tests.commands import PAGES, ROOT, commands, shown_on, spans
from workflow import cli
from workflow.demo import data_path

MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PACKAGES = ("fmi_client", "rendezvous_server", "lambda_worker", "workflow", "benchmarks")
# Where none of these stands, arguments are read by hand, and one cannot ask without running it.
PARSER = r"argparse|typer|examples\.ranks|server\.options"
PLACEHOLDERS = {"N": "1", "$ENDPOINT": "10.0.0.1:10000"}

# A module that other tests have imported runs here once more, up to its parser.
pytestmark = pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")

Parse = Callable[[Sequence[str]], str]


def tree(app: typer.Typer) -> Any:
    """A program's commands, which parse their arguments and do nothing."""
    command: Any = typer.main.get_command(app)
    for each in leaves(command):
        each.callback = None
    return command


def leaves(command: Any) -> list[Any]:
    """The commands of a program that are no groups."""
    below = getattr(command, "commands", {}).values()
    return [leaf for each in below for leaf in leaves(each)] or [command]


COSMIC = tree(cli.app)
OPTIONS = {
    "--help",
    *(name for each in leaves(COSMIC) for param in each.params for name in param.opts),
    *(f"--{option.name}" for option in server.OPTIONS),
    # Of docker and sam:
    *("--build-arg", "--cap-drop", "--health-cmd", "--image-repository", "--platform"),
    "--read-only",
}


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Parse:
    """Let a program's own parser read a command line, and no more; gives what it objects to."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_end(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse_args(parser, *arguments)
        sys.exit()

    def parse_app(app: typer.Typer, **options: Any) -> None:
        tree(app).main(args=sys.argv[1:], **options)

    def parse_it(words: Sequence[str]) -> str:
        program, *arguments = (PLACEHOLDERS.get(word, word) for word in words)
        try:
            PROGRAMS[program](arguments)
        except SystemExit as end:
            text = "".join(capsys.readouterr())
            return f"{end.code} {text}" if end.code else ""
        return ""

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(typer.Typer, "__call__", parse_app)
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    return parse_it


def _cosmic(arguments: Sequence[str]) -> None:
    COSMIC.main(args=list(arguments), prog_name="cosmic")


def _python(arguments: Sequence[str]) -> None:
    if arguments[0] != "-m":
        _need("/" not in arguments[0] or (ROOT / arguments[0]).exists(), arguments[0])
        return
    module, *sys.argv[1:] = arguments[1:]
    spec = find_spec(module)
    if spec and spec.submodule_search_locations:
        spec = find_spec(f"{module}.__main__")
    _need(spec, f"module {module} to run")
    ours = (ROOT / module.split(".")[0] / "__init__.py").exists()
    if ours and spec and spec.origin and re.search(PARSER, Path(spec.origin).read_text()):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    given, unknown = get_args_parser().parse_known_args(arguments)
    _need(not unknown, f"option {unknown}")
    if given.module:
        _python(["-m", given.training_script, *given.training_script_args])


def _make(arguments: Sequence[str]) -> None:
    for word in arguments:  # make itself takes any variable, and what is .PHONY without a rule
        defined = re.sub("=.*", " [?]=", word) if "=" in word else f"{word}:"
        _need(re.search(f"^{defined}", MAKEFILE, re.MULTILINE), f"{word} in the Makefile")
    # What a `make test ARGS=…` around this one was told is not for this one.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "ARGS"))}
    command = ["make", "-n", *arguments]
    told = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    _need(not told.returncode, told.stderr)
    for program, *rest in commands(told.stdout):
        if not any("$" in word for word in rest):  # a loop's variable
            PROGRAMS[program](rest)


def _pip(arguments: Sequence[str]) -> None:
    for word in arguments:
        _need(set(extras(word)) <= set(EXTRAS), word)


def _need(it: object, name: str) -> None:
    if not it:
        sys.exit(f"there is no {name}")


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "cosmic": _cosmic,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "python3": _python,
    "torchrun": _torchrun,
}


def extras(text: str) -> list[str]:
    found = re.findall(r"cosmic-fmi\[([\w,-]+)\]", text)
    return [extra for group in found for extra in group.split(",")]


# -- what is shown -------------------------------------------------------------------------------


def test_commands_are_found_in_a_line_of_shell() -> None:
    told = 'A=$(output cosmic Key)\nX="a b" Y=1 .venv/bin/cosmic run -h 2> log | jq .  # make it so'
    assert list(commands(told)) == [("cosmic", "run", "-h")]
    assert sum(1 for page in PAGES for _ in shown_on(page)) > 150


@pytest.mark.parametrize(
    "line",
    [
        *("cosmic fly", "cosmic run --ranks 2", "cosmic run --engine jax", "cosmic run mine.pt"),
        *("make fly", "make run ARG=2", "make run ARGS=--ranks", "make soak ARGS=--hours"),
        *("python -m examples.fly", "python -m examples.sgd --size 3", "python -m tests"),
        *("python -m lambda_worker fly", "python -m rendezvous_server --key x", "python a/b.py"),
        *(
            "torchrun -m examples.ddp --key x",
            "torchrun --key 3 -m examples.ddp",
            "pip install cosmic-fmi[fly]",
        ),
    ],
)
def test_what_does_not_exist_is_objected_to(line: str, parse: Parse) -> None:
    (words,) = commands(line)
    assert parse(words)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_of_the_documents_parses(page: str, parse: Parse) -> None:
    for command in dict.fromkeys(shown_on(page)):
        ways = [command.words]
        if command.mention:  # it may leave out what the command needs, and an option's value
            ways += [(*command.words, "--help"), (*command.words, "1", "--help")]
        assert any(not parse(words) for words in ways), f"{command.line}: {parse(command.words)}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_option_that_a_sentence_names_exists(page: str) -> None:
    for span in spans((ROOT / page).read_text()):
        if span.startswith("-"):
            assert set(re.findall(r"(?<!\S)--[a-z-]+", span)) <= OPTIONS


def test_the_examples_of_the_help_parse(parse: Parse) -> None:
    helps = [server.ABOUT, server.MORE, *(f"{each.help}{each.epilog}" for each in leaves(COSMIC))]
    examples = [re.split(r" {2,}", line.strip())[0] for line in "\n".join(helps).splitlines()]
    found = [words for example in examples for words in commands(example)]
    assert len(found) > 20
    for words in found:
        assert parse(words) == "", words


def test_no_page_names_a_file_whose_name_changes_with_the_simulator() -> None:
    made = re.compile(r"demo-\w+-\w+-\d+-[0-9a-f]{8}\.pt")
    assert made.search(str(data_path("small", "test", 0)))
    assert [page for page in PAGES if made.search((ROOT / page).read_text())] == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_git_adds_no_secret_that_a_page_tells_to_make() -> None:
    text = "".join((ROOT / page).read_text() for page in PAGES)
    made = set(re.findall(r"(?:-hex 32 >|-keyout) ?(\S+)", text))
    ignored = subprocess.run(
        ["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True
    )
    assert set(ignored.stdout.split()) == made >= {"secret", "admin-token", "key.pem"}


def test_what_make_help_says_of_arguments_parses(parse: Parse) -> None:
    targets = re.findall(r"^([a-z-]+):.*?##(?:.*?(ARGS=\"[^\"]*\"))?", MAKEFILE, re.MULTILINE)
    assert len(targets) > 15
    for target, arguments in targets:
        for words in commands(f"make {target} {arguments}"):
            assert parse(words) == ""


def test_every_extra_that_is_named_exists() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    for path in [*map(ROOT.joinpath, PAGES), *sources]:
        assert set(extras(path.read_text())) <= set(EXTRAS), path
