"""Who is missing when the deadline of a collective has passed. No I/O.

::

    timeout    a rank whose deadline passed calls the roll
    here       who takes part answers, with the ranks it waits for itself
    missing    after a moment the one who called names to all who did not answer

Whom the others wait for would not do: a rank that has stopped may hide behind another one.
All three are `JobAborted` events, by their kind. Several ranks may call at once; the server lets
the first do so, and passes on what the later ones say as answers to it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from fmi_client.protocol.abort import JobAborted

TIMEOUT, HERE, MISSING = "timeout", "here", "missing"


class Roll:
    """What one rank knows of a roll that was called, by itself or another."""

    def __init__(self, call: JobAborted) -> None:
        self.call = call
        self._here: set[int] = set()
        self._waited_for: set[int] = set()
        self.add(call)

    def add(self, answer: JobAborted) -> None:
        """A rank is there."""
        self._here.add(answer.by)
        self._waited_for.update(answer.ranks)

    def verdict(self, group: Collection[int] = ()) -> JobAborted:
        """Name who did not answer; without a `group`, of those that somebody waits for.

        Where nobody is missing, each waits for another: those they wait for.
        """
        missing = sorted(set(group or self._waited_for) - self._here) or sorted(self._waited_for)
        reason = self.call.reason
        done = [rank for rank in missing if rank not in self._waited_for]
        if done:
            reason += (
                f"; nobody waits for rank {some_ranks(done)} of these: stopped, too, or done with "
                "its part and computing since"
            )
        return replace(self.call, kind=MISSING, reason=reason, ranks=tuple(missing))


def some_ranks(ranks: Sequence[int]) -> str:
    """Return the ranks as text, the first ten of them."""
    shown = ", ".join(map(str, ranks[:10]))
    return f"{shown}, …" if len(ranks) > 10 else shown
