"""Calls of AWS: the clients, what the deployed stack says, and every error as one line of advice.

boto3 is imported when the first client is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["LONGEST_NAME", "AwsError", "Stack"]
__all__ += ["aws_errors", "client", "find_stack", "state_machine_arn"]

LONGEST_NAME = 80  # of an execution, in characters
_NEW_KEYS = "renew them (`aws sso login`, say) and run again"
_NO_ACCESS = "allow it in the policy of these credentials"
_THROTTLED = "AWS throttles the calls, even after waiting: try again in a minute"
_WRONG_KEY = "unknown access key: check AWS_ACCESS_KEY_ID, AWS_SESSION_TOKEN and AWS_PROFILE"
_ADVICE = {
    "AccessDenied": _NO_ACCESS,
    "AccessDeniedException": _NO_ACCESS,
    "AuthFailure": _WRONG_KEY,
    "ExecutionAlreadyExists": "the name is taken, for Step Functions keeps the names of executions "
    "for 90 days: choose another --run",
    "ExecutionLimitExceeded": "too many executions are open: wait for some to end, or ask AWS for "
    "a higher quota",
    "ExpiredToken": f"the credentials have expired: {_NEW_KEYS}",
    "ExpiredTokenException": f"the credentials have expired: {_NEW_KEYS}",
    "InvalidArn": "that is no ARN of a state machine: check --state-machine",
    "InvalidClientTokenId": _WRONG_KEY,
    "InvalidSignatureException": "wrong secret key: check AWS_SECRET_ACCESS_KEY, and the clock",
    "RequestExpired": f"the credentials have expired, or the clock is wrong: {_NEW_KEYS}",
    "RequestLimitExceeded": _THROTTLED,
    "SignatureDoesNotMatch": "wrong secret key: check AWS_SECRET_ACCESS_KEY, and the clock",
    "StateMachineDeleting": "the state machine is being deleted: deploy it again",
    "StateMachineDoesNotExist": "no such state machine: check --state-machine and the region",
    "StateMachineTypeNotSupported": "an EXPRESS state machine cannot be followed: make a STANDARD "
    "one",
    "Throttling": _THROTTLED,
    "ThrottlingException": _THROTTLED,
    "TooManyRequestsException": _THROTTLED,
    "UnrecognizedClientException": _WRONG_KEY,
}
_NO_CREDENTIALS = (
    "no credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run "
    "`aws sso login`"
)
_NO_REGION = "no region: set AWS_DEFAULT_REGION (us-east-1, say), or region in ~/.aws/config"
_UNREACHABLE = "check --endpoint-url or AWS_ENDPOINT_URL, the region, and the network"
# By class, of botocore.exceptions; what the calls below can raise.
_CAUSES = {
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": _NO_CREDENTIALS,
    "CredentialRetrievalError": _NO_CREDENTIALS,
    "NoRegionError": _NO_REGION,
    "ProfileNotFound": "no such profile: check AWS_PROFILE and ~/.aws/config",
    "SSOTokenLoadError": f"the credentials have expired: {_NEW_KEYS}",
    "TokenRetrievalError": f"the credentials have expired: {_NEW_KEYS}",
    "UnauthorizedSSOTokenError": f"the credentials have expired: {_NEW_KEYS}",
}


class AwsError(RuntimeError):
    """A call of AWS failed; one line says which, why, and what to do.

    ``code`` is AWS's own name of the error, or botocore's; ``passes`` is true where the same call
    may well succeed in a while.
    """

    def __init__(self, text: str, code: str = "", passes: bool = False) -> None:
        super().__init__(text)
        self.code, self.passes = code, passes

    @property
    def denied(self) -> bool:
        """Whether the credentials are good, but do not allow this call."""
        return self.code in ("AccessDenied", "AccessDeniedException")


@contextmanager
def aws_errors(doing: str) -> Iterator[None]:
    """The one place where boto3's errors become ours; ``doing`` is what they interrupt."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _answered(doing, error.response) from error
    except BotoCoreError as error:
        raise _unanswered(doing, error) from error


