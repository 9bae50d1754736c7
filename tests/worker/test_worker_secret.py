"""Secrets by reference: read once, used to join, and never to be seen anywhere."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fmi_client import errors, sync
from fmi_client.protocol.auth import Token, admission_key
from lambda_worker import handlers, secret
from lambda_worker.events import EventError, Payload, RankTask, parse
from lambda_worker.secret import SecretError, SecretUnavailable
from tests.processes import serve_rendezvous
from tests.support import in_thread
from tests.worker.vault import Vault
from tests.worker.worker_data import MakePt

SERVER_SECRET = "the-servers-own-secret-0123456789"
KEY = "5e" * 32
SECRET_ARN = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:cosmic/server-AbC123"
KEY_ARN = "arn:aws:ssm:us-east-2:123456789012:parameter/cosmic/key"
ARNS = {"server_secret_arn": SECRET_ARN, "key_arn": KEY_ARN}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vault]:
    """A vault that holds both secrets, and no memory of earlier ones."""
    secret._provider.cache_clear()
    with in_thread(Vault()) as server:
        server.values = {SECRET_ARN: f"{SERVER_SECRET}\n", KEY_ARN: KEY}
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        for name in ("FMI_KEY", "FMI_TOKEN", "FMI_KEY_ARN", "FMI_SERVER_SECRET_ARN"):
            monkeypatch.delenv(name, raising=False)
        yield server
    secret._provider.cache_clear()


def task(**fields: Any) -> RankTask:
    least = {"rank": 0, "world_size": 2, "run": "r1", "results": "out"}
    return parse(RankTask, {**least, "rendezvous_endpoint": "host:1", **fields})


def test_a_rank_mints_its_own_token_and_derives_its_runs_key(kept: Vault) -> None:
    found = secret.credentials(task(**ARNS))
    token = Token.parse(found["token"])
    assert token.key == admission_key(SERVER_SECRET.encode(), "r1", 2, token.expires)
    assert len(found["key"]) == 32
    assert found["key"] != bytes.fromhex(KEY)
    other = secret.credentials(task(**{**ARNS, "run": "r2"}))
    assert other["key"] != found["key"]
    assert secret.credentials(task(**{**ARNS, "rank": 1}))["key"] == found["key"]


def test_a_warm_worker_does_not_ask_again(kept: Vault) -> None:
    for rank in (0, 1):
        secret.credentials(task(**ARNS, rank=rank))
    assert sorted(kept.asked) == sorted([SECRET_ARN, KEY_ARN])


def test_arns_of_the_functions_environment(kept: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    assert secret.credentials(task()) == {}
    monkeypatch.setenv("FMI_KEY_ARN", KEY_ARN)
    monkeypatch.setenv("FMI_SERVER_SECRET_ARN", SECRET_ARN)
    assert set(secret.credentials(task())) == {"key", "token"}
    monkeypatch.setenv("FMI_KEY", "00" * 32)  # who sets the thing itself means it
    assert set(secret.credentials(task())) == {"token"}
    assert set(secret.credentials(task(**ARNS))) == {"key", "token"}
    monkeypatch.setenv("FMI_SERVER_SECRET_ARN", "hunter2")
    with pytest.raises(
        EventError, match="FMI_SERVER_SECRET_ARN in the environment: got what is not shown"
    ):
        secret.credentials(task())


@pytest.mark.parametrize(
    ("arn", "answer", "kind", "hint"),
    [
        (SECRET_ARN, "AccessDeniedException", SecretError, "allow secretsmanager:GetSecretValue"),
        (KEY_ARN, "AccessDeniedException", SecretError, "allow ssm:GetParameter"),
        (SECRET_ARN, "ResourceNotFoundException", SecretError, "no such secret: create it"),
        (KEY_ARN, "ParameterNotFound", SecretError, "no such secret: create it"),
        (SECRET_ARN, "DecryptionFailure", SecretError, "allow kms:Decrypt"),
        (
            SECRET_ARN,
            "AccessDeniedException: Access to KMS is not allowed",
            SecretError,
            "allow kms:Decrypt",
        ),
        (SECRET_ARN, "InvalidRequestException", SecretError, "marked for deletion"),
        (SECRET_ARN, "InternalServiceError", SecretUnavailable, "InternalServiceError"),
    ],
)
def test_why_a_secret_cannot_be_read(
    kept: Vault, arn: str, answer: str, kind: type[Exception], hint: str
) -> None:
    kept.values[arn] = Exception(*answer.split(": "))
    with pytest.raises(kind) as caught:
        secret.credentials(task(**ARNS))
    assert str(caught.value).startswith(f"{arn}: ")
    assert hint in str(caught.value)


@pytest.mark.parametrize("value", ["", " \n"])
def test_empty(kept: Vault, value: str) -> None:
    kept.values[SECRET_ARN] = value
    with pytest.raises(SecretError, match="it is empty: put a value into it"):
        secret.credentials(task(**ARNS))


@pytest.mark.parametrize("value", ["00" * 31, "xy" * 32, '{"key": "00"}', "ä" * 20])
def test_a_key_that_is_none(kept: Vault, value: str) -> None:
    kept.values[KEY_ARN] = value
    with pytest.raises(SecretError, match="expected 32 bytes, or 64 hexadecimal digits") as caught:
        secret.credentials(task(**ARNS))
    assert value not in str(caught.value)
    assert caught.value.__cause__ is None


def test_nobody_answers(kept: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def get(self, *_: object, **__: object) -> None:
            from botocore.exceptions import EndpointConnectionError

            raise EndpointConnectionError(endpoint_url="http://nowhere")

    with monkeypatch.context() as patch:
        patch.setattr(secret, "_provider", lambda *_: Refusing())
        with pytest.raises(SecretUnavailable, match="check the network"):
            secret.credentials(task(**ARNS))


@pytest.mark.parametrize(
    "arn",
    [
        "hunter2",
        "arn:aws:s3:::bucket",
        "arn:aws:secretsmanager:eu-west-1:12:secret:x",
        "arn:aws:ssm:eu-west-1:123456789012:document/x",
        f"{SECRET_ARN} x",
    ],
)
def test_what_is_no_arn(arn: str) -> None:
    for name in ARNS:
        with pytest.raises(EventError, match=f"^{name}: got .*expected the ARN of a secret"):
            parse(Payload, {"data": "d", name: arn})


@pytest.mark.parametrize("partition", ["aws", "aws-cn", "aws-us-gov"])
def test_arns_of_all_partitions(partition: str) -> None:
    parse(Payload, {"data": "d", "key_arn": KEY_ARN.replace("aws", partition, 1)})


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """host:port of a rendezvous server that admits only whom its secret admits."""
    with serve_rendezvous(secret=SERVER_SECRET) as server:
        yield server


@pytest.fixture
def plan(make_pt: MakePt, tmp_path: Path, guarded: str) -> dict[str, Any]:
    event = {"data": str(make_pt("data/1.pt", 12)), "results": str(tmp_path / "out"), "run": "r"}
    options = {"world_size": 2, "rendezvous_endpoint": guarded, "timeout": 30, "ranks_file": True}
    return handlers.init({**event, **options, **ARNS})


def infer(plan: dict[str, Any]) -> list[Any]:
    ranks = json.loads(Path(plan["ranks_file"]["path"]).read_text())
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(handlers.infer, {"task": rank, "epoch": 0}) for rank in ranks]
    return [future.exception() or future.result() for future in futures]


def test_nothing_secret_is_ever_shown(
    kept: Vault,
    plan: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a run that goes well, and of one that fails with the secrets in use."""
    shown: list[dict[str, Any]] = []
    connect = sync.connect

    def spy(*server: str, **options: Any) -> sync.Communicator:
        shown.append(options)
        return connect(*server, **options)

    monkeypatch.setattr(sync, "connect", spy)
    caplog.set_level(logging.DEBUG)
    outcome: list[Any] = [*infer(plan), handlers.summarize(plan)]
    ranks = Path(plan["ranks_file"]["path"])
    ranks.write_text(ranks.read_text().replace("1.pt", "2.pt"))
    outcome += infer(plan)
    outcome.append(handlers.blame(plan))
    assert all(isinstance(record, dict) for record in outcome[:3])
    assert outcome[5]["error"] == "DatasetError"
    assert len(shown) == 4
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    seen = b"\0".join([*files, repr(outcome).encode(), json.dumps(plan).encode()])
    seen += caplog.text.encode() + "".join(capfd.readouterr()).encode()
    assert SECRET_ARN.encode() in seen  # the references may be seen, and show that we look
    hidden = [SERVER_SECRET.encode(), KEY.encode(), bytes.fromhex(KEY)]
    for options in shown:
        token = options["token"].encode()
        hidden += [options["key"], options["key"].hex().encode(), token, token.split(b".")[2]]
    for value in hidden:
        assert value not in seen


def test_a_wrong_secret_does_not_admit(kept: Vault, plan: dict[str, Any]) -> None:
    kept.values[SECRET_ARN] = "another"
    assert {type(error) for error in infer(plan)} == {errors.AuthenticationFailed}


def test_ranks_of_two_keys_do_not_talk(
    kept: Vault, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_key = secret.job_key
    keys = iter([b"1" * 32, b"2" * 32])
    monkeypatch.setattr(secret, "job_key", lambda *args: job_key(*args) and next(keys))
    monkeypatch.setattr("fmi_client.punches.PUNCH_SECONDS", 1.0)
    assert all(isinstance(error, errors.FmiError) for error in infer(plan))


def test_check_reads_the_servers_secret_by_reference(kept: Vault, guarded: str) -> None:
    event = {"server": guarded, "admin_port": 0}
    assert handlers.check({**event, "server_secret_arn": SECRET_ARN})["ok"] is True
    assert handlers.check(event)["ok"] is False
