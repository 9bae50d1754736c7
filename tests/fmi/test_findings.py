"""What a check concludes from what it saw, and how it says so."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest

import fmi_client
from fmi_client import errors, findings
from fmi_client.check import Plan
from fmi_client.findings import ADVICE, LinkFound, Nat, Report, Step, classify, outlook
from fmi_client.protocol.addresses import Address
from tests.fmi.checking import SECRET

LOCAL = ("10.0.0.2", 40000)


# ------------------------------------------------------------------------ judgement
@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        ([], None),
        ([LOCAL], "none"),
        ([LOCAL, ("10.0.0.2", 1)], "none"),  # the admin port is behind something, ours is not
        ([("198.51.100.2", 40000)], "preserving"),
        ([("198.51.100.2", 40000), ("198.51.100.2", 40000)], "preserving"),
        ([("198.51.100.2", 1)], "changed"),
        ([("198.51.100.2", 1), ("198.51.100.2", 1)], "endpoint_independent"),
        ([("198.51.100.2", 1), ("198.51.100.2", 2)], "symmetric"),
        ([("198.51.100.2", 40000), ("198.51.100.2", 2)], "symmetric"),
        ([("198.51.100.2", 1), ("198.51.100.3", 1)], "symmetric"),
    ],
)
def test_which_nat(seen: list[Address], kind: Nat | None) -> None:
    assert classify(LOCAL, seen) == kind


@pytest.mark.parametrize(
    ("first", "cause"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "http"),
        (b"<html>", "http"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "ssh"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "tls"),
        (b"220 mail.example.org ESMTP", "stranger"),
        (b"\x15", "stranger"),
    ],
)
def test_who_answers(first: bytes, cause: str) -> None:
    assert findings.who_answers(first) == cause


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (TimeoutError(), "black_hole"),
        (OSError(errno.ETIMEDOUT, ""), "black_hole"),
        (ConnectionRefusedError(errno.ECONNREFUSED, ""), "refused"),
        (ConnectionResetError(errno.ECONNRESET, ""), "closed"),
        (OSError(errno.ENETUNREACH, ""), "unreachable"),
        (OSError(errno.EHOSTUNREACH, ""), "unreachable"),
    ],
)
def test_why_no_connection(error: OSError, cause: str) -> None:
    assert findings.connect_cause(error) == cause


@pytest.mark.parametrize(
    ("error", "credentials", "cause"),
    [
        (errors.AuthenticationFailed(), "none", "token_missing"),
        (errors.AuthenticationFailed(), "unused", "token_unused"),
        (errors.AuthenticationFailed(), "token", "token_wrong"),
        (errors.AuthenticationFailed(), "expired", "token_expired"),
        (errors.AuthenticationFailed(), "secret", "secret_wrong"),
        (errors.ServerDraining(), "none", "draining"),
        (errors.JobFull(), "token", "job_full"),
        (errors.RankTaken(), "token", "rank_taken"),
        (errors.JoinTimeout(missing=[1]), "none", "missing"),
        (errors.RendezvousError(), "none", "turned_away"),
        (errors.ProtocolError(), "none", "lost"),
    ],
)
def test_why_not_admitted(
    error: errors.FmiError, credentials: findings.Credentials, cause: str
) -> None:
    assert findings.join_cause(error, credentials) == cause


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (errors.AuthenticationFailed(), "key"),
        (errors.PunchFailed(), "no_link"),
        (errors.CollectiveTimeout(missing=[1]), "stalled"),
        (errors.RankFailed(rank=1), "peer_lost"),
        (errors.Aborted(by=1), "peer_lost"),
        (errors.CollectiveMismatch(), "mismatch"),
        (errors.RendezvousError(), "lost"),
    ],
)
def test_why_no_link(error: errors.FmiError, cause: str) -> None:
    assert findings.link_cause(error) == cause


FACTS: dict[str, object] = {
    "host": "fmi.example.org",
    "ip": "192.0.2.1",
    "port": 10000,
    "job": "try",
    "rank": 0,
    "size": 2,
    "wait": "60",
    "missing": "1",
    "peer": 1,
}


@pytest.mark.parametrize("cause", ADVICE)
def test_an_advice_is_one_sentence_without_gaps(cause: str) -> None:
    text = Report("", dict(FACTS), [Step("", "failed", "", cause=cause)]).advice
    assert text[0].isupper()
    assert text.endswith(".")
    assert ". " not in text
    assert "?" not in text
    assert "{" not in text


def test_the_first_thing_wrong_gets_the_advice() -> None:
    steps = [
        Step("NAT", "warning", ""),
        Step("authenticate", "failed", "", cause="token_expired"),
        Step("peers", "failed", "", cause="missing"),
    ]
    assert Report("", {}, steps).advice == ADVICE["token_expired"]


def test_every_cause_is_explained() -> None:
    text = (Path(__file__).parents[2] / "docs" / "check.md").read_text()
    assert not [cause for cause in ADVICE if f"`{cause}`" not in text]


def link(kind: str) -> LinkFound:
    return LinkFound(1, kind, 0.001, 1e6, 1e6)


@pytest.mark.parametrize(
    ("nat", "local", "links", "says"),
    [
        ("none", LOCAL, [], "expect direct links, as no NAT"),
        ("none", ("127.0.0.1", 1), [], "on this machine"),
        ("none", ("::1", 1), [], "on this machine"),
        ("preserving", LOCAL, [], "expect direct links, except"),
        ("changed", LOCAL, [], "expect relayed links"),
        ("endpoint_independent", LOCAL, [], "expect relayed links"),
        ("symmetric", LOCAL, [], "expect relayed links"),
        ("symmetric", LOCAL, [link("direct")], "every link of this rank is direct"),
        ("symmetric", LOCAL, [link("direct"), link("relay")], "rank 1 go through the server"),
        ("preserving", LOCAL, [link("relay")], "the NAT of the other end"),
    ],
)
def test_what_to_expect(nat: Nat, local: Address, links: list[LinkFound], says: str) -> None:
    text = outlook(nat, local, links)
    assert says in text
    assert text.endswith(".")
    assert ". " not in text


def test_numbers_and_strangers_words_for_people() -> None:
    assert [findings.time_text(s) for s in (0.00031, 0.0124, 1.25)] == ["0.31 ms", "12 ms", "1.2 s"]
    rates = [findings.rate_text(r) for r in (34_000, 812e6, 1.25e9)]
    assert rates == ["34 kB/s", "812 MB/s", "1.25 GB/s"]
    assert findings.plain("\x1b[31mred\r\n") == "·[31mred··"
    assert len(findings.plain("x" * 1000)) == 200


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"server": "host:port"}, "host:port"),
        ({"job": "j"}, "job, rank and size go together"),
        ({"job": "j", "rank": 0}, "job, rank and size go together"),
        ({"job": "j", "rank": 2, "size": 2}, "rank=2"),
        ({"job": "", "rank": 0, "size": 2}, "job must be"),
        ({"job": "j", "rank": 0, "size": 9}, "at most 8 ranks"),
        ({"job": "j", "rank": 0, "size": 0}, "size=0"),
        ({"token": "fmi3.1.x"}, "token: it admits one job only"),
        ({"job": "j", "rank": 0, "size": 2, "token": "fmi3.1.x"}, "not of the form"),
        ({"job": "j", "rank": 0, "size": 2, "token": "t", "secret": SECRET}, "token and secret"),
        ({"secret": b" "}, "secret is empty"),
        ({"admin_port": 65536}, "admin_port=65536"),
        ({"timeout": 0}, "timeout=0"),
        ({"wait": float("nan")}, "wait=nan"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"wait": float("inf")}, "wait=inf"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Plan.make(**({"server": "127.0.0.1"} | arguments))


def test_a_very_long_time_is_one_that_clocks_can_add_to() -> None:
    plan = Plan.make("h", timeout=1e300, wait=1e300)
    assert plan.request.timeout == plan.timeout < 1e9


def test_a_plan_shows_no_secret() -> None:
    token = fmi_client.make_token(SECRET, job="j", size=2, expires=time.time() + 60)
    for given in ({"token": token}, {"secret": SECRET}):
        text = repr(Plan.make("h", job="j", rank=0, size=2, **given))
        assert token.split(".")[2] not in text
        assert SECRET.decode() not in text
