"""Joining a job through a store, where nobody can be asked and old objects may lie about.

Rank 0 names a new folder for this run, and tells it to whoever has left a ticket; a rank's
nonce is new too, so the answer to it cannot be an old one. Each rank then shows itself in
that folder, which proves that its ticket was none that a crashed run left behind; when all
have, rank 0 says so. `fmi_client.protocol.objects` lists the objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fmi_client.errors import FmiError
from fmi_client.protocol import auth
from fmi_client.protocol.objects import Ticket, read_run
from fmi_client.transport.objects import Depot, Pauses, Then


class Meeting:
    """One rank's way in: a guest's, or (below) rank 0's.

    Args:
        on_ready: given the name of the run's folder when all ranks are there.
        on_error: given the reason when the store cannot be used.
    """

    def __init__(
        self,
        depot: Depot,
        rank: int,
        size: int,
        on_ready: Callable[[str], None],
        on_error: Callable[[FmiError], None],
    ) -> None:
        self.missing: list[int] | None = None
        """Ranks that had not come when we looked; None before."""
        self.stranger: int | None = None
        """One of these, if it has left a ticket that does not prove our key."""
        self.abandoned = False
        """Whether rank 0 has given up when we looked: it has removed what shows who had come."""
        self.began = False
        """Whether the store has taken our ticket."""
        self._depot = depot
        self._rank = rank
        self._size = size
        self._on_ready = on_ready
        self._on_error = on_error
        self._nonce = auth.nonce().hex()
        self._run: str | None = None
        """This run's folder, once we stand in it."""
        self._ticket = self._sign("")
        self._pauses = Pauses()
        self._over = False

    def start(self) -> None:
        self._depot.mark(self._ticket, self._then(lambda _: self._started()))

    def _started(self) -> None:
        self.began = True
        self._look()

    def _sign(self, folder: str) -> str:
        ticket = self._depot.scheme.ticket(folder, self._rank, self._nonce)
        return f"{folder}/{ticket}" if folder else ticket

    def _then(self, go_on: Callable[[Any], None]) -> Then:
        def then(result: Any, error: FmiError | None) -> None:
            if self._over:
                return
            try:
                if error is not None:
                    raise error
                go_on(result)
            except FmiError as reason:
                self._on_error(reason)

        return then

    def _again(self) -> None:
        self._depot.later(self._pauses.next(), lambda: None if self._over else self._look())

    # ------------------------------------------------------------------- a guest's way
    def _look(self) -> None:
        if self._run is None:
            self._depot.get(f"{self._nonce}.answer", self._then(self._answered))
        else:
            self._depot.get(f"{self._run}/go", self._then(self._gone_on))

    def _answered(self, answer: memoryview | None) -> None:
        if answer is None:
            self._again()
            return
        run = read_run(answer)
        self._pauses.reset()
        self._depot.mark(self._sign(f"{run}/here"), self._then(lambda _: self._enter(run)))

    def _enter(self, run: str) -> None:
        self._run = run
        self._look()

    def _gone_on(self, go: memoryview | None) -> None:
        if go is None:
            self._again()
        else:
            self._finish(self._run or "")

    def _finish(self, run: str) -> None:
        self.withdraw()
        self._on_ready(run)

    def withdraw(self) -> None:
        """Remove what only joining needed."""
        self._over = True
        self._depot.delete(self._ticket, f"{self._nonce}.answer")

    # -------------------------------------------------------------------- who is missing
    def ask_missing(self) -> None:
        """Look who has not come; `missing` holds the answer soon."""
        folder = "" if self._run is None else f"{self._run}/here"
        self._depot.names(folder, self._then(lambda names: self._count(folder, names)))

    def _count(self, folder: str, names: list[str]) -> None:
        tickets = self._depot.scheme.tickets(folder, names)
        there = {ticket.rank for ticket in tickets if ticket.proven}
        self.abandoned = folder != "" and self._rank not in there
        there |= {self._rank, 0} if folder else {self._rank}
        self.missing = [rank for rank in range(self._size) if rank not in there] or [0]
        self._note_stranger(tickets)

    def _note_stranger(self, tickets: list[Ticket]) -> None:
        strangers = {ticket.rank for ticket in tickets if not ticket.proven}
        self.stranger = min(strangers & set(self.missing or ()), default=None)


class Host(Meeting):
    """Rank 0's: it answers the others."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._folder = auth.nonce().hex()
        self._known: dict[str, int] = {}
        """Nonces of tickets, and whose they are (or were, in a crashed run)."""
        self._here: dict[str, int] = {self._nonce: 0}
        self._tickets: list[Ticket] = []

    def _look(self) -> None:
        self._depot.names("", self._then(self._joined))

    def _joined(self, names: list[str]) -> None:
        tickets = self._depot.scheme.tickets("", names)
        for ticket in tickets:
            if ticket.proven and ticket.nonce not in self._known:
                self._known[ticket.nonce] = ticket.rank
                self._answer(ticket)
        self._tickets = tickets
        if len(set(self._known.values())) == self._size:
            self._depot.names(f"{self._folder}/here", self._then(self._arrived))
        else:
            self._again()

    def _answer(self, ticket: Ticket) -> None:
        if ticket.rank:
            self._pauses.reset()
            answer = f"{ticket.nonce}.answer"
            self._depot.put(answer, [self._folder.encode()], self._then(lambda _: None))

    def _arrived(self, names: list[str]) -> None:
        self._count_here(names)
        if self.missing:
            self._again()
        else:
            self._depot.put(f"{self._folder}/go", [], self._then(self._all_here))

    def _count_here(self, names: list[str]) -> None:
        for ticket in self._depot.scheme.tickets(f"{self._folder}/here", names):
            if ticket.proven and ticket.nonce in self._known:
                self._here[ticket.nonce] = ticket.rank
        there = set(self._here.values())
        self.missing = [rank for rank in range(self._size) if rank not in there]
        self._note_stranger(self._tickets)

    def _all_here(self, _: object) -> None:
        self._run = self._folder
        self._finish(self._folder)

    def withdraw(self) -> None:
        """Remove also what we answered to ranks of crashed runs, and their tickets."""
        super().withdraw()
        for nonce, rank in self._known.items():
            if nonce not in self._here:
                ticket = self._depot.scheme.ticket("", rank, nonce)
                self._depot.delete(ticket, f"{nonce}.answer")
        if self._run is None:
            self._depot.clear(self._folder)

    def ask_missing(self) -> None:
        self._depot.names(f"{self._folder}/here", self._then(self._count_here))
