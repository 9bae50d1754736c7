"""The file of prices: what is in it, what the docs show of it, and files that are broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fmi_client import hints
from workflow import cost, prices
from workflow.prices import PricesError, load_prices

ROOT = Path(__file__).parent.parent.parent
OURS = prices.DEFAULT.read_text()
PRICES = load_prices()


def test_every_price_says_where_it_is_from() -> None:
    assert PRICES.region == "us-east-1"
    for name, price in PRICES:
        assert price.usd > 0, name
        assert price.quality == "memory" or len(price.source) > 20, name


def figure(name: str) -> str:
    """As docs write it: without a trailing zero that the file has not, never by powers of ten."""
    found = re.search(rf"^\[{name}\]\nusd = ([\d.]+)$", OURS, re.M)
    assert found
    return found[1]


def test_docs_show_the_same_figures_and_sources() -> None:
    """docs/cost.md has a line for each price."""
    text = (ROOT / "docs/cost.md").read_text()
    for name, price in PRICES:
        amount = f"{price.per:,} {price.unit}s" if price.per > 1 else price.unit
        line = f"| `{name}` | {figure(name)} | {amount} | {price.date} | {price.quality} | "
        assert line + price.source + " |\n" in text, line


def test_the_clients_hints_reckon_with_the_same_figures() -> None:
    """It cannot read the file, which is not there where only the client is installed."""
    same = hints.Prices(
        gb_second=PRICES.lambda_x86.each,
        put=PRICES.s3_writes.each,
        get=PRICES.s3_reads.each,
        vcpu_hour=PRICES.fargate_x86_vcpu.each,
        gb_hour=PRICES.fargate_x86_gb.each,
        ipv4_hour=PRICES.public_ipv4.each,
    )
    assert same == hints.PRICES


def test_the_sums_on_the_page_on_deploying() -> None:
    text = (ROOT / "docs/deploy.md").read_text()
    for exposure, shown in (("LoadBalancer", "0.0509** (37"), ("PublicAddress", "0.0184** (13")):
        hour = cost.of_hour(PRICES, exposure=exposure).total_usd  # type: ignore[arg-type]
        assert f"{hour:.4f}** ({hour * 730:.0f}" == shown
        assert f"**{shown} a month)" in text
    for ranks, seconds in ((32, 60), (4, 20)):
        usage = cost.Usage(rank_s=[seconds] * ranks, memory_mb=2048)
        run = cost.of_usage(cost.as_job(usage, 0), PRICES).items
        names = ("Lambda, ranks", "Lambda, requests", "Step Functions", "CloudWatch, metrics")
        usd = sum(run[name] for name in names)
        assert re.search(rf"{ranks} ranks\s+of {seconds} s: \*\*{usd:.3f}\*\*", text), usd


def write(folder: Path, text: str) -> str:
    (folder / "p.toml").write_text(text)
    return str(folder / "p.toml")


def test_another_region(tmp_path: Path) -> None:
    path = write(tmp_path, OURS.replace("us-east-1", "eu-west-1"))
    assert load_prices(path, "eu-west-1").region == "eu-west-1"
    with pytest.raises(PricesError, match=r"no prices of eu-west-1.*those of us-east-1"):
        load_prices(region="eu-west-1")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("usd = 0.0000166667", "usd = -1", "lambda_x86.usd: .*greater than or equal to 0"),
        ("usd = 0.0000166667", "usd = nan", "lambda_x86.usd: .*finite"),
        ("usd = 0.0000166667", "usd = inf", "lambda_x86.usd"),
        ("usd = 0.0000166667", 'usd = "much"', "lambda_x86.usd"),
        ("usd = 0.0000166667", "price = 1", r"lambda_x86.usd: Field required \(and 1 more\)"),
        ("per = 1_000_000", "per = 0", "lambda_requests.per"),
        ("[lambda_x86]", "[lambda_x68]", "lambda_x86: Field required"),
        ('unit = "hour"', 'unit = "month"', "load_balancer: unit is 'month', expected 'hour'"),
        ('region = "us-east-1"', 'region = "eu-west-1"', "several regions: eu-west-1, us-east-1"),
        ('date = "undated"', 'date = "lately"', "step_functions.date"),
        ("[lambda_x86]", "[[lambda_x86", "not TOML"),
        ("usd = 0.0000166667", "usd = 1e999", "lambda_x86.usd"),
    ],
)
def test_a_broken_file(tmp_path: Path, old: str, new: str, text: str) -> None:
    path = write(tmp_path, OURS.replace(old, new, 1))
    with pytest.raises(PricesError, match=text) as error:
        load_prices(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(path)


def test_no_such_file_and_what_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(PricesError, match=re.escape(str(path))):
            load_prices(str(path))
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PricesError, match="not TOML"):
        load_prices(str(tmp_path / "b.toml"))
    with pytest.raises(PricesError, match="larger than"):
        load_prices(write(tmp_path, "#" * 1_000_001))
