"""`python -m lambda_worker` as its launcher sees it: JSON lines, exit codes, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import closed_port
from tests.worker.worker_data import MakePt


def run(step: str, event: object) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, the lines on stdout, and stderr."""
    text = event if isinstance(event, str) else json.dumps(event)
    done = subprocess.run(
        [sys.executable, "-m", "lambda_worker", step],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=50,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_the_three_steps(make_pt: MakePt, tmp_path: Path) -> None:
    event = {"data": str(make_pt("a.pt", 9)), "world_size": 1, "results": str(tmp_path)}
    code, lines, _ = run("init", event)
    assert code == 0
    plan = lines[-1]["result"]
    code, lines, _ = run("infer", plan["ranks"][0])
    assert code == 0
    assert [next(iter(line)) for line in lines] == ["progress"] * (len(lines) - 1) + ["result"]
    assert lines[0]["progress"] == {"rank": 0, "stage": "join", "rows": 0, "of": 0}
    assert lines[-1]["result"]["rows"] == 9
    code, lines, _ = run("summarize", plan)
    assert code == 0
    assert Path(lines[-1]["result"]["combined_data"]).is_file()


def test_a_rank_that_fails_says_so_in_its_last_line(tmp_path: Path) -> None:
    event = {"rank": 1, "world_size": 2, "results": str(tmp_path), "shard": [["no.pt", 0, 1]]}
    code, lines, errors = run("infer", event)
    assert code == 1
    error = lines[-1]["error"]
    assert (error["type"], error["rank"]) == ("DatasetError", 1)
    assert error["message"].endswith("no.pt: no such file")
    assert "Traceback" not in errors
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [Path("failed/0/1.json")]


def test_a_rank_that_is_stopped_says_so_in_its_last_line() -> None:
    command = [sys.executable, "-m", "lambda_worker", "infer"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    event = {
        **{"rank": 1, "world_size": 2, "run": "r", "shard": [], "results": "r"},
        "rendezvous_endpoint": f"127.0.0.1:{closed_port()}",
    }
    with subprocess.Popen(command, text=True, **streams) as process:  # type: ignore[call-overload]
        process.stdin.write(json.dumps(event))
        process.stdin.close()
        assert json.loads(process.stdout.readline())["progress"]["stage"] == "join"
        process.terminate()  # it waits for rank 0, which never comes
        error = json.loads(process.stdout.read())["error"]
        assert error == {"type": "Stopped", "message": "stopped by SIGTERM", "rank": 1}
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM


def test_a_stop_in_an_import_is_not_lost(tmp_path: Path) -> None:
    """There Python and its libraries ignore errors, and the rank would wait for its timeout."""
    (tmp_path / "careless.py").write_text(
        "import os, signal, time\n"
        "try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
        "except BaseException: pass\n"
    )
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'lambda_worker.secret': import careless\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    event = {
        **{"rank": 1, "world_size": 2, "run": "r", "shard": [], "results": str(tmp_path)},
        **{"rendezvous_endpoint": f"127.0.0.1:{closed_port()}", "timeout": 5},
    }
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "lambda_worker", "infer"],
        input=json.dumps(event),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout.splitlines()[-1])["error"]["type"] == "Stopped", done
    assert done.returncode == 128 + signal.SIGTERM


def test_check_is_a_step_too() -> None:
    event = {"server": f"127.0.0.1:{closed_port()}", "admin_port": 0}
    code, lines, _ = run("check", event)
    assert (code, len(lines)) == (0, 1)
    assert lines[0]["result"]["ok"] is False
    assert [step["name"] for step in lines[0]["result"]["steps"]] == ["resolve", "connect"]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"data": "d", "colour": 1}, "unknown field 'colour'"),
        ("{", "stdin: expected the event as JSON"),
        ([], "got [], expected a JSON object"),
    ],
)
def test_bad_event(event: object, message: str) -> None:
    code, lines, errors = run("init", event)
    assert code == 1
    assert lines[0]["error"]["type"] == "EventError"
    assert message in lines[0]["error"]["message"]
    assert len(lines) == 1
    assert errors == ""


def test_defect_in_a_library_that_prints(tmp_path: Path) -> None:
    """stdout has its one line only; stderr has what the library prints, and where it failed."""
    numpy = "import os; os.write(1, b'noise'); print('noise'); raise ZeroDivisionError('boom')"
    (tmp_path / "numpy.py").write_text(numpy)
    done = subprocess.run(
        [sys.executable, "-m", "lambda_worker", "init"],
        input=json.dumps({"data": "d"}),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=50,
    )
    error = json.loads(done.stdout)["error"]
    assert error == {"type": "ZeroDivisionError", "message": "boom", "rank": None}
    assert done.stderr.count("noise") >= 2
    assert "Traceback" in done.stderr
    assert done.returncode == 1
