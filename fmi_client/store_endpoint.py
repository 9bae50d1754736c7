"""A rank that meets the others in a store: a folder or bucket instead of a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fmi_client.endpoint import Allocate, left_error
from fmi_client.errors import (
    AuthenticationFailed,
    FmiError,
    JoinTimeout,
    ProtocolError,
    RendezvousError,
)
from fmi_client.join_request import JoinRequest
from fmi_client.joining import Joining
from fmi_client.meeting import Host, Meeting
from fmi_client.protocol import frames
from fmi_client.protocol.notice import Kind, Notice
from fmi_client.protocol.objects import Scheme, event_rank
from fmi_client.transport.objects import Depot, ObjectLink
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.store import Store

LOOK_SECONDS = 0.25
"""How often a rank that waits asks whether the job is over: one small read."""

ROLL_SECONDS = 0.9
"""How long the ranks have to find out who is missing: they look, answer, and look again."""


class StoreEndpoint(Joining):
    """A rank that joins through a store; knows of the others what they put there.

    Nobody watches over the ranks here: one that dies without a word is noticed by a deadline.
    """

    def __init__(
        self, reactor: Reactor, store: Store, request: JoinRequest, allocate: Allocate
    ) -> None:
        super().__init__(reactor, request, allocate)
        self._roll_seconds, self._alone_seconds = ROLL_SECONDS, 2 * ROLL_SECONDS
        self._run = ""
        """This run's folder, once all ranks are there."""
        scheme = Scheme(request.job, request.epoch, request.size, request.key)
        self._depot = Depot(reactor, store, scheme, lambda: self.on_change())
        kind = Host if request.rank == 0 else Meeting
        self._meeting = kind(self._depot, self.rank, self.size, self._on_ready, self._join_failed)
        self._heard: set[str] = set()
        self._looking = False
        self._hearing = 0
        """Objects being read because something is being said."""
        self._looked_at = 0.0
        self._said = self._saying = 0

    @property
    def ready(self) -> bool:
        return self._run != ""

    def connect(self) -> None:
        self._meeting.start()

    def ask_missing(self) -> None:
        self._meeting.ask_missing()

    def join_error(self) -> FmiError:
        timeout, meeting = self._request.timeout, self._meeting
        if not meeting.began:
            return RendezvousError(
                f"the store {self._request.store} did not answer within {timeout:.3g} s; "
                "does this rank reach it, and may it write there?",
                rank=self.rank,
                op="connect",
            )
        if meeting.stranger is not None:
            return AuthenticationFailed(
                f"rank {meeting.stranger} cannot be authenticated; all ranks of a job need the "
                "same key, or none (or its ticket is an old one, and it has not come)",
                rank=self.rank,
                peer=meeting.stranger,
                op="connect",
            )
        if meeting.abandoned:
            return JoinTimeout(
                f"job {self._request.job!r}: rank 0 gave up before the {timeout:.3g} s of this "
                "rank were over; its error names the ranks that did not join",
                rank=self.rank,
                op="connect",
            )
        return self._request.not_all_came(meeting.missing or [])

    def _on_ready(self, run: str) -> None:
        self._run = run
        self._joined()

    def _join_failed(self, error: FmiError) -> None:
        self.fail(error.at(rank=self.rank, op="connect"))

    # ---------------------------------------------------------------------- links
    def _make(self, peer: int) -> ObjectLink:
        out, into = f"{self._run}/{self.rank}-{peer}", f"{self._run}/{peer}-{self.rank}"
        link = ObjectLink(peer, self._depot, out, into, self._inbox(peer), self._watch)
        link.gone = self._gone.get(peer)
        return link

    def _waits(self) -> bool:
        others = (link for peer, link in self.links.items() if peer != self.rank)
        return any(link.busy for link in others)

    def ask(self, peer: int, context: int, seq: int, signature: bytes) -> None:
        """Nothing: an object for each wait would cost more than it tells before the deadline."""

    # ------------------------------------------------------------------ what others say
    def _watch(self) -> None:
        """Somebody waits: look now and then whether it is in vain."""
        if not self._looking:
            self._looking = True
            self._depot.later(LOOK_SECONDS, self._look)

    def look(self) -> bool:
        """Ask whether the job is over, if that was not just done; True: and something is."""
        recent = self._reactor.now() - self._looked_at < LOOK_SECONDS
        if self.ready and self.failure is None and not self._looking and not recent:
            self._looking = True
            self._ask()
        return self._hearing > 0 and self.failure is None

    def _look(self) -> None:
        if self._waits():
            self._ask()
        else:
            self._looking = False

    def _ask(self) -> None:
        self._looked_at = self._reactor.now()
        self._depot.get(f"{self._run}/over", self._looked)

    def _looked(self, over: object, error: FmiError | None) -> None:
        # A store that fails is for the links to report: they ask it more often.
        if over is not None:
            self._hearing += 1
            self._depot.names(f"{self._run}/events", self._listed)
        else:
            self._look_again()

    def _look_again(self) -> None:
        if self._waits():
            self._depot.later(LOOK_SECONDS, self._look)
        else:
            self._looking = False  # `look` asks when it is called

    def _listed(self, names: list[str] | None, error: FmiError | None) -> None:
        for name in sorted(names or ()):
            by = event_rank(name)
            if by is not None and name not in self._heard:
                self._heard.add(name)
                self._hearing += 1
                self._depot.get(f"{self._run}/events/{name}", partial(self._hear, by))
        self._hearing -= 1
        self._look_again()

    def _hear(self, by: int, data: memoryview | None, error: FmiError | None) -> None:
        self._hearing -= 1
        if data is None:
            return
        try:
            said = [Notice.decode(message, by) for message, _ in frames.FrameReader().feed(data)]
        except ProtocolError:
            return
        for notice in said:
            if notice.kind == Kind.LEFT:
                self._note_gone(by)
            else:
                self.told(notice)

    def _note_gone(self, peer: int) -> None:
        self._gone[peer] = left_error(peer)
        link = self.links.get(peer)
        if isinstance(link, ObjectLink):
            link.gone = self._gone[peer]

    # ------------------------------------------------------------------------- and we
    def tell(self, notice: Notice) -> None:
        self._said += 1
        self._say(str(self._said), notice, self._say_goodbye)

    def _say(self, name: str, notice: Notice, then: Callable[[], None]) -> None:
        """Write the sign that there are events, and then one."""
        if not self.ready:
            return
        self._saying += 1

        def said(_: object, error: FmiError | None) -> None:
            self._saying -= 1
            then()

        frame = frames.encode(notice.encode("aborted"))
        path = f"{self._run}/events/{self.rank}-{name}"
        self._depot.put(f"{self._run}/over", [], lambda *_: self._depot.put(path, [frame], said))

    def late(self, call: Notice, group: Sequence[int]) -> None:
        super().late(call, group)
        self._watch()

    # --------------------------------------------------------------------- ending
    @property
    def left(self) -> bool:
        return not self._depot.pending

    def leave(self) -> None:
        if self._leaving:
            return
        self._leaving = True
        super().leave()
        if self.ready:
            self._say_goodbye()
        else:
            self._meeting.withdraw()

    def _say_goodbye(self) -> None:
        """Say that we leave, after all else is said; the last one clears up."""
        if self._leaving and not self._saying:
            self._say(Kind.LEFT, Notice(self.rank, Kind.LEFT, ""), self._clear_up)

    def _clear_up(self) -> None:
        def clear(names: list[str] | None, error: FmiError | None) -> None:
            left = [name for name in names or () if name.endswith(Kind.LEFT)]
            if len(left) >= self.size:
                self._depot.clear(self._run)

        self._depot.names(f"{self._run}/events", clear)

    def close(self) -> None:
        super().close()
        self._depot.close()