def _answered(doing: str, response: Any) -> AwsError:
    error, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
    code, message = error.get("Code", "unknown"), _one_line(error.get("Message", ""))
    advice = _ADVICE.get(code, f"{code}: {message}")
    if advice == _NO_ACCESS:  # only the message says who may not do what
        advice = f"access denied: {message}; {advice}"
    passes = meta.get("HTTPStatusCode", 0) >= 500 or advice == _THROTTLED
    return AwsError(f"cannot {doing}: {advice}", code, passes)


def _unanswered(doing: str, error: Exception) -> AwsError:
    from botocore.exceptions import ConnectionError as Unreachable
    from botocore.exceptions import HTTPClientError

    kinds = [kind.__name__ for kind in type(error).__mro__]
    advice = next((_CAUSES[kind] for kind in kinds if kind in _CAUSES), None)
    lost = isinstance(error, Unreachable | HTTPClientError) and advice is None
    if advice is None:
        message = _one_line(str(error))
        advice = f"{message}; {_UNREACHABLE}" if lost else message
    return AwsError(f"cannot {doing}: {advice}", kinds[0], passes=lost)


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


@contextmanager
def client(service: str, region: str | None = None) -> Iterator[Any]:
    """Make a client for the block; endpoint, region and credentials are the environment's.

    Raises:
        AwsError: no region, say.
    """
    made = _make(service, region)
    try:
        yield made
    finally:
        made.close()


def _make(service: str, region: str | None) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    # Short, for somebody waits at a terminal; who polls comes back anyway.
    config = Config(
        connect_timeout=5, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 4}
    )
    with aws_errors(f"use {service}"):
        make: Any = Session().client  # the stubs know no more than S3
        try:
            return make(service, region_name=region, config=config)
        except ValueError as error:  # the endpoint's URL, of which botocore says just that
            raise AwsError(f"cannot use {service}: {error}; {_UNREACHABLE}") from error


@dataclass(frozen=True)
class Stack:
    """A deployed stack: its name, and its outputs by their names in deploy/template.yaml."""

    name: str
    outputs: Mapping[str, str]

    def need(self, output: str, options: str) -> str:
        """Return an output; ``options`` are what could be given in its place.

        Raises:
            AwsError: the stack has no such output.
        """
        if output not in self.outputs:
            text = f"cannot use the stack {self.name}: it has no output {output}"
            raise AwsError(f"{text}; give {options}, or deploy it again (docs/deploy.md)")
        return self.outputs[output]


def find_stack(name: str) -> Stack:
    """Read the outputs of the CloudFormation stack ``name``.

    Raises:
        AwsError: there is no such stack, it is not (or not wholly) deployed, or no access.
    """
    with client("cloudformation") as cloudformation:
        found = _describe(cloudformation, name)
    outputs = {item["OutputKey"]: item["OutputValue"] for item in found.get("Outputs", ())}
    if "StateMachineArn" not in outputs:
        text = f"it is {found['StackStatus']} and has no output StateMachineArn"
        raise AwsError(f"cannot use the stack {name}: {text}; deploy it (docs/deploy.md)")
    return Stack(name, outputs)


def _describe(cloudformation: Any, name: str) -> Any:
    doing = f"read the stack {name}"
    try:
        with aws_errors(doing):
            return cloudformation.describe_stacks(StackName=name)["Stacks"][0]
    except AwsError as error:
        if error.code != "ValidationError" or "does not exist" not in str(error):
            raise
        region = cloudformation.meta.region_name
        text = f"there is none in {region}: check --stack and the region, or deploy it"
        raise AwsError(f"cannot {doing}: {text} (docs/deploy.md)", error.code) from error


def state_machine_arn(name: str) -> str:
    """Return the ARN of a state machine of this account and region; an ARN as it is.

    Raises:
        AwsError: whose account it is, is not to be found out.
    """
    if name.startswith("arn:"):
        return name
    with client("sts") as sts:
        region = sts.meta.region_name
        with aws_errors("find out the account"):
            caller = sts.get_caller_identity()
    partition = caller["Arn"].split(":")[1]
    return f"arn:{partition}:states:{region}:{caller['Account']}:stateMachine:{name}"
