"""A local AWS for docs/deploy.md: ministack, with containers that reach it and each other.

    make tools
    .tools/ministack/bin/python deploy/local_aws.py      # says what to export; Ctrl-C ends it

It does what an account does as far as it can: over TLS, and with IAM enforced. Fargate tasks and
image functions are containers on Docker's default network, and the emulator listens at that
network's gateway (at 127.0.0.1 where there is no Docker), at port 4566 or GATEWAY_PORT.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parents[1] / ".tools"
EMULATOR_IN_WORKER = "/usr/local/bin/aws-lambda-rie"
CERTIFICATE_IN_WORKER = "/etc/ssl/local-aws.pem"
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR


def main() -> None:
    """Run ministack in this process until it is told to stop."""
    host, port = gateway(), os.environ.setdefault("GATEWAY_PORT", "4566")
    endpoint, certificate, key = f"https://{host}:{port}", *certify(host, f"local-aws-{port}")
    mounts = {runtime_emulator(): EMULATOR_IN_WORKER, certificate: CERTIFICATE_IN_WORKER}
    flags = [f"-v {ours}:{theirs}:ro" for ours, theirs in mounts.items()]
    os.environ |= {
        "BIND_HOST": host,
        "AWS_ENDPOINT_URL": endpoint,  # what functions are told
        "AUTH": "true",  # functions may do what their roles say, and nothing else
        "USE_SSL": "1",  # the bucket's policy refuses everybody who comes without
        "MINISTACK_SSL_CERT": str(certificate),
        "MINISTACK_SSL_KEY": str(key),
        "LAMBDA_ACCOUNT_CONCURRENCY": "0",  # as many ranks at once as there are
        "LAMBDA_DOCKER_FLAGS": " ".join([*flags, f"-e AWS_CA_BUNDLE={CERTIFICATE_IN_WORKER}"]),
    }
    ours = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_CA_BUNDLE": str(certificate),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    print("export", *(f"{name}={value}" for name, value in ours.items()), flush=True)
    from ministack.app import main as serve

    mend()
    serve()


def gateway(interface: str = "docker0") -> str:
    """Return the address at which containers reach this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("256s", interface.encode())
        try:
            answer = fcntl.ioctl(sock, _ADDRESS_OF_INTERFACE, request)
        except OSError:
            return "127.0.0.1"
    return socket.inet_ntoa(answer[20:24])


def certify(host: str, name: str) -> tuple[Path, Path]:
    """Make a certificate for an address, called so; returns it and its key."""
    folder = Path(tempfile.gettempdir())
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 30"
    # With Docker Desktop containers call this machine so, and ministack tells them to.
    also = "DNS:host.docker.internal"
    names = f"-subj /CN={host} -addext subjectAltName=IP:{host},{also}"
    files = ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(
        [*command.split(), *names.split(), "-addext", "basicConstraints=CA:FALSE", *files],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return certificate, key


def runtime_emulator() -> Path:
    """Return Lambda's Runtime Interface Emulator, which SAM brings and the worker image has not."""
    machine = "arm64" if platform.machine() in ("arm64", "aarch64") else "x86_64"
    return next(TOOLS.glob(f"sam/lib/python3*/site-packages/samcli/local/rapid/*-rie-{machine}"))


def mend() -> None:
    """Have ministack 1.5.33 do with two things of the template what CloudFormation does.

    Of a container it loses lists like Secrets, since it leaves their items' names in capitals; of
    GenerateSecretString it heeds the length only, though it has a generator that heeds all.
    """
    from ministack.services import secretsmanager
    from ministack.services.cloudformation import provisioners

    translate = provisioners._normalize_container_defs

    def container_definitions(definitions: list[dict[str, Any]]) -> Any:
        translated = translate(definitions)
        for definition in translated:
            for name in ("secrets", "ulimits", "healthCheck"):
                if name in definition:
                    definition[name] = provisioners._pascal_to_camel(definition[name])
        return translated

    def secret_string(properties: dict[str, Any]) -> Any:
        answer = secretsmanager._get_random_password(properties["GenerateSecretString"])
        return json.loads(answer[2])["RandomPassword"]

    provisioners._normalize_container_defs = container_definitions
    provisioners._sm_secret_string = secret_string


if __name__ == "__main__":
    main()
