"""Each example, run as a user runs it, is right; and its ranks end together, however one ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples import histogram, mean_and_variance, sgd, word_count
from examples import ranks as entry
from examples.mean_and_variance import merge, summarize
from examples.sgd import training_data
from tests.processes import run_processes, serve_rendezvous
from workflow import launch
from workflow.demo.catalogue import load_catalogue

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted({p.stem for p in (ROOT / "examples").glob("*.py")} - {"__init__", "ddp", "ranks"})
PAGE = (ROOT / "examples" / "README.md").read_text()
LINES = 80


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve_rendezvous() as address:
        yield address


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FMI_")}
    command = [sys.executable, "-W", "error", "-m", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes | options)


@cache
def run(name: str, ranks: int = 3) -> str:
    """Run an example; returns what it printed, once that has ended well."""
    process = start(f"examples.{name}", "--ranks", str(ranks))
    out, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (0, ""), err
    assert "WRONG" not in out
    return out


def numbers(text: str) -> list[float]:
    return [float(word.replace(",", "")) for word in re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", text)]


# ------------------------------------------------------------------------ what they compute
def test_monte_carlo_pi_is_the_same_for_any_number_of_ranks() -> None:
    inside = 0
    for seed in np.random.SeedSequence(2026).spawn(64):
        x, y = np.random.default_rng(seed).random((2, 100_000))
        inside += int((np.hypot(x, y) < 1).sum())
    for ranks, out in ((1, run("monte_carlo_pi", 1)), (3, run("monte_carlo_pi"))):
        points, size, found, pi, *_ = numbers(out)
        assert (points, size, found) == (6_400_000, ranks, inside)
        assert pi == pytest.approx(4 * inside / points, abs=1e-6)
        assert pi == pytest.approx(np.pi, abs=0.003)


def test_histogram_counts_every_galaxy_once() -> None:
    redshift = load_catalogue().redshift
    *bins, total = (line for line in run("histogram").splitlines())
    edges = np.linspace(redshift.min(), redshift.max(), 13)
    expected = [int(((redshift >= low) & (redshift < high)).sum()) for low, high in pairwise(edges)]
    expected[-1] += int((redshift == redshift.max()).sum())
    assert [numbers(line)[1] for line in bins] == expected
    assert numbers(total)[:2] == [len(redshift), 3]


def test_mean_and_variance_are_numpys() -> None:
    catalogue = load_catalogue()
    *columns, last = run("mean_and_variance").splitlines()
    assert numbers(last)[:2] == [len(catalogue.redshift), 3]
    for line, values in zip(columns, [*catalogue.magnitudes.T, catalogue.redshift], strict=True):
        assert numbers(line) == pytest.approx([values.mean(), values.var()], abs=1e-6)


def test_summaries_keep_the_digits_that_sums_of_squares_lose() -> None:
    values = 1e9 + np.random.default_rng(5).normal(size=(1000, 1))
    naive = (values**2).mean() - values.mean() ** 2
    count, mean, squares = merge(summarize(values[:1]), summarize(values[1:]))[:, 0]
    assert count == 1000
    assert mean == pytest.approx(values.mean(), rel=1e-15)
    assert squares / count == pytest.approx(values.var(), rel=1e-6)
    assert abs(naive - values.var()) > 1, "the test has no point"


def test_a_summary_of_no_rows_changes_nothing() -> None:
    none, some = summarize(np.zeros((0, 2))), summarize(np.array([[1.0, 5.0], [4.0, 5.0]]))
    for merged in (merge(none, some), merge(some, none)):
        np.testing.assert_array_equal(merged, some)
    np.testing.assert_array_equal(merge(none, none), none)


def test_sgd_learns_and_all_ranks_learn_the_same() -> None:
    first, errors, weights, last = run("sgd").splitlines()
    inputs, redshift = training_data()
    assert numbers(first)[0] == len(redshift)
    before, after = numbers(errors)
    assert before == pytest.approx(np.sqrt((redshift**2).mean()), abs=1e-5)
    best = np.linalg.lstsq(inputs, redshift)[0]
    least = float(np.sqrt(((inputs @ best - redshift) ** 2).mean()))
    assert least < after < 1.02 * least
    found = np.array(numbers(weights))
    assert np.sqrt(((inputs @ found - redshift) ** 2).mean()) == pytest.approx(after, abs=1e-5)
    assert "3 rank(s) with the same bits" in last


def test_word_count_counts_what_grep_would() -> None:
    top, total = run("word_count").splitlines()
    text = " ".join(file.read_text().lower() for file in (ROOT / "docs").glob("*.md"))
    words = Counter(re.split(r"[^a-z]+", text))
    long = Counter({word: number for word, number in words.items() if len(word) > 1})
    found = dict(pair.split() for pair in top.split(", "))
    assert {word: int(number) for word, number in found.items()} == {w: long[w] for w in found}
    assert sorted(map(int, found.values())) == sorted(n for _, n in long.most_common(8))
    files = len(list((ROOT / "docs").glob("*.md")))
    assert numbers(total) == [files, len(long), long.total(), 3]


def test_a_word_belongs_to_the_same_rank_in_every_process() -> None:
    owners = [word_count.owner(word, 3) for word in ("galaxy", "redshift", "rank", "of")]
    assert owners == [0, 2, 1, 2]


# ------------------------------------------------------------------------------ starting them
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short_and_shown_as_they_are(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= LINES
    blocks = re.findall(rf"\$ \S+ -m examples.{name} --ranks 3\n(.*?)```", PAGE, re.DOTALL)
    shown, printed = (text.splitlines() for text in (*blocks, run(name)))
    assert len(shown) == len(printed)
    # Numbers change with the documents that are counted, and in the last digit with numpy.
    assert re.sub(r"[\d,]+", "N", shown[-1]) == re.sub(r"[\d,]+", "N", printed[-1])


def programs() -> tuple[str, str]:
    """The two programs of the README: an own one, and a Lambda function's."""
    first, second = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return first, second


