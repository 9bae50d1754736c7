"""Secrets by reference: a rank reads what it needs to join from where an ARN says it is kept.

What is read stays in this process's memory, some minutes long, so that a warm worker does not ask
again. It is handed to `fmi_client` and to nobody else: no log, error, result or file has it.
"""

from __future__ import annotations

import logging
import os
import time
from functools import cache
from typing import Any

from fmi_client.protocol import auth
from lambda_worker.events import EventError, RankTask
from lambda_worker.fields import check_arn

KEPT_SECONDS = 300
TOKEN_SECONDS = 60.0  # a token outlives the time for joining by so much: clocks differ
JOB_KEY = "cosmic job key"

DENIED = "no permission: allow {action} on it in the policy of this function's role"
UNREADABLE = "it cannot be decrypted: allow kms:Decrypt with its key in this function's role"
ABSENT = "no such secret: create it, or correct the ARN (its region and account, too)"
HINTS = {
    "AccessDeniedException": DENIED,
    "AccessDenied": DENIED,
    "ResourceNotFoundException": ABSENT,
    "ParameterNotFound": ABSENT,
    "ParameterVersionNotFound": ABSENT,
    "DecryptionFailure": UNREADABLE,
    "InvalidKeyId": UNREADABLE,
    "InvalidRequestException": "it is marked for deletion: restore it, or name another one",
    "UnrecognizedClientException": "the credentials are not valid: check AWS_ACCESS_KEY_ID",
}
ACTIONS = {"secretsmanager": "secretsmanager:GetSecretValue", "ssm": "ssm:GetParameter"}


class SecretError(RuntimeError):
    """A secret is missing, empty, of the wrong form, or not for us.

    The text names its ARN and says what to do, and never holds any of the secret.
    """


class SecretUnavailable(RuntimeError):
    """A secret could not be read this time: throttled, or the network; the text says which."""


def credentials(task: RankTask) -> dict[str, Any]:
    """What a rank shows when it joins: `key` and `token` for `fmi_client.connect`, where known.

    What is not in here comes from FMI_KEY and FMI_TOKEN, if these are set.

    Raises:
        EventError: an ARN in the environment is none.
        SecretError, SecretUnavailable: a secret cannot be read, or cannot be used.
    """
    found: dict[str, Any] = {}
    if key := job_key(task.key_arn, str(task.run)):
        found["key"] = key
    if secret := server_secret(task.server_secret_arn):
        expires = time.time() + task.timeout + TOKEN_SECONDS
        size, job = task.world_size, str(task.run)
        found["token"] = auth.make_token(secret, job=job, size=size, expires=expires)
    return found


def server_secret(arn: str | None) -> bytes | None:
    """The rendezvous server's secret, as `credentials` finds it."""
    arn = _arn(arn, "FMI_SERVER_SECRET_ARN", "FMI_TOKEN")
    return _read(arn).strip() if arn else None


def job_key(arn: str | None, run: str) -> bytes | None:
    """The key of a run's ranks, derived from the key of all runs, as `credentials` finds it.

    A rank of one run cannot speak in another one, nor find out the key of all.
    """
    arn = _arn(arn, "FMI_KEY_ARN", "FMI_KEY")
    if arn is None:
        return None
    value = _read(arn)
    try:
        text = value.decode().strip() if len(value) != auth.KEY_BYTES else value
        key = auth.parse_key(text)
    except ValueError:
        raise SecretError(
            f"{arn}: cannot be the ranks' key: expected 32 bytes, or 64 hexadecimal digits, "
            "as `openssl rand -hex 32` makes them"
        ) from None
    assert key is not None
    return auth.mac(key, JOB_KEY, run.encode())


def _arn(given: str | None, name: str, instead: str) -> str | None:
    """An event's ARN, or, if the environment does not hold the thing itself, its ARN."""
    if given or os.environ.get(instead):
        return given
    value = os.environ.get(name)
    try:
        return str(check_arn(value)) if value else None
    except ValueError as error:
        raise EventError(
            f"{name} in the environment: got what is not shown here, {error}"
        ) from None


def _read(arn: str) -> bytes:
    service, region = arn.split(":")[2:4]
    options = {"decrypt": True} if service == "ssm" else {}
    try:
        value = _provider(service, region).get(arn, max_age=KEPT_SECONDS, **options)
    except ModuleNotFoundError as error:
        raise SecretError(f"{arn}: cannot be read here: pip install 'cosmic-fmi[aws]'") from error
    except Exception as error:
        raise _explained(arn, service, error) from None
    content = value.encode() if isinstance(value, str) else bytes(value or b"")
    if not content.strip():
        raise SecretError(f"{arn}: it is empty: put a value into it")
    return content


@cache
def _provider(service: str, region: str) -> Any:
    """Powertools' reader of secrets or parameters, which remembers what it has read."""
    from aws_lambda_powertools.utilities.parameters import SecretsProvider, SSMProvider
    from botocore.config import Config

    # Where everything is logged, it would log every answer, and with it what was read.
    logging.getLogger("botocore.parsers").setLevel(logging.INFO)
    # All ranks start at once, and Parameter Store takes 40 requests a second by default.
    retries: Any = {"mode": "standard", "max_attempts": 8}
    config = Config(region_name=region, connect_timeout=5, read_timeout=10, retries=retries)
    provider = SSMProvider if service == "ssm" else SecretsProvider
    return provider(boto_config=config)


def _explained(arn: str, service: str, error: Exception) -> Exception:
    """boto3's error, which Powertools hides behind one of its own, in our words."""
    from botocore.exceptions import ClientError

    cause = error.__context__ or error
    if not isinstance(cause, ClientError):
        hint = "check the network (a VPC's endpoint, AWS_ENDPOINT_URL) and the credentials"
        return SecretUnavailable(f"{arn}: cannot be read: {cause} ({hint})")
    told: dict[str, Any] = {**cause.response.get("Error", {})}
    code = str(told.get("Code", ""))
    if HINTS.get(code) == DENIED and "kms" in str(told.get("Message", "")).lower():
        code = "DecryptionFailure"
    if code in HINTS:
        return SecretError(f"{arn}: {HINTS[code].format(action=ACTIONS[service])}")
    return SecretUnavailable(f"{arn}: cannot be read: {code}: try again later")
