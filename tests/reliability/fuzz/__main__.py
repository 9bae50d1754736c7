"""Fuzz all targets, or those that are named, in so many minutes together.

atheris guides the inputs by what they reach; where it is not installed, chance does. What fails
is written to --found, and is worth a place in the corpus once it is mended.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

MEMORY = 2 << 30
"""Bytes of address space beyond those at the start: who asks for more gets a MemoryError."""

FUZZED = ["fmi_client", "rendezvous_server", "lambda_worker", "workflow"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--found", type=Path, default=Path(".fuzz"), help="folder for failures")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", help="their names (default: all)")
    given = parser.parse_args()
    given.found.mkdir(exist_ok=True)
    if given.one:
        return _one(given.targets[0], 60 * given.minutes, given.found)
    names = given.targets or _names()
    each = f"--minutes={given.minutes / len(names)}"
    command = [sys.executable, "-m", __package__, "--one", each, f"--found={given.found}"]
    failed = [name for name in names if subprocess.run([*command, name]).returncode]
    print(f"{len(names)} targets, failed: {', '.join(failed) or 'none'}")
    return bool(failed)


def _names() -> list[str]:
    from tests.reliability.fuzz.all_targets import TARGETS

    return list(TARGETS)


def _one(name: str, seconds: float, found: Path) -> int:
    """Fuzz one target in this process."""
    if find_spec("atheris"):
        import atheris

        # Only our own modules: torch and numpy would take minutes.
        with atheris.instrument_imports(include=FUZZED):
            from tests.reliability.fuzz.all_targets import TARGETS
    else:
        from tests.reliability.fuzz.all_targets import TARGETS
    from tests.reliability.fuzz.target import check, entries

    target = TARGETS[name]
    seeds = [path.read_bytes() for path in entries(target)]
    _limit_memory()

    def run(data: bytes) -> None:
        try:
            check(target, data)
        except BaseException:
            (found / f"{name}-{abs(hash(data)):x}").write_bytes(data)
            raise

    if not find_spec("atheris"):
        return _by_chance(run, seeds, seconds, name)
    folder = str(entries(target).__next__().parent)
    new = found / f"corpus-{name}"
    new.mkdir(exist_ok=True)
    options = [f"-max_total_time={seconds:.0f}", "-timeout=20", "-max_len=8192", "-rss_limit_mb=0"]
    atheris.Setup([name, str(new), folder, *options, f"-artifact_prefix={found}/{name}-"], run)
    atheris.Fuzz()
    return 0


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _by_chance(run: object, seeds: Sequence[bytes], seconds: float, name: str) -> int:
    from tests.reliability.fuzz.mutate import chance

    assert callable(run)
    source, end, count = random.Random(), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        run(chance(source, seeds))
        count += 1
    print(f"{name}: {count:,} inputs by chance")
    return 0


if __name__ == "__main__":
    sys.exit(main())
