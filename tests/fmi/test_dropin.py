"""The drop-in for the C++ library's Python module: every call of its example, in real processes."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fmi_client
import fmi_client.fmi as fmi
from fmi_client import fmi_config
from fmi_client.errors import CollectiveTimeout, JoinTimeout, RankFailed
from tests.processes import Tell, fork, processes

ROOT = Path(__file__).parents[2]
INT = fmi.types(fmi.datatypes.int)


def ints(n: int | None = None) -> fmi.types:
    return fmi.types(fmi.datatypes.int_list, n)


def write(path: Path, address: str, *enabled: str, **direct: Any) -> Path:
    """Write a configuration as the library's own, with some backends enabled."""
    host, port = address.split(":")
    backends = {
        "S3": {"bucket_name": "bucket", "s3_region": "us-east-1", "timeout": 100},
        "Redis": {"host": "127.0.0.1", "port": 6379, "timeout": 1},
        "Direct": {"host": host, "port": int(port), **direct},
    }
    for name, values in backends.items():
        values |= {"enabled": name in enabled, "max_timeout": values.get("max_timeout", 5000)}
    model = {
        "FaaS": {"gib_second_price": 0.0000166667},
        "S3": {"bandwidth": 50.0, "overhead": 40.4, "download_price": 4e-7, "upload_price": 5e-6},
        "Direct": {
            "bandwidth": 400.0,
            "overhead": 0.34,
            "vm_price": 0.0134,
            "include_infrastructure_costs": True,
        },
    }
    path.write_text(json.dumps({"backends": backends, "model": model}))
    return path


@pytest.fixture
def config(tmp_path: Path, address: str) -> Path:
    return write(tmp_path / "fmi.json", address, "Direct")


def run(config: Path, size: int, function: Any, job: str = "drop-in") -> list[Any]:
    """Run `function(comm, rank)` in `size` processes; results, or errors, in rank order."""

    def be(rank: int, tell: Tell) -> None:
        comm = fmi.Communicator(rank, size, str(config), job, 512)
        result = function(comm, rank)
        comm.close()
        tell(result)

    with processes(size, be) as ranks:
        return [rank.result() for rank in ranks]


# ------------------------------------------------------------------------- failures
def test_a_dead_rank_is_an_error_on_all_others(config: Path) -> None:
    """The original logs a failed send and goes on."""

    def rank(comm: fmi.Communicator, r: int) -> Any:
        comm.barrier()
        if r == 1:
            os._exit(1)
        while True:
            comm.allreduce(1, fmi.func(fmi.op.sum), INT)

    first, second, third = run(config, 3, rank, "dead")
    assert second == "died"
    for error in (first, third):
        assert isinstance(error, RankFailed)
        assert error.rank == 1
        # Where the others are when it dies: its barrier may end before theirs.
        assert re.match(r"\[rank 1, (allreduce|barrier), #\d+\] rank 1 ", str(error))


def test_a_send_to_a_dead_rank_is_an_error(config: Path) -> None:
    def rank(comm: fmi.Communicator, r: int) -> Any:
        comm.barrier()
        if r == 1:
            os._exit(1)
        while True:
            comm.send([0] * 1000, 1, ints(1000))

    error, _ = run(config, 2, rank, "send to the dead")
    assert isinstance(error, RankFailed)
    assert re.match(r"\[rank 1, (send|barrier, #0)\] rank 1 ", str(error))


def test_a_late_rank_is_named_after_max_timeout(tmp_path: Path, address: str) -> None:
    """Milliseconds: rank 1 comes when rank 0 has given up, which in seconds would be never."""
    config = write(tmp_path / "fmi.json", address, "Direct", max_timeout=200)
    given_up = fork.Event()

    def rank(comm: fmi.Communicator, r: int) -> Any:
        comm.barrier()
        if r == 1:
            assert given_up.wait(15)
            return "late"
        began = time.monotonic()
        try:
            comm.recv(1, INT)
        except CollectiveTimeout as error:
            return error.missing, str(error), time.monotonic() - began
        finally:
            given_up.set()

    (missing, text, seconds), late = run(config, 2, rank, "late")
    assert (missing, late) == ([1], "late")
    assert text.startswith("[rank 0, ")
    assert "recv" in text
    assert 0.2 <= seconds < 5


