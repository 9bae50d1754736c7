"""A newcomer's machine: Debian 12 in a container, a clone, `make run`, `make test`, the documents.

    .ci/docker && .venv/bin/python -m tests.full.fresh_container

It has what README.md asks for and no more. An ordinary user types there what the documents show,
page after page, but for what needs AWS, root, or files of your own. Prints each command with its
seconds and exit code; what it said is in a file of its own. Exits with 1 if a command failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.commands import PAGES, ROOT, shown_on
from tests.full.containers import BASE, no_base

USER = "newcomer"
CLONE = f"/home/{USER}/cosmic"
AS_USER = ("-u", USER)
# The image has python3-venv.
SETUP = f"""set -e
apt-get update -q
useradd -m -s /bin/bash {USER}
apt-get install -y -q --no-install-recommends make git"""
GET = "git clone -q /from/cosmic.bundle cosmic"
LIMIT = 3600  # seconds for one command
FIRST = (
    *("make help", "make run", "make test", "make lint", "make examples", "make docs"),
    *("make dist", 'make run ARGS="--world-size 2 --batch-size 64"'),
)
ELSEWHERE = {
    r"--on aws|s3://|sam |docker |awslambdaric|local_aws|make env tools": "needs AWS, or Docker",
    r"redis://|^pip install": "needs a Redis, or a release on PyPI",
    r"AI-for-Astronomy|Mixed_Inception": "needs files of the original project",
    r"tests\.net|tests/net": "needs root",
    r"^cosmic check [^&]*--rank 1": "typed beside the line before",
    r"^cosmic sweep$": "as long as `make sweep`, which is the same",
}
# The wheel of `make dist` in an environment that has nothing else of this project.
WHEEL = r"""set -e
cd $(mktemp -d)
/usr/bin/python3 -m venv empty
export PATH=$PWD/empty/bin:$PATH
pip install -q torch==2.13.0 "$(ls ~/cosmic/dist/*.whl)[workflow]"
cosmic run
trap 'kill $!; wait' EXIT
python -m rendezvous_server 2> server.log & sleep 3
sed -n '/^```python/,/^```/p' ~/cosmic/README.md | sed '1d;$d' > example.py
python example.py"""
# What a reader has by then: data, a program, results.
BEFORE = r"""set -e
mkdir -p mine && for part in 1 2; do cosmic data make --rows 300 --out mine/$part.pt; done
for name in secret admin-token; do openssl rand -hex 32 > $name; done
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=fmi \
    -keyout key.pem -out cert.pem
