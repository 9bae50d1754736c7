"""Row 17: every parser, whatever it is given, raises what is documented and nothing else.

The targets and the corpus are in tests/reliability/fuzz; its runs of minutes are started there.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reliability.conftest import Measured
from tests.reliability.fuzz.all_targets import TARGETS
from tests.reliability.fuzz.mutate import Edit, edited
from tests.reliability.fuzz.seeds import corpus
from tests.reliability.fuzz.target import CORPUS, MB, Target, check, entries, peak

pytestmark = pytest.mark.row(17)

EDITS = st.lists(
    st.builds(Edit, st.integers(0, 4000), st.integers(0, 8), st.binary(max_size=8)),
    max_size=5,
)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def test_the_corpus_is_what_makes_it() -> None:
    """A seed of an older format would be refused at its first byte, and lead nowhere."""
    made = {
        f"{name}/{entry}": data for name, found in corpus().items() for entry, data in found.items()
    }
    there = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in CORPUS.glob("*/*")}
    of_torch = {name for name in made if name.startswith(("ptfile", "checkpoint"))}  # any version's
    stale = {name for name in made.keys() - of_torch if there.get(name) != made[name]}
    assert not stale | (of_torch - there.keys()), "python -m tests.reliability.fuzz.seeds"
    assert {name.split("/")[0] for name in there} == set(TARGETS)
    assert sum(map(len, there.values())) < 300_000


def test_inputs_of_the_corpus(target: Target, measured: Measured) -> None:
    """Whole and byte by byte, and within the memory that it may cost."""
    paths = list(entries(target))
    outcomes = {repr(check(target, path.read_bytes())) for path in paths}
    single = target.name in ("results-sweep", "results-log")  # other files are what they are of
    assert len(outcomes) > 1 or single, "the target looks at nothing"
    most = max(peak(target, path.read_bytes()) for path in paths)
    measured(
        f"most memory for an input of {target.name}", most / MB, "MiB", f"<= {target.memory / MB:g}"
    )
    assert most <= target.memory


def test_inputs_like_those_of_the_corpus(target: Target) -> None:
    _search(target, 60)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_many_inputs_like_those_of_the_corpus(target: Target) -> None:
    _search(target, 10_000)


def _search(target: Target, examples: int) -> None:
    seeds = [path.read_bytes() for path in entries(target)]
    few: Any = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    @few
    @given(st.sampled_from(seeds), EDITS)
    def search(seed: bytes, edits: list[Edit]) -> None:
        check(target, edited(seed, edits))

    search()