def test_the_program_of_the_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "yours.py").write_text(programs()[0])
    process = start("workflow.launch", "--ranks", "2", str(tmp_path / "yours.py"))
    out, err = process.communicate(timeout=20)
    lines = ["rank 0 of 2: 3", "rank 1 of 2: 3"]
    assert (process.returncode, err, sorted(out.splitlines())) == (0, "", lines)


def test_the_handler_of_the_readme_runs(server: str) -> None:
    names: dict[str, Any] = {}
    exec(programs()[1], names)
    event = {"server": server, "job": "lambda", "rank": 0, "size": 1}
    assert names["handler"](event, None) == {"right": True}


@pytest.mark.parametrize("example", [histogram, mean_and_variance, sgd, word_count])
def test_ranks_without_data_do_no_harm(
    example: Any, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything: Any = load_catalogue()
    few = everything._make(column[:3] for column in everything)
    if example is word_count:
        monkeypatch.setattr(example, "FILES", word_count.FILES[:3])
    else:
        monkeypatch.setattr(example, "load_catalogue", lambda: few)
    assert run_processes(server, 5, example.work, job=example.__name__) == [True] * 5


@pytest.mark.parametrize("ranks", ["0", "-1", "129", "many"])
def test_numbers_of_ranks_that_make_no_sense_are_refused(ranks: str) -> None:
    process = start("examples.word_count", "--ranks", ranks)
    out, err = process.communicate(timeout=50)
    assert (process.returncode, out) == (2, "")
    assert "--ranks" in err


ENDLESS = """
import os
from examples import sgd
from examples.ranks import main

def work(comm):
    print(comm.rank, os.getpid(), flush=True)
    sgd.EPOCHS = 10**9
    return sgd.work(comm)

main(work)
"""


@contextmanager
def endless(folder: Path) -> Iterator[tuple[subprocess.Popen[str], dict[int, int]]]:
    """An sgd of 3 ranks that does not end by itself; and each rank's process."""
    (folder / "endless.py").write_text(ENDLESS)
    arguments = ("workflow.launch", "--ranks", "3", str(folder / "endless.py"))
    with start(*arguments, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().split() for _ in range(3)]
            yield process, {int(rank): int(pid) for rank, pid in lines}
        finally:
            process.kill()  # what it started goes with it


def gone(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z"
    return True


def test_a_killed_rank_ends_all_and_is_named(tmp_path: Path) -> None:
    with endless(tmp_path) as (process, pids):
        os.kill(pids[1], signal.SIGKILL)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (1, "")
        assert all(map(gone, pids.values()))
    lines = sorted(err.splitlines())
    assert lines[1] == "rank 1 was killed by SIGKILL (out of memory?)"
    for line, rank in ((lines[0], 0), (lines[2], 2)):
        assert re.fullmatch(rf"rank {rank}: RankFailed: \[rank 1, .+\] rank 1 .+", line)
    assert len(lines) == 3


def test_ctrl_c_leaves_nobody_behind(tmp_path: Path) -> None:
    with endless(tmp_path) as (process, pids):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 5, "three ranks, the server, and who guards them"
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=20) == (
            "",
            "Stopped by SIGINT; nothing is left running.\n",
        )
        assert process.returncode == 130
        assert all(map(gone, [*pids.values(), *map(int, children)]))


def test_output_that_nobody_reads_on_ends_it_quietly(tmp_path: Path) -> None:
    (tmp_path / "talkative.py").write_text("while True: print('more')")
    process = start("workflow.launch", "--ranks", "2", str(tmp_path / "talkative.py"))
    assert process.stdout is not None
    assert process.stdout.readline() == "more\n"
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 1


def test_what_a_rank_finds_wrong_is_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "from examples.ranks import main\nmain(lambda comm: comm.rank != 1)\n"
    )
    process = start("workflow.launch", "--ranks", "2", str(tmp_path / "wrong.py"))
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 1


async def test_who_does_not_notice_that_a_rank_failed_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    program = "import os, time; time.sleep(50 * int(os.environ['FMI_RANK']))\nraise SystemExit(1)"
    async with asyncio.timeout(20):
        assert await launch._launch((sys.executable, "-c", program), 2) == 1


def test_a_rank_says_what_its_environment_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in entry.PLACE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FMI_RANK", "0")
    with pytest.raises(SystemExit, match="needs FMI_SERVER, FMI_JOB, FMI_SIZE in its environment"):
        entry.main(lambda comm: True)


def test_settings_of_another_server_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RENDEZVOUS_SECRET", "the secret of a server elsewhere")
    monkeypatch.setenv("RENDEZVOUS_PORT", "1")
    assert run.__wrapped__("word_count", 1) == run("word_count", 1)


def test_a_program_gets_its_own_arguments(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(
        "import os, sys\nprint(os.environ['FMI_RANK'], *sys.argv[1:])"
    )
    process = start("workflow.launch", "--ranks", "2", str(tmp_path / "show.py"), "--ranks", "x")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err, sorted(out.splitlines())) == (
        0,
        "",
        ["0 --ranks x", "1 --ranks x"],
    )
