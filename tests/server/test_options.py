"""The command line and its variables: what arrives, and what is said of what cannot be used."""

from __future__ import annotations

import logging
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from rendezvous_server import __main__, config
from rendezvous_server.config import Config
from rendezvous_server.options import OPTIONS, read_config
from tests.server.test_server import SECRET


def test_without_options_it_serves_this_machine_only() -> None:
    assert read_config([], {}) == Config("127.0.0.1", 10000, 10001, None, False, 6 * 3600.0, False)


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (
            "--host ::1 --port 1 --admin-port 2 --relay-bytes 5 --relay-pairs 6 --job-ttl 7.5 "
            "--no-relay --proxy-protocol --allow-anonymous --log-level warning "
            "--legacy 10.0.0.0/8 --legacy 192.0.2.7",
            "",
        ),
        (
            "",
            "HOST=::1 PORT=1 ADMIN_PORT=2 RELAY_BYTES=5 RELAY_PAIRS=6 JOB_TTL=7.5 "
            "NO_RELAY=1 PROXY_PROTOCOL=true ALLOW_ANONYMOUS=Yes LOG_LEVEL=WARNING "
            "LEGACY=10.0.0.0/8+192.0.2.7",
        ),
    ],
    ids=["options", "variables"],
)
def test_settings_arrive(arguments: str, variables: str) -> None:
    pairs = [each.replace("+", " ").partition("=") for each in variables.split()]
    env = {f"RENDEZVOUS_{name}": value for name, _, value in pairs}
    expected = Config(
        *("::1", 1, 2, None, True, 7.5),
        relay=False,
        relay_bytes=5,
        relay_pairs=6,
        proxy_protocol=True,
        legacy=(IPv4Network("10.0.0.0/8"), IPv4Network("192.0.2.7")),
        log_level=logging.WARNING,
    )
    assert read_config(arguments.split(), env) == expected


def test_an_option_goes_before_its_variable_and_an_empty_one_counts_as_none() -> None:
    env = {"RENDEZVOUS_PORT": "1", "RENDEZVOUS_LEGACY": "10.0.0.0/8", "RENDEZVOUS_JOB_TTL": ""}
    settings = read_config(["--port", "2", "--legacy", "192.0.2.7"], env)
    assert (settings.port, settings.job_ttl) == (2, 6 * 3600.0)
    assert settings.legacy == (IPv4Network("192.0.2.7"),)
    assert read_config([], {"RENDEZVOUS_NO_RELAY": "0"}).relay


def test_a_variable_that_cannot_be_is_in_nobodys_way_where_an_option_is_given() -> None:
    """Kubernetes sets this one in every pod beside a service of the name rendezvous."""
    variables = {"RENDEZVOUS_PORT": "tcp://10.0.0.1:10000"}
    assert read_config(["--port", "7"], variables).port == 7
    with pytest.raises(SystemExit) as ended:
        read_config(["--help"], variables)
    assert ended.value.code == 0


def test_secrets_come_from_files_or_variables(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    given = read_config(["--secret-file", str(tmp_path / "secret")], {})
    assert (given.host, given.secret) == ("::", SECRET)
    other = "another 16 bytes and more"
    env = {"RENDEZVOUS_SECRET": SECRET.decode(), "RENDEZVOUS_ADMIN_TOKEN": other}
    given = read_config([], env)
    assert (given.secret, given.admin_token) == (SECRET, other.encode())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--prot 1", "unrecognized arguments: --prot 1"),
        ("--por 1", "unrecognized arguments"),
        ("--host 0.0.0.0", "loopback only"),
        ("--host ::", "loopback only"),
        ("--secret-file /nonexistent", "cannot read the secret file /nonexistent: No such file"),
        ("--port 70000", "--port: give a whole number from 0 to 65535, not '70000'"),
        ("--port x", "not 'x'"),
        ("--admin-port -2", "from -1 to 65535"),
        ("--relay-pairs 0", "a whole number of at least 1, not '0'"),
        ("--job-ttl inf", "--job-ttl: give seconds from 1 to 100000000, not 'inf'"),
        ("--job-ttl nan", "not 'nan'"),
        ("--log-level loud", "unknown log level 'loud': use debug, info, warning, error"),
        ("--legacy ::1/128", "--legacy takes IPv4 networks, such as 10.20.0.0/16"),
        ("--legacy 10.1.0.0/8", "10.1.0.0/8 has host bits set"),
        ("--tls-cert cert.pem", "--tls-cert and --tls-key go together"),
        ("--registry http://redis", "--registry must be of the form redis://host:port/db"),
        ("--registry redis://redis", "--secret-file"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main(arguments.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PORT", "abc", "RENDEZVOUS_PORT: give a whole number from 0 to 65535, not 'abc'"),
        ("NO_RELAY", "maybe", "RENDEZVOUS_NO_RELAY: give 1 or 0, not 'maybe'"),
        ("SECRET", "", "the secret in RENDEZVOUS_SECRET has 0 bytes"),
    ],
)
def test_a_variable_that_cannot_be_is_called_by_its_name(
    capsys: pytest.CaptureFixture[str], name: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit):
        read_config([], {f"RENDEZVOUS_{name}": value})
    assert said in capsys.readouterr().err


def test_the_help_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_config(["--help"], {})
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{each.name}" in said for each in OPTIONS)


def test_where_it_listens_depends_on_who_may_join(tmp_path: Path) -> None:
    assert config.choose_host(None, None, False) == "127.0.0.1"
    assert config.choose_host(None, SECRET, False) == "::"
    assert config.choose_host(None, None, True) == "::"
    for host in ("localhost", "::1"):
        assert config.choose_host(host, None, False) == host
    (tmp_path / "short").write_bytes(b"short\n")
    with pytest.raises(config.ConfigError, match="at least 16"):
        config.read_secret(tmp_path / "short")