sed -n '/^from examples.ranks/,/^```/p' examples/README.md | sed '$d' > yours.py
cp examples/ddp.py train.py
for name in m astromae; do cp lambda_worker/demo_model/model.safetensors $name.safetensors; done
for run in a b; do cosmic run --run $run; done
cosmic sweep --world-size 1,2 --batch-size 64 --name sweep-1
cp -r results/sweep-1 results/sweep-20261127T020000"""
SERVER = "python -m rendezvous_server"
INSTEAD = {
    r"\s+# .*": "",
    r"\| *jq .*": "> /dev/null",
    r"fmi\.example\.org(:10000)?": "127.0.0.1:10000",
    r"results/night": "results/sweep-1",
    r"^(.* --rank) 0$": r"\1 0 & \1 1; wait $!",
    rf"^(.*{SERVER}.*)$": r"timeout --foreground --preserve-status -s INT 5 env \1",
    r"(torchrun .*train\.py)": r"\1 --backend fmi",
}


def plan() -> Iterator[tuple[str, str]]:
    """Pages, and what is typed of each, once."""
    yield from (("first", line) for line in FIRST)
    yield ("wheel", WHEEL)
    yield ("before", BEFORE)
    seen = set(FIRST)
    for page in (each for each in PAGES if "tutorials/" not in each):  # those build on themselves
        for command in shown_on(page):
            line = command.line
            for pattern, other in INSTEAD.items():
                line = re.sub(pattern, other, line)
            if not command.mention and line not in seen:
                seen.add(line)
                yield (page, line)


def why_not(line: str) -> str | None:
    """What a line needs that is not here."""
    return next((why for pattern, why in ELSEWHERE.items() if re.search(pattern, line)), None)


def script(line: str) -> str:
    """The line, in the environment of the clone, and with the server that it looks for."""
    lines = ["export PATH=$PWD/.venv/bin:$PATH"]
    if "127.0.0.1:10000" in line or "--backend fmi" in line:
        secret = "--secret-file secret" if "--secret-file" in line else ""
        lines += [
            "trap 'kill $(jobs -p); wait' EXIT",
            f"{SERVER} {secret} 2> /dev/null & sleep 3",
            "export FMI_SERVER=127.0.0.1:10000",
        ]
    return "\n".join([*lines, line])


@contextmanager
def machine() -> Iterator[str]:
    """A container's name; in it are a bundle to clone from, and what pip has here."""
    name = f"cosmic-fresh-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        bundle = ["git", "bundle", "create", "-q", f"{folder}/cosmic.bundle", "HEAD"]
        subprocess.run(bundle, cwd=ROOT, check=True)
        settings, places = pip_here()
        Path(folder, "pip.conf").write_text(settings)
        mounts = [f"{folder}:/from:ro", *(f"{place}:{place}:ro" for place in places)]
        volumes = [word for mount in mounts for word in ("-v", mount)]
        # On the host's network: what packages come from may be reachable from there only.
        run = ["docker", "run", "-d", "--rm", "--init", "--network", "host", "--name", name]
        run += ["-e", "PIP_CONFIG_FILE=/from/pip.conf"]
        subprocess.run(
            [*run, *volumes, BASE, "sleep", "infinity"], check=True, stdout=subprocess.DEVNULL
        )
        try:
            yield name
        finally:
            subprocess.run(["docker", "rm", "-f", "-v", name], stdout=subprocess.DEVNULL)


def pip_here() -> tuple[str, list[Path]]:
    """The settings of pip on this machine, and the folders that they name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    pairs = re.findall(r"^(?:global|:env:)\.(?!cert)([\w-]+)='(.*)'$", listed, re.MULTILINE)
    settings = "[global]\n" + "".join(f"{name} = {value}\n" for name, value in dict(pairs).items())
    places = {Path(place) for place in re.findall(r"(?<![\w.:/])(?:file://)?(/\S+)", settings)}
    # An index links to files beside it.
    roots = {place.parent if place.name == "simple" else place for place in places}
    return settings, sorted(place for place in roots if place.exists())


def typed(name: str, text: str, log: Path, *options: str) -> int:
    """Run a script in the container; returns its exit code."""
    command = ["docker", "exec", *options, name, "timeout", str(LIMIT), "bash", "-c", text]
    with log.open("w") as out:
        out.write(f"{text}\n\n")
        out.flush()
        return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode


def row(name: str, page: str, text: str, log: Path, *options: str) -> bool:
    """Run a script and print its row; returns whether its exit code was 0."""
    start = time.monotonic()
    code = typed(name, text, log, *options)
    shown = text.splitlines()[-1]
    print(f"| {page} | `{shown}` | {time.monotonic() - start:.1f} | {code} |", flush=True)
    return code == 0


def main() -> None:
    """Make it, type everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--logs", type=Path, default=Path("build/fresh"), metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="REGEX", help="pages, or lines")
    given = parser.parse_args()
    if why := no_base():
        sys.exit(f"Error: {why}")
    given.logs.mkdir(parents=True, exist_ok=True)
    with machine() as name:
        print("| page | command | s | exit |\n|---|---|---|---|", flush=True)
        ended = [
            row(name, "as root", SETUP, given.logs / "setup.log"),
            row(name, "first", GET, given.logs / "clone.log", *AS_USER, "-w", f"/home/{USER}"),
        ]
        for number, (page, line) in enumerate(plan()):
            if not re.search(given.only, f"{page} {line}"):
                continue
            if why := why_not(line):
                print(f"| {page} | `{line}` | | {why} |", flush=True)
                continue
            log = given.logs / f"{number:03}.log"
            ended.append(row(name, page, script(line), log, *AS_USER, "-w", CLONE))
    if failed := ended.count(False):
        sys.exit(f"{failed} of {len(ended)} failed; what they said is in {given.logs}")


if __name__ == "__main__":
    main()
