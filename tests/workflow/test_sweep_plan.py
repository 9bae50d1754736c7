"""What a sweep's plan comes to: which runs in which order, how it may grow, what time it takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from small_plan import plan

from workflow.sweep import Record, seconds_left
from workflow.sweep_plan import Item, Plan, PlanError, extend, order

# -- the plan ----------------------------------------------------------------------------------


def test_without_options_there_are_the_twenty_configurations() -> None:
    twenty = order(Plan(data_sizes=("small",), repeat=1, seed=0))
    assert Counter((i.world_size, i.batch_size) for i in twenty) == Counter(
        (world, batch) for world in (1, 2, 3, 4) for batch in (8, 16, 32, 64, 128)
    )


def test_each_round_has_every_configuration_once_in_an_order_of_its_own() -> None:
    items = order(plan(world_sizes=(1, 2, 3, 4), repeat=3))
    rounds = [items[n : n + 8] for n in (0, 8, 16)]
    assert [{i.repeat for i in each} for each in rounds] == [{1}, {2}, {3}]
    orders = [tuple((i.world_size, i.batch_size) for i in each) for each in rounds]
    assert len(set(orders)) == 3
    assert len({frozenset(each) for each in orders}) == 1


def test_the_seed_makes_the_order() -> None:
    assert order(plan(repeat=2)) == order(plan(repeat=2))
    assert order(plan(repeat=2)) != order(plan(repeat=2, seed=8))


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("small", "w4-b32-small-r1"),
        ("/home/me/my galaxies.pt", "w4-b32-my-galaxies-r1"),
        ("s3://bucket/sdss/", "w4-b32-sdss-r1"),
        ("/../..", "w4-b32-data-r1"),
        (f"/x/{'y' * 300}.pt", f"w4-b32-{'y' * 40}-r1"),
    ],
)
def test_keys_are_names_of_files(data: str, key: str) -> None:
    assert Item(data, 4, 32, 1).key == key


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({}, 4),
        ({"repeat": 3}, 12),
        ({"world_sizes": (1, 2, 8)}, 6),
        ({"batch_sizes": (16, 8), "data_sizes": ("small", "large")}, 8),
        ({"seed": 7, "engine": "torch", "fmi": True, "stack": "mine"}, 4),
    ],
)
def test_a_plan_may_grow(more: dict[str, Any], count: int) -> None:
    before, after = plan(), extend(plan(), more)
    assert len(order(after)) == count
    assert {i.key for i in order(before)} <= {i.key for i in order(after)}


@pytest.mark.parametrize(
    ("more", "field", "says"),
    [
        ({"world_sizes": (4,)}, "world_sizes", "has 1,2 too; leave the option out, give 1,2,4"),
        ({"data_sizes": ("large",)}, "data_sizes", "has small too"),
        ({"repeat": 2}, "repeat", "has 3 already; give 3 or more"),
        ({"engine": "onnx"}, "engine", "begun with torch; leave the option out"),
        ({"seed": 8}, "seed", "begun with 7"),
        ({"fmi": False}, "fmi", "begun without it"),
        ({"model": "/m.safetensors"}, "model", "begun without it"),
        ({"data": "/mine"}, "data", "begun without it"),
        ({"on": "aws"}, "on", "begun with local"),
    ],
)
def test_a_plan_may_not_change(more: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        extend(plan(repeat=3), more)
    assert caught.value.field == field
    assert says in str(caught.value)


def test_a_sweep_of_ones_own_data_has_no_sizes() -> None:
    with pytest.raises(PlanError, match="this sweep is of /mine"):
        extend(plan(data="/mine", data_sizes=()), {"data_sizes": ("small",)})


# -- the time that is left ---------------------------------------------------------------------


def record(data: str, world: int, batch: int, seconds: float, status: str = "ok") -> Record:
    item = Item(data, world, batch, 1)
    about = {"order": 1, "on": "local", "engine": "torch", "precision": "fp32", "started": ""}
    return Record(key=item.key, **item._asdict(), **about, seconds=seconds, status=status)


@pytest.mark.parametrize(
    ("item", "seconds"),
    [
        (Item("small", 4, 8, 2), 6),  # the same configuration
        (Item("small", 4, 64, 1), 5),  # as many ranks
        (Item("small", 3, 8, 1), 4),  # the same data
        (Item("medium", 1, 8, 1), 4 * 25_000 / 1_253),  # as many times as it has rows
    ],
)
def test_the_time_left_is_that_of_what_is_most_alike(item: Item, seconds: float) -> None:
    done = [
        record("small", 4, 8, 6),
        record("small", 4, 16, 4),
        record("small", 1, 8, 2),
        record("small", 3, 8, 900, "failed"),
    ]
    assert seconds_left([item], done) == pytest.approx(seconds)
    assert seconds_left([item, item], done) == pytest.approx(2 * seconds)


def test_nothing_is_known_of_the_time_left_at_first() -> None:
    assert seconds_left([Item("small", 1, 8, 1)], [record("small", 1, 8, 3, "failed")]) is None
