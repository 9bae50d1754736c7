"""A DDP program, as it is, behind two NATs: it learns what gloo learns; its ranks end together."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from tests.net.lab import Lab, Site, build
from tests.net.training import Rank, by_fmi, by_gloo, training

pytestmark = [pytest.mark.full, pytest.mark.timeout(240)]

START = 100.0
"""Seconds to import torch in four processes on two cores, and to train."""

SOON = 5.0
"""Seconds within which all ranks say that one has ended; seen: 0.02 to 0.07."""

END = 30.0
"""Seconds that interpreters with torch in them take to end: seen 3 to 8, on two busy cores."""

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two hosts behind each of two NATs, which drop what nobody asked for."""
    with build(Site("preserving", hosts=2), Site("preserving", hosts=2)) as lab:
        yield lab


# ------------------------------------------------------------------------- what is learned
def learned(ranks: list[Rank], *more: int) -> str:
    """Return the hash of the weights, which all ranks must have; exit codes are 0 or `more`."""
    for rank in ranks:
        assert rank.ends(START) in (0, *more), rank.err
    hashes = {rank.weights() for rank in ranks}
    assert len(hashes) == 1, hashes
    return hashes.pop()


def trained_in(lab: Lab, folder: Path, size: int) -> tuple[str, Weights]:
    """Train by fmi, half of the ranks behind each NAT; all links are direct ones."""
    hosts = lab.hosts if size == 4 else lab.hosts[::2]
    words = [*by_fmi(lab.server), "--save", str(folder / "fmi.pt")]
    with training(folder / "fmi", size, words, {}, hosts) as ranks:
        weights = learned(ranks)
        for rank in ranks:
            # Of three partners recursive doubling needs two; that a third link was begun, and not
            # made before all was over, proves nothing.
            kinds = rank.kinds()
            assert set(kinds.values()) == {"direct"}
            assert len(kinds) >= size / 2
    return weights, torch.load(folder / "fmi.pt")


def trained_by_gloo(folder: Path, size: int) -> tuple[str, Weights]:
    """Train on loopback."""
    words = ["--save", str(folder / "gloo.pt")]
    with training(folder / "gloo", size, words, by_gloo()) as ranks:
        # In one of some twenty processes gloo's threads abort the interpreter at its very end.
        weights = learned(ranks, -signal.SIGABRT)
    return weights, torch.load(folder / "gloo.pt")


def test_two_ranks_behind_two_nats_learn_the_bits_that_gloo_learns(
    lab: Lab, tmp_path: Path
) -> None:
    """Two numbers have one sum, in either order."""
    assert trained_in(lab, tmp_path, 2)[0] == trained_by_gloo(tmp_path, 2)[0]


def test_four_ranks_behind_two_nats_learn_what_gloo_learns(lab: Lab, tmp_path: Path) -> None:
    """Sums of four differ in their last bits: we add in pairs, (a + b) + (c + d), and gloo along a
    ring that begins elsewhere in each quarter of a tensor, ((d + c) + b) + a.
    """
    _, ours = trained_in(lab, tmp_path, 4)
    _, theirs = trained_by_gloo(tmp_path, 4)
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        # The last bit of a weight of 1 is 1.2e-7; seen: 3e-8.
        torch.testing.assert_close(weights, theirs[name], rtol=0, atol=1e-6)


# -------------------------------------------------------------------------- how it all ends
def endless(
    lab: Lab, folder: Path, odd: int = -1, *words: str, **env: str
) -> AbstractContextManager[list[Rank]]:
    """Train for hours by fmi; one odd rank has further words and environment."""
    more = [*by_fmi(lab.server), "--epochs", "10000"]
    return training(folder / "ranks", 4, more, {}, lab.hosts, (odd, words, env))


def all_end_after(ranks: list[Rank], first: int) -> None:
    """Wait until all ranks have ended, each with an error that names rank `first`."""
    for rank in (rank for rank in ranks if rank.number != first):
        # torch makes a RuntimeError of what failed in backward(), with the text of ours.
        # The last: it left with an operation under way.
        named = rf"(rank {first} (was lost|has left)|aborted by rank {first}: )"
        why = rf"DistBackendError: \[.*\] {named}"
        assert re.search(why, rank.fails(SOON)), rank.err
    assert [rank.ends(END) for rank in ranks if rank.number != first] == [1, 1, 1]


@pytest.mark.parametrize("victim", [0, 3])
def test_when_a_rank_is_killed_the_others_say_which_and_end(
    lab: Lab, tmp_path: Path, victim: int
) -> None:
    with endless(lab, tmp_path) as ranks:
        ranks[0].says("epoch 1:")
        ranks[victim].kill()
        all_end_after(ranks, victim)


def test_when_a_rank_gets_ctrl_c_the_others_say_which_and_end(lab: Lab, tmp_path: Path) -> None:
    with endless(lab, tmp_path) as ranks:
        ranks[0].says("epoch 1:")
        ranks[2].process.send_signal(signal.SIGINT)
        all_end_after(ranks, 2)
        # Where it comes while torch calls Python, torch makes a RuntimeError of it.
        assert ranks[2].ends(END) in (-signal.SIGINT, 1)
        assert "KeyboardInterrupt" in ranks[2].err


def test_when_a_rank_ends_without_destroying_its_group_the_others_say_which_and_end(
    lab: Lab, tmp_path: Path
) -> None:
    with endless(lab, tmp_path, 1, "--epochs", "2", NO_DESTROY="1") as ranks:
        assert ranks[1].ends(START) == 0, ranks[1].err
        all_end_after(ranks, 1)
