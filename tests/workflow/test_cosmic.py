"""The command line, as processes: what a shell and a program see of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from launched import alive, finish, pids, recorded, start_fakes, until

from lambda_worker.threads import cores
from workflow.demo import data_path

HANG = json.dumps({f"infer {rank}": "hang" for rank in range(4)})
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start `cosmic` around the fakes, in an empty folder."""
    (tmp_path / "tmp").mkdir()
    return partial(start_fakes, tmp_path)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], ["run", "infer", "check", "data", "model"]),
        (["infer"], ["--batch-size N|auto", "[default: 32]", "cosmic infer --json | jq", "130"]),
        (["run"], ["--world-size", "[default: 4", "cosmic run --json | jq", "130"]),
        (["run"], ["--strict", "--no-strict"]),
        (["check"], ["SERVER", "--secret-file", "--job try --size 2 --rank 1", '{"server":']),
        (["data", "make"], ["--split", "./data/demo-SIZE-SPLIT-SEED-VERSION.pt"]),
        (["model", "train"], ["--epochs"]),
        (["model", "convert"], ["CHECKPOINT.pt", "OUT.safetensors", "--heads", "refused by name"]),
    ],
)
def test_help_teaches(start: Start, words: list[str], shown: list[str]) -> None:
    code, out, _ = finish(start(*words, "--help"))
    assert code == 0
    # Line breaks may fall anywhere within a line of help.
    assert not [text for text in shown if text.replace(" ", "") not in "".join(out.split())]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("group", [[], ["data"], ["model"]])
def test_what_a_command_does_is_said_to_its_end(start: Start, group: list[str]) -> None:
    _, out, _ = finish(start(*group, "--help"))
    assert "..." not in out.partition("Commands:")[2]


@pytest.mark.parametrize("command", ["run", "infer", "sweep", "check"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from workflow.cli import app;"
        "app([sys.argv[1], '--help'], standalone_mode=False);"
        "heavy = {'torch', 'numpy', 'matplotlib', 'asyncio', 'boto3', 'rich'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--world-size", "0"], ["'--world-size'", "Invalid value"]),
        (["--batch-size", "many"], ["'--batch-size'", "neither a number of rows"]),
        (["--data", "nowhere"], ["--data", "nowhere does not exist; name a .pt file or a folder"]),
        (["--data", ".", "--seed", "3"], ["--data", "--seed", "leave them out"]),
        (["--data", "/etc/passwd"], ["--data", "/etc/passwd is neither a folder nor a file that"]),
        (["--results", "/dev/null/x"], ["--results", "/dev/null is not a folder"]),
        (["--timeout", "inf"], ["--timeout", "inf is not a number of seconds"]),
        (["--timeout", "nan"], ["--timeout"]),
        (["--run", "../up"], ["--run", "use letters, digits"]),
        (["--rendezvous", "localhost"], ["--rendezvous", "host:port, as in 127.0.0.1:10000"]),
        (["--rendezvous", "[::1]"], ["--rendezvous", "host:port"]),
        (["--rendezvous", "::1"], ["--rendezvous", "host:port"]),
        (["--rendezvous", "a:1", "--no-fmi"], ["--rendezvous", "--no-fmi"]),
        (["--data-size", "tiny"], ["'--data-size'", "'small', 'medium', 'large'"]),
        (["--wrold-size", "2"], ["--wrold-size", "--world-size"]),
    ],
)
def test_wrong_usage_names_the_option(start: Start, words: list[str], says: list[str]) -> None:
    code, out, err = finish(start("run", *words))
    assert code == 2
    assert out == ""
    assert not [text for text in says if text not in err]
    assert "Traceback" not in err


def test_a_run_ends_with_a_table_and_paths(start: Start, tmp_path: Path) -> None:
    code, out, err = finish(start("run", "--data", "fake://{}"))
    assert code == 0, err
    assert "total   40" in out
    assert "results: results/fake-run/combined_data.json" in out
    # On a busy machine a step may take so long that indented lines say how far it is.
    steps = [line.split()[2] for line in err.splitlines() if " s    " not in line]
    assert steps == ["rendezvous", "init:", "infer:", "summarize:"]
    assert recorded(tmp_path, "results/fake-run/init.json")["fmi_enabled"] is True


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_answer_that_there_is_no_room_for(unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "workflow", "cost", "--rows", "9"],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.stderr == "Error: cannot write to stdout: No space left on device\n"
    assert done.returncode == 1


