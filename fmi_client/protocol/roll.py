"""Who is missing when the deadline of a collective has passed. No I/O.

::

    timeout    a rank whose deadline passed calls the roll
    here       who takes part answers, with the ranks it waits for itself
    missing    after a moment the one who called names to all who did not answer

Whom the others wait for would not do: a rank that has stopped may hide behind another one.
All three are notices, by their kind. Several ranks may call at once; the server lets
the first do so, and passes on what the later ones say as answers to it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fmi_client.protocol.notice import Kind, Notice, some_ranks


class Roll:
    """What one rank knows of a roll that was called, by itself or another."""

    def __init__(self, call: Notice) -> None:
        self.call = call
        self._here: set[int] = set()
        self._waited_for: set[int] = set()
        self.add(call)

    def add(self, answer: Notice) -> None:
        """A rank is there."""
        self._here.add(answer.by)
        self._waited_for.update(answer.ranks)

    def verdict(self, group: Collection[int] = ()) -> Notice:
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
        return replace(self.call, kind=Kind.MISSING, reason=reason, ranks=tuple(missing))