def test_to_join_there_is_more_time(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of a shipped configuration may start more than its second apart."""
    for joining, max_timeout, seconds in [(0.1, 50, "0.1"), (0.05, 100, "0.1")]:
        monkeypatch.setattr(fmi, "JOIN_SECONDS", joining)
        config = write(tmp_path / "fmi.json", address, "Direct", max_timeout=max_timeout)
        comm = fmi.Communicator(0, 2, config, f"alone {joining}")
        message = rf"^\[rank 0, connect\] .* did not join within {seconds} s: 1$"
        with pytest.raises(JoinTimeout, match=message):
            comm.barrier()
        comm.close()


def test_long_lists_have_time_by_their_length(tmp_path: Path, address: str) -> None:
    """The original's `max_timeout` is for a pause: a transfer may take longer than that."""
    config = write(tmp_path / "fmi.json", address, "Direct", max_timeout=100)
    comm = fmi.Communicator(0, 1, config, "long")
    for type, seconds in [(INT, 0.1), (ints(1_250_000), 1.1), (ints(), 0.1)]:
        assert comm._comm(type).timeout == pytest.approx(seconds)
    comm.close()


# ------------------------------------------------------------------- the configuration
WRONG = [
    ("{", "Expecting property name"),
    ("[]", "the configuration is no object"),
    ('{"backends": 1}', "backends is no object"),
    ('{"backends": {"Direct": 1}}', "backends.Direct is no object"),
    ('{"backends": {"Direct": {}}}', "no backend is enabled.*enable Direct"),
    ('{"backends": {"direct": {"enabled": true}}}', "no backend is called direct: enable Direct"),
    ('{"backends": {"Direct": {"enabled": true}}}', "backends.Direct.host is missing"),
    ('{"backends": {"Direct": {"enabled": true, "host": "h"}}}', "backends.Direct.port is missing"),
    (
        '{"backends": {"Direct": {"enabled": "true", "host": "h", "port": 1.5}}}',
        "Direct.port=1.5 is no",
    ),
    ('{"backends": {"S3": {"enabled": true}}}', "backends.S3.bucket_name is missing"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_configuration_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "fmi.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        fmi.Communicator(0, 2, path, "job")


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("backends", "port", "many"),
        ("backends", "port", 0),
        ("backends", "port", 65536),
        ("backends", "max_timeout", 0),
        ("backends", "max_timeout", -1),
        ("backends", "max_timeout", float("inf")),
        ("backends", "max_timeout", 10**400),
        ("model", "bandwidth", 0),
        ("model", "overhead", [1]),
        ("model", "vm_price", float("nan")),
    ],
)
def test_a_wrong_number_is_told(tmp_path: Path, place: str, name: str, value: Any) -> None:
    path = write(tmp_path / "fmi.json", "h:1", "Direct")
    config = json.loads(path.read_text())
    config[place]["Direct"][name] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"^{path}: {place}\.Direct\.{name}=.* is no"):
        fmi.Communicator(0, 2, path, "job")


def test_a_missing_configuration_is_told() -> None:
    with pytest.raises(FileNotFoundError, match=r"FMI_CONFIG for fmi_communicator.*'no/fmi.json'"):
        fmi.Communicator(0, 2, "no/fmi.json", "job")


def test_all_that_is_text_is_read_as_the_library_does(tmp_path: Path) -> None:
    path = tmp_path / "fmi.json"
    backend = {"enabled": "true", "host": "::1", "port": "10000", "max_timeout": "1000"}
    path.write_text(json.dumps({"backends": {"Direct": backend}}))
    settings = fmi_config.read(path)
    assert settings.server == "[::1]:10000"
    assert settings.timeouts == {"auto": 1.0}


def test_where_data_lies_in_a_bucket(tmp_path: Path) -> None:
    settings = fmi_config.read(write(tmp_path / "fmi.json", "h:1", "S3"))
    assert (settings.server, settings.store) == (None, "s3://bucket/fmi")


def test_a_server_can_be_one_with_tls(tmp_path: Path) -> None:
    config = json.loads(write(tmp_path / "fmi.json", "h:1", "Direct").read_text())
    config["backends"]["Direct"]["host"] = "tls://name"
    assert fmi_config.parse(config).server == "tls://name:1"


# -------------------------------------------------------------------------- channels
def test_the_hint_chooses_and_the_prediction_shows(tmp_path: Path) -> None:
    config = write(tmp_path / "fmi.json", "h:1", "Direct", "S3")
    comm = fmi.Communicator(0, 2, config, "job", 512)
    assert comm.choice.hint == "cheap", "as the library's, before any hint"
    assert comm.choice.channel == "object", "two ranks send less than a server costs"
    comm.hint(fmi.hints.fast)
    assert comm.choice.channel == "auto"
    assert "<- chosen" in str(comm.choice)
    # 0.34 ms for a barrier, an allreduce and twice for a gather, whose 100 kB go at 400 MB/s.
    expected = pytest.approx(4 * 0.34e-3 + 1e5 / 400e6, rel=0.01)
    assert comm.choice.predictions["auto"].seconds == expected
    # 40.4 ms, and on average 10 until the receiver looks.
    expected = pytest.approx(4 * 50.4e-3 + 1e5 / 50e6, rel=0.01)
    assert comm.choice.predictions["object"].seconds == expected


def test_prices_are_the_configurations(tmp_path: Path) -> None:
    path = write(tmp_path / "fmi.json", "h:1", "Direct", "S3")
    config = json.loads(path.read_text())

    def dollars(memory_mb: int = 512) -> dict[str, float]:
        path.write_text(json.dumps(config))
        choice = fmi.Communicator(0, 2, path, "job", memory_mb).choice
        return {name: prediction.dollars for name, prediction in choice.predictions.items()}

    before, costlier = dollars(), dollars(1024)
    assert all(costlier[name] > before[name] for name in before)
    for place, field, dearer in [
        ("FaaS", "gib_second_price", {"auto", "object"}),
        ("S3", "upload_price", {"object"}),
        ("S3", "download_price", {"object"}),
        ("Direct", "vm_price", {"auto"}),
    ]:
        config["model"][place][field] *= 2
        after = dollars()
        assert {name for name in after if after[name] > before[name]} == dearer, field
        before = after


