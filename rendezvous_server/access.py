"""Who may look at the page of a server. No I/O; times are Unix seconds, given by the caller.

Where only this machine can reach it, everybody may: but a page of a stranger in a browser on this
machine must not, which shows in the name that it asks for (DNS rebinding). Elsewhere a token is
needed, in a header, or once in a form: the cookie that comes of it is not the token, and proves
itself without the server having to remember it.
"""

from __future__ import annotations

from collections import deque
from urllib.parse import urlsplit

from fmi_client.protocol import auth
from rendezvous_server.config import is_loopback
from rendezvous_server.strangers import source

COOKIE = "rendezvous"
SESSION_SECONDS = 12 * 3600
TRIES = 10
"""Wrong tokens from one source within..."""
TRIES_SECONDS = 60.0
ALL_TRIES = 1000
"""... and from all the world together, or else who has many addresses could guess without end."""


class TooManyTries(Exception):
    """Tokens are not even looked at now; `wait` seconds until they are."""

    def __init__(self, wait: float) -> None:
        super().__init__(f"too many wrong tokens; try again in {wait:.0f} s")
        self.wait = wait


class Access:
    """Decides about requests.

    Args:
        token: what admits, or None.
        loopback: whether only this machine can reach us.
    """

    def __init__(self, token: bytes | None, loopback: bool) -> None:
        self._token = token
        self._loopback = loopback
        self._failures: deque[tuple[float, bytes]] = deque()
        """When and whence wrong tokens came lately, the oldest first."""

    @property
    def closed(self) -> bool:
        """Whether nobody may look, for want of a token."""
        return self._token is None and not self._loopback

    @property
    def needs_token(self) -> bool:
        return self._token is not None

    def knows_host(self, host: str | None) -> bool:
        """Whether the Host header is one that leads here; with a token, any is."""
        if self.needs_token:
            return True
        try:
            return is_loopback(urlsplit(f"//{host}").hostname or "")
        except ValueError:
            return False

    def takes(self, token: bytes, host: str, now: float) -> bool:
        """Whether this is the token; `host` is the address that it came from.

        Raises:
            TooManyTries: there were too many that were not; right ones wait as well, or else
                guessing would be as fast as ever. By source, so that a stranger's wrong tokens
                do not keep the operator out.
        """
        if self._token is None:
            return False
        whence = source(host)
        self._slow_down(whence, now)
        if auth.same(token, self._token):
            return True
        self._failures.append((now, whence))
        return False

    def _slow_down(self, whose: bytes, now: float) -> None:
        while self._failures and now - self._failures[0][0] >= TRIES_SECONDS:
            self._failures.popleft()
        times = [at for at, _ in self._failures]
        own = [at for at, whence in self._failures if whence == whose]
        for found, limit in ((own, TRIES), (times, ALL_TRIES)):
            if len(found) >= limit:
                raise TooManyTries(TRIES_SECONDS - (now - found[0]))

    def cookie(self, now: float) -> str:
        """Return what admits a browser for some hours."""
        return self._sign(str(int(now + SESSION_SECONDS)))

    def takes_cookie(self, cookie: str, now: float) -> bool:
        expires = cookie.partition(".")[0]
        if self._token is None or not (expires.isascii() and expires.isdigit()):
            return False
        if len(expires) > 12 or int(expires) <= now:
            return False
        return auth.same(cookie.encode(errors="replace"), self._sign(expires).encode())

    def _sign(self, expires: str) -> str:
        code = auth.mac(self._token or b"", "rendezvous page", expires.encode())
        return f"{expires}.{code.hex()}"