def test_what_the_launcher_knows_stays_with_the_results(start: Start, tmp_path: Path) -> None:
    words = ("--world-size", "3", "--batch-size", "auto", "--json")
    code, out, err = finish(start("run", "--data", "fake://{}", *words))
    assert code == 0, err
    answer, told = json.loads(out), recorded(tmp_path, "results/fake-run/run.json")
    assert (told["format"], told["run"], told["on"]) == (1, "fake-run", "local")
    assert told["seconds"] == answer["seconds"]
    assert told["spans"] == [span for span in answer["spans"] if span[0] is None]
    assert [span[1] for span in told["spans"]] == ["server", "init", "infer", "summarize"]
    assert len(answer["spans"]) == 4 + 3
    plan = told["plan"]
    assert (plan["data"], plan["world_size"], plan["batch_size"]) == ("fake://{}", 3, "auto")
    assert (plan["engine"], plan["precision"], plan["fmi"]) == ("torch", "fp32", True)
    assert not [name for name in plan if name in ("worker", "server")]
    assert told["environment"]["threads"] == max(1, cores() // 3)
    assert told["environment"]["versions"].keys() >= {"python", "torch"}


def test_a_run_file_that_cannot_be_written_does_not_cost_the_results(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "results/fake-run/run.json").mkdir(parents=True)
    code, out, err = finish(start("run", "--data", "fake://{}", "--no-fmi", "--json"))
    assert code == 0
    assert json.loads(out)["summary"]["rows"] == 40
    assert "no run.json: " in err


def test_json_is_all_there_is_on_stdout(start: Start) -> None:
    code, out, err = finish(start("run", "--data", "fake://{}", "--json", "--no-fmi"))
    assert code == 0, err
    answer = json.loads(out)
    assert answer["summary"]["metrics"]["r2"] == 0.92
    assert len(answer["records"]) == 4
    assert answer["plot"] is None
    assert Path(answer["combined_data"]).is_file()


def test_a_failed_run_says_whose_fault_it_was(start: Start) -> None:
    broken = json.dumps({"infer 1": "error"})
    code, out, err = finish(start("run", "--data", f"fake://{broken}", "--no-fmi", "--json"))
    assert code == 1
    error = {"who": "rank 1", "type": "DatasetError", "message": "bad.pt: truncated", "rank": 1}
    assert json.loads(out) == {"error": error}
    assert err.splitlines()[-1] == "Error: rank 1 failed: DatasetError: bad.pt: truncated"


def test_a_plot_that_cannot_be_drawn_does_not_cost_the_results(
    start: Start, tmp_path: Path
) -> None:
    data = 'fake://{"plot": "of a file that is not there"}'
    code, out, err = finish(start("run", "--data", data, "--no-fmi", "--json"))
    assert code == 0
    assert json.loads(out)["plot"] is None
    assert "no plot: " in err


def test_the_demo_file_is_used_again(start: Start, tmp_path: Path) -> None:
    path = data_path("small", "test", 5)
    (tmp_path / "data").mkdir()
    (tmp_path / path).touch()
    code, _, err = finish(start("run", "--seed", "5", "--no-fmi", "--world-size", "1"))
    assert code == 0
    assert f"{path} is there already" in err
    assert recorded(tmp_path, "results/fake-run/init.json")["data"] == str(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    process = start("run", "--data", f"fake://{HANG}")
    until(lambda: len(pids(tmp_path)) == 5)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number
    assert out == ""
    assert err.splitlines()[-1].startswith(f"Stopped by {number.name}")
    assert "Traceback" not in err
    assert not [pid for pid in pids(tmp_path) if alive(pid)]
    assert not list((tmp_path / "tmp").iterdir())


def test_a_signal_while_the_program_is_still_being_imported(tmp_path: Path) -> None:
    module = "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise ImportError('late')"
    (tmp_path / "typer.py").write_text(module)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "workflow", "--help"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stderr == "Stopped by SIGINT; nothing is left running, no file half written.\n"
    assert (done.returncode, done.stdout) == (130, "")


def test_a_signal_that_the_parent_told_to_ignore(start: Start, tmp_path: Path) -> None:
    process = start("run", "--data", f"fake://{HANG}", COSMIC_IGNORES="SIGHUP")
    until(lambda: len(pids(tmp_path)) == 5)
    process.send_signal(signal.SIGHUP)  # as under nohup
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM


def test_a_second_run_of_one_name_leaves_the_first_ones_folder_alone(
    start: Start, tmp_path: Path
) -> None:
    first = start("run", "--run", "mine", "--data", f"fake://{HANG}")
    until(lambda: len(pids(tmp_path)) == 5)
    code, out, err = finish(start("run", "--run", "mine", "--data", "fake://{}"))
    assert (code, out) == (1, "")
    assert err.endswith(
        "results/mine: another process is writing there: wait for it, or take another --run\n"
    )
    first.kill()
    finish(first)
    until(lambda: not [pid for pid in pids(tmp_path) if alive(pid)])
    assert finish(start("run", "--run", "mine", "--data", "fake://{}"))[0] == 0


def test_no_process_outlives_a_killed_launcher(start: Start, tmp_path: Path) -> None:
    process = start("run", "--data", f"fake://{HANG}")
    until(lambda: len(pids(tmp_path)) == 5)
    process.kill()
    finish(process)
    until(lambda: not [pid for pid in pids(tmp_path) if alive(pid)])
    assert not list((tmp_path / "tmp").iterdir())


def test_data_make_writes_a_dataset(start: Start, tmp_path: Path) -> None:
    code, out, err = finish(start("data", "make", "--rows", "3", "--split", "val"))
    assert code == 0, err
    path = data_path("3", "val", 0)
    assert out == f"{path}\n"
    assert (tmp_path / path).stat().st_size > 3 * 5 * 32 * 32 * 4


def test_data_that_cannot_be_written(start: Start, tmp_path: Path) -> None:
    (tmp_path / "x.pt").mkdir()
    code, out, err = finish(start("data", "make", "--rows", "1", "--out", "x.pt"))
    assert code == 1
    assert out == ""
    assert err.splitlines()[-1].startswith("Error: cannot write x.pt")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "x.txt"], "Invalid value for --out: x.txt: expected a name that ends with .pt"),
        (["--out", "/dev/null/x.pt"], "Invalid value for --out: cannot write to /dev/null"),
        (["--rows", str(10**11)], "Invalid value for --rows: 100,000,000,000 rows are 2,0"),
    ],
)
def test_data_that_nobody_could_use_are_not_made(start: Start, words: list[str], says: str) -> None:
    code, out, err = finish(start("data", "make", *words))
    assert (code, out) == (2, "")
    assert says in err


def test_model_train_writes_a_model(start: Start, tmp_path: Path) -> None:
    code, out, err = finish(start("model", "train", "--rows", "16", "--epochs", "1"))
    assert code == 0, err
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "on 16 held-out galaxies: NMAD 0." in out
    assert out.endswith("use it: cosmic run --model model/model.safetensors\n")
