"""``cosmic check`` as its users meet it: lines, JSON, exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from fmi_client.findings import Step
from tests.support import closed_port, serving, until
from workflow.check_view import CheckView, step_lines

SECRET = b"0123456789abcdef"
ROOT = Path(__file__).parents[2]


async def started(*words: str, measured: bool = True) -> asyncio.subprocess.Process:
    """Start the command; `measured`: by coverage, if we are."""
    inherited = {k: v for k, v in os.environ.items() if measured or not k.startswith("COVERAGE_")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workflow", *words),
        env={**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def cosmic_check(*words: str) -> tuple[int, str, str]:
    process = await started("check", *words)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_line_for_each_step_and_advice_at_the_end() -> None:
    async with serving() as (_, address):
        code, out, err = await cosmic_check(address)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line[:14] for line in lines[:8]] == [
        "✓ resolve     ",
        "✓ connect     ",
        "✓ server      ",
        "✓ authenticate",
        "✓ round trip  ",
        "✓ address     ",
        "✓ NAT         ",
        "- links       ",
    ]
    assert not [line for line in lines if line != line.rstrip()]
    assert lines[8:] == [
        "",
        "All is well on this machine; run the check again where the ranks will run.",
    ]


async def test_a_failure_is_exit_code_1_and_json_all_the_same() -> None:
    server = f"127.0.0.1:{closed_port()}"
    code, out, err = await cosmic_check(server, "--admin-port", "0", "--json")
    assert code == 1
    report = json.loads(out)
    assert not report["ok"]
    assert [step["status"] for step in report["steps"]] == ["ok", "failed"]
    # People see it, too.
    assert "✗ connect" in err
    assert "nothing listens there" in err


async def test_a_secret_file_makes_the_token(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    words = ("--secret-file", str(tmp_path / "secret"))
    async with serving(SECRET) as (_, address):
        code, out, _ = await cosmic_check(address, *words)
        assert code == 0
        assert "a token made from the secret admits us" in out
        code, out, _ = await cosmic_check(address)
    assert code == 1
    assert "Give what admits you: --secret-file" in out


async def test_two_processes_test_their_link() -> None:
    async with serving() as (_, address):
        words = (address, "--job", "try", "--size", "2")
        ends = await asyncio.gather(*(cosmic_check(*words, "--rank", r) for r in "01"))
    for rank, (code, out, err) in enumerate(ends):
        assert code == 0, err
        assert f"✓ link {1 - rank}       direct, round trip " in out
        assert out.endswith("All is well: every link of this rank is direct.\n")


async def test_ctrl_c_leaves_in_order() -> None:
    async with serving() as (server, address):
        words = ("check", address, "--job", "try", "--size", "2", "--rank", "0")
        # Coverage keeps a lock for ever when a signal interrupts it: once in some 15 runs.
        process = await started(*words, measured=False)
        await until(lambda: server.registry.ranks == 1, 20)
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        await until(lambda: server.registry.ranks == 0)
        assert server.counters.lost_ranks == 0
    assert process.returncode == 130
    assert (
        err.decode().splitlines()[-1]
        == "Stopped by SIGINT; nothing is left running, no file half written."
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["h", "--job", "j"], "job, rank and size go together"),
        (["h:x"], "not an address of the form host:port"),
        (["h", "--secret-file", "nowhere"], "cannot read the secret file nowhere"),
        (["h", "--timeout", "0"], "timeout=0"),
        (["h", "--timeout", "inf"], "timeout=inf"),
        (["h", "--wait", "nan"], "wait=nan"),
    ],
)
async def test_wrong_usage(words: list[str], says: str) -> None:
    code, out, err = await cosmic_check(*words, "--json")
    assert code == 2
    assert says in json.loads(out)["error"]["message"]
    assert says in " ".join(err.split())
    assert "Traceback" not in err


async def test_no_server_and_wrong_options_are_wrong_usage() -> None:
    code, out, err = await cosmic_check()
    assert (code, out) == (2, "")
    assert "SERVER" in err
    code, out, err = await cosmic_check("h", "--jop", "j")
    assert (code, out) == (2, "")
    assert "--job" in err


def test_lines_are_aligned() -> None:
    text = "192.0.2.1:10000: connection refused by what is there, whatever it is"
    assert step_lines(Step("connect", "failed", text, 0.25, "refused"), 60).plain.split("\n") == [
        "✗ connect      192.0.2.1:10000: connection refused by 250 ms",
        "               what is there, whatever it is",
    ]
    assert (
        step_lines(Step("NAT", "warning", "x", 1.5), 30).plain == "! NAT          x         1.5 s"
    )
    assert step_lines(Step("links", "skipped", "none"), 60).plain == "- links        none"


def test_a_step_that_takes_long_shows_life(capsys: pytest.CaptureFixture[str]) -> None:
    with CheckView(heartbeat=0.01) as view:
        view.begin("peers", "waiting for all 2 ranks")
        err = ""
        while err.count("\n") < 2:
            err += capsys.readouterr().err
        view.end(Step("peers", "ok", "all 2 ranks are there"))
    assert err.splitlines()[0] == "  peers        waiting for all 2 ranks …"
    assert "✓ peers        all 2 ranks are there" in capsys.readouterr().out
