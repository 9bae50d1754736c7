"""The hints "fast" and "cheap": what is predicted decides, and every rank decides alike."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fmi_client
from fmi_client import sync
from fmi_client.cost_model import OPERATIONS, Model
from fmi_client.hints import MODELS, PRICES, Choice, choose
from tests.processes import run_processes
from tests.support import KEY, serving

costs = st.floats(1e-9, 1e3)
models = st.builds(Model, st.floats(1e-6, 1), st.floats(1e5, 1e11), st.floats(1e8, 1e11))
work = st.lists(
    st.tuples(st.sampled_from(list(OPERATIONS)), st.integers(0, 10**8), st.integers(0, 1000)),
    max_size=5,
)


@given(
    st.integers(1, 5000),
    work,
    st.floats(0, 1e5),
    st.fixed_dictionaries({"auto": models, "object": models}),
    st.builds(fmi_client.Prices, costs, costs, costs, costs, costs, costs),
)
def test_fast_is_never_slower_and_cheap_never_dearer(
    size: int, work: Any, seconds: float, models: Any, prices: fmi_client.Prices
) -> None:
    options: dict[str, Any] = {"work": work, "seconds": seconds, "models": models, "prices": prices}
    fast, cheap = (choose(hint, size=size, **options) for hint in ("fast", "cheap"))
    assert fast.predictions == cheap.predictions
    every = fast.predictions.values()
    assert fast.predictions[fast.channel].seconds == min(each.seconds for each in every)
    assert cheap.predictions[cheap.channel].dollars == min(each.dollars for each in every)


def test_prices_by_hand() -> None:
    model = Model(latency=1e-3, bandwidth=1e8, reduction=1e9)
    prices = fmi_client.Prices(2.0, put=0.5, get=0.1, vcpu_hour=4, gb_hour=6, ipv4_hour=7)
    choice = choose(
        "cheap",
        size=4,
        work=[("barrier", 0, 10)],
        seconds=3600 - 0.02,
        models={"auto": model, "object": model},
        prices=prices,
        memory_mb=512,
    )
    # Two rounds of eight messages, ten times; the server's hour is 1 + 3 + 7 dollars.
    ranks = 4 * 0.02 * 0.5 * 2.0
    assert choice.predictions["auto"] == pytest.approx((0.02, ranks + 11))
    assert choice.predictions["object"] == pytest.approx((0.02, ranks + 80 * 0.8))
    assert choice.channel == "auto"


def test_the_cheapest_changes_where_the_server_has_paid_for_itself() -> None:
    """Among 2 ranks a barrier is 2 messages: so many cost as much as the server's hour."""
    rounds = PRICES.server_hour / (2 * PRICES.message)
    waiting = 2 * 0.05 * rounds * 1769 / 1024 * PRICES.gb_second  # the ranks, meanwhile
    rounds *= PRICES.server_hour / (PRICES.server_hour + waiting)

    def cheapest(count: float) -> str:
        work = [("barrier", 0, round(count))]
        return choose("cheap", size=2, work=work, seconds=3600).channel

    assert (cheapest(0.95 * rounds), cheapest(1.05 * rounds)) == ("object", "auto")
    assert choose("fast", size=2, seconds=3600).channel == "auto"
    runs_anyway = fmi_client.Prices(vcpu_hour=0, gb_hour=0, ipv4_hour=0)
    assert choose("cheap", size=2, seconds=3600, prices=runs_anyway).channel == "auto"


def test_a_measured_model_may_decide_otherwise() -> None:
    slow = Model(latency=2.0, bandwidth=1e6, reduction=5e9)
    assert choose("fast", size=4, models={**MODELS, "auto": slow}).channel == "object"
    assert choose("fast", size=4, channels=["object"]).channel == "object"
    assert list(choose("fast", size=4, channels=["object"]).predictions) == ["object"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"hint": "good"}, "hint='good' is none of fast, cheap"),
        ({"size": 0}, "size=0"),
        ({"seconds": -1.0}, "seconds=-1.0"),
        ({"seconds": float("inf")}, "seconds=inf"),
        ({"channels": []}, "one or more of auto, object"),
        ({"channels": ["relay"]}, "one or more of auto, object"),
        ({"work": [("sort", 1, 1)]}, "'sort' is none of barrier"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], says: str) -> None:
    options: dict[str, Any] = {"hint": "fast", "size": 2} | arguments
    with pytest.raises(ValueError, match=says):
        choose(options.pop("hint"), **options)


# ------------------------------------------------------------------------------ connect
CHEAP = choose("cheap", size=2, seconds=0)
CASES = [
    ("fast", True, False, "direct"),
    ("cheap", True, False, "direct"),
    ("fast", False, True, "object"),
    ("cheap", False, True, "object"),
    ("fast", True, True, "direct"),
    ("cheap", True, True, "object"),  # 2 ranks, a minute: no server pays for itself
    (CHEAP, True, True, "direct"),  # nor a store, where there is nothing to wait for
]
"""Channel, whether there is a server, a store, and what the link becomes."""


@pytest.mark.parametrize(("channel", "server", "store", "kind"), CASES)
async def test_ranks_take_what_the_hint_says(
    channel: str | Choice, server: bool, store: bool, kind: str, tmp_path: Path
) -> None:
    async with serving() as (_, address):

        async def rank(r: int) -> Any:
            place: dict[str, Any] = {"store": str(tmp_path)} if store else {}
            async with fmi_client.connect(
                *(address if server else None,),
                **{"job": "job", "rank": r, "size": 2, "key": KEY, "timeout": 5},
                channel=channel,
                **place,
            ) as comm:
                assert await comm.allreduce(1) == 2
                return comm.stats()["links"][1 - r]["kind"]

        assert await asyncio.gather(rank(0), rank(1)) == [kind, kind]


@pytest.mark.parametrize(("channel", "server", "store", "kind"), CASES)
def test_blocking_ranks_do_the_same(
    address: str, channel: str | Choice, server: bool, store: bool, kind: str, tmp_path: Path
) -> None:
    def rank(comm: sync.Communicator) -> Any:
        comm.barrier()
        return comm.stats()["links"][1 - comm.rank]["kind"]

    place = {"store": str(tmp_path)} if store else {}
    results = run_processes(address if server else None, 2, rank, channel=channel, **place)
    assert results == [kind, kind]


# --------------------------------------------------------------------------------- docs
def test_the_documents_example_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "channels.md").read_text()
    section = page.partition("\n## Hints\n")[2].partition("\n## ")[0]
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", section, re.DOTALL)[:2]
    exec(code.partition("\nwith ")[0], {})
    assert capsys.readouterr().out == printed
    for price in vars(fmi_client.Prices)["__dataclass_fields__"].values():
        per = 1000 if price.name in ("put", "get") else 1
        assert f"| {per * price.default:.10f}".rstrip("0") in section, price.name
