"""What a check is to look at: its arguments, verified, and what it may show the server."""

from __future__ import annotations

import math
import os
import secrets
import time
from dataclasses import dataclass
from typing import Self

from fmi_client.endpoint import MAX_SECONDS
from fmi_client.findings import Credentials
from fmi_client.hosts import parse_endpoint
from fmi_client.join_request import JoinRequest
from fmi_client.protocol import auth
from fmi_client.protocol.addresses import format_address
from fmi_client.protocol.tls import SCHEME

MOST_RANKS = 8
"""Every pair is measured alone, one after the other: 28 pairs take a minute."""

TOKEN_SECONDS = 600.0
"""How long the token is valid that is made from the server's secret."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to check, verified."""

    server: str
    request: JoinRequest
    credentials: Credentials
    admin_port: int
    timeout: float

    @classmethod
    def make(
        cls,
        server: str,
        *,
        job: str | None = None,
        rank: int | None = None,
        size: int | None = None,
        token: str | None = None,
        secret: bytes | None = None,
        admin_port: int | None = None,
        timeout: float = 10.0,
        wait: float = 60.0,
    ) -> Self:
        """Check the arguments.

        Args:
            server: "host:port" (port 10000 by default), with or without "tls://" before it.
            job, rank, size: what to join, to test its links; None: a job of our own.
            token: admits that job to the server; default FMI_TOKEN.
            secret: the server's, to make a token from.
            admin_port: the server's second port; default: the next one; 0: none.
            timeout: seconds for each step.
            wait: seconds for the other ranks to come.

        Raises:
            ValueError: the text names the argument.
        """
        host, port = parse_endpoint(server)
        given = (job is not None, rank is not None, size is not None)
        if any(given) and not all(given):
            raise ValueError("job, rank and size go together: give all three, or none")
        if size is not None and size > MOST_RANKS:
            raise ValueError(
                f"size={size}: a check tests the links of at most {MOST_RANKS} ranks; start it on "
                "some of them, with a job name and size of its own"
            )
        if token and secret:
            raise ValueError("token and secret: give one of them, a token is made from the secret")
        if token and job is None:
            raise ValueError("token: it admits one job only; give its job, rank and size, too")
        if not (0 < timeout < math.inf and 0 < wait < math.inf):
            raise ValueError(
                f"timeout={timeout} s, wait={wait} s: they must be positive and finite"
            )
        if admin_port is None:
            admin_port = port + 1 if port < 65535 else 0
        if not 0 <= admin_port < 65536:
            raise ValueError(f"admin_port={admin_port} is not a port, from 0 (none) to 65535")
        request = _request(server, job, rank, size, token, secret, min(wait, MAX_SECONDS))
        used = _credentials(request, secret is not None, job is not None)
        place = format_address((host, port))
        if request.tls:
            place = SCHEME + place
        return cls(place, request, used, admin_port, min(timeout, MAX_SECONDS))


def _request(
    server: str,
    job: str | None,
    rank: int | None,
    size: int | None,
    token: str | None,
    secret: bytes | None,
    wait: float,
) -> JoinRequest:
    alone = job is None or rank is None or size is None
    if job is None or rank is None or size is None:
        job, rank, size = f"check-{secrets.token_hex(8)}", 0, 1
    if secret is not None:
        expires = time.time() + TOKEN_SECONDS
        token = auth.make_token(secret, job=job, size=size, expires=expires)
    if alone:  # FMI_TOKEN and FMI_KEY are those of another job
        made = auth.Token.parse(token) if token else None
        tls = server.startswith(SCHEME)
        place = parse_endpoint(server)
        return JoinRequest(place, job, rank, size, 0, wait, None, made, tls=tls)
    return JoinRequest.make(server, job, rank, size, None, token, 0, wait)


def _credentials(request: JoinRequest, from_secret: bool, member: bool) -> Credentials:
    if from_secret:
        return "secret"
    if request.token is None:
        return "unused" if os.environ.get("FMI_TOKEN") and not member else "none"
    return "expired" if request.token.expires <= time.time() else "token"
