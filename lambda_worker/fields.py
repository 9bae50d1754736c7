"""Kinds of values that events hold; what is wrong with one is said without repeating it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fmi_client.hosts import parse_endpoint

MAX_WORLD_SIZE = 10_000  # AWS Step Functions' limit for the concurrency of a distributed Map
ARN = (
    r"arn:aws[a-z-]*:(secretsmanager:[a-z0-9-]+:\d{12}:secret:[A-Za-z0-9/_+=.@-]+"
    r"|ssm:[a-z0-9-]+:\d{12}:parameter/[A-Za-z0-9/_.-]+)"
)
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,%d}"


def _number(value: object) -> object:
    # pydantic would read True as 1, and a flag in a number's place is always a mistake.
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _endpoint(value: object) -> object:
    try:
        parse_endpoint(str(value), default_port=0)
    except ValueError:
        expected = "expected host:port, for example rendezvous.example.org:10000"
        raise ValueError(expected) from None
    return value


def _bucket(value: object) -> object:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}|/.*|(file|s3)://.+", str(value)):
        raise ValueError("expected the name of an S3 bucket")
    return value


def _relative(value: object) -> object:
    if isinstance(value, str) and ".." in value.split("/"):
        raise ValueError("expected a path below the results folder, without '..'")
    return value


def _files(value: object) -> object:
    listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if not (value is None or isinstance(value, str) or listed):
        raise ValueError("expected a file, a list of files, or null")
    return value


def _name(longest: int) -> BeforeValidator:
    def check(value: object) -> object:
        if not re.fullmatch(NAME % (longest - 1), str(value)):
            raise ValueError(
                f"expected letters, digits and . _ - (not first), {longest} characters at most"
            )
        return str(value)

    return BeforeValidator(check)


def _batch_size(value: object) -> object:
    if isinstance(value, str) and value.lower() == "auto":
        return "auto"
    try:
        if not isinstance(value, bool) and (rows := int(str(value))) >= 1:
            return rows
    except ValueError:
        pass
    raise ValueError('expected a number of rows, 1 or more, or "auto"')


def check_arn(value: object) -> object:
    """Give back the ARN of a secret (Secrets Manager) or parameter (SSM), or raise ValueError."""
    if not re.fullmatch(ARN, str(value)):
        raise ValueError(
            "expected the ARN of a secret, arn:aws:secretsmanager:REGION:ACCOUNT:secret:NAME, "
            "or of a parameter, arn:aws:ssm:REGION:ACCOUNT:parameter/NAME"
        )
    return value


def _filled(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("expected a name, not an empty text")
    if isinstance(value, str) and re.match("s3://(/|$)", value):
        raise ValueError("expected s3://bucket/key")
    return value


def _string_keys(value: object) -> object:
    """Ranks as JSON's keys are, strings, also where a Python caller writes numbers."""
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Index = Annotated[int, BeforeValidator(_number), Field(ge=0)]
BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_batch_size)]
Seconds = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
WorldSize = Annotated[int, BeforeValidator(_number), Field(ge=1, le=MAX_WORLD_SIZE)]
Endpoint = Annotated[str, BeforeValidator(_endpoint)]
RelativePath = Annotated[str, BeforeValidator(_relative)]
RunName = Annotated[str, _name(100)]
UniqueId = Annotated[str, _name(64)]
Threads = Annotated[int, BeforeValidator(_number), Field(ge=1, le=1024)]
Files = Annotated[str | list[str] | None, BeforeValidator(_files)]
Place = Annotated[str, BeforeValidator(_filled)]
Bucket = Annotated[str, BeforeValidator(_bucket)]
SecretArn = Annotated[str, BeforeValidator(check_arn)]
FilesByRank = Annotated[dict[str, Files], BeforeValidator(_string_keys)]


def is_place(name: str) -> bool:
    """Whether a name is complete, and no key of a bucket."""
    return "://" in name or name.startswith("/")


def bucket_url(bucket: str) -> str:
    """A bucket's URL; a folder may stand in a bucket's place, to try a payload without S3."""
    return bucket.rstrip("/") if is_place(bucket) else f"s3://{bucket}"