def test_a_hint_may_change_between_operations(tmp_path: Path, address: str, bucket: Path) -> None:
    config = write(tmp_path / "fmi.json", address, "Direct", "S3")

    def rank(comm: fmi.Communicator, r: int) -> Any:
        used = []
        for hint in (fmi.hints.cheap, fmi.hints.fast, fmi.hints.cheap):
            comm.hint(hint)
            used.append((comm.choice.channel, comm.allreduce(r + 1, fmi.func(fmi.op.sum), INT)))
        return used

    assert run(config, 2, rank, "both") == [[("object", 3), ("auto", 3), ("object", 3)]] * 2


def test_a_server_that_runs_anyway_costs_nothing(tmp_path: Path) -> None:
    config = write(tmp_path / "fmi.json", "h:1", "Direct", "S3")
    settings = json.loads(config.read_text())
    del settings["model"]["Direct"]["include_infrastructure_costs"]  # false, as in the library
    config.write_text(json.dumps(settings))
    assert fmi.Communicator(0, 2, config, "job", 512).choice.channel == "auto"


def test_s3_is_the_object_channel(tmp_path: Path, bucket: Path) -> None:
    config = write(tmp_path / "fmi.json", "h:1", "S3")

    def rank(comm: fmi.Communicator, r: int) -> Any:
        return comm.allreduce(r + 1, fmi.func(fmi.op.sum), INT)

    assert run(config, 2, rank, "s3") == [3, 3]


def test_redis_is_left_out_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "fmi.json"
    with pytest.warns(UserWarning, match="Redis here: a hint chooses from Direct only") as seen:
        fmi.Communicator(0, 2, write(path, "h:1", "Redis", "Direct"), "job")
    assert seen[0].filename == __file__
    with pytest.raises(ValueError, match=r"only Redis is enabled.*enable Direct"):
        fmi.Communicator(0, 2, write(path, "h:1", "Redis"), "job")
    with pytest.raises(ValueError, match="no backend is enabled"):
        fmi.Communicator(0, 2, write(path, "h:1"), "job")


# -------------------------------------------------------------------------- document
PAGE = (ROOT / "docs" / "from-fmi.md").read_text()
TABLE = PAGE.partition("| with the drop-in |")[2].partition("\n\n")[0].splitlines()[2:]
ROWS = [re.fullmatch(r"\| `(.+)` \| `(.+)` \|", line).groups() for line in TABLE]
RESULTS = [  # on ranks 0 and 1
    *[(None, None)] * 3,
    (7, 7),
    (None, None),
    ([0.5, 1.5], [0.5, 1.5]),
    (3, 3),
    ([0.5, 1.0], [0.5, 1.0]),
    ([0, 1], []),
    ([0, 5, 1, 5], []),
    ([1], [2]),
    (3, None),
    (0.75, 0.75),
    ([1, 5], [1, 5]),
    *[(1, 1)] * 3,
    (None, None),
]


def block(language: str, start: str = "") -> str:
    """Return the only block of code in a language that starts so."""
    found = re.findall(rf"^```{language}\n({re.escape(start)}.*?)^```$", PAGE, re.M | re.S)
    assert len(found) == 1
    return str(found[0])


def perform(calls: Sequence[str], rank: int) -> list[Any]:
    """Return what each call returned, None for a statement; arrays as lists."""
    names: dict[str, Any] = {"fmi": fmi, "fmi_client": fmi_client, "r": rank}
    exec(block("python", "import functools"), names)
    results = []
    for call in calls:
        try:
            code = compile(call, call, "eval")
        except SyntaxError:
            code = compile(call, call, "exec")
        got = eval(code, names)
        results.append(got.tolist() if isinstance(got, np.ndarray | np.generic) else got)
    return results


def test_every_row_of_the_document_does_the_same_both_ways(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "fmi.json", address, "Direct")
    monkeypatch.chdir(tmp_path)
    for column in zip(*ROWS, strict=True):
        calls = [call.replace("127.0.0.1:10000", address) for call in column]
        with ProcessPoolExecutor(2, fork) as pool:
            results = pool.map(perform, [calls, calls], range(2), timeout=20)
            assert list(zip(*results, strict=True)) == RESULTS


def test_the_document_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fmi.json").write_text(block("json"))
    monkeypatch.chdir(tmp_path)
    exec(block("python", "comm = "), {"fmi": fmi})
    assert capsys.readouterr().out == block("text")


def test_the_document_names_every_field() -> None:
    """Of the configuration that the library ships."""
    names = """
        backends.Redis model.Redis host port bucket_name max_timeout timeout s3_region
        gib_second_price bandwidth overhead upload_price download_price transfer_price vm_price
        requests_per_hour include_infrastructure_costs
    """
    for field in names.split():
        assert f"`{field}`" in PAGE, field
