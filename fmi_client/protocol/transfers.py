"""What operations wait for: a message on its way to a peer, and one that is to come from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from fmi_client.protocol.peer import Key


class Pending:
    """Something under way: `done` turns true when it has ended, well or with `error`."""

    __slots__ = ("done", "error", "on_done")

    def __init__(self, done: bool = False) -> None:
        self.done = done
        self.error: Exception | None = None
        self.on_done: Callable[[], None] | None = None

    def finish(self, error: Exception | None = None) -> None:
        self.error = error
        self.done = True
        if self.on_done:
            self.on_done()


class Send(Pending):
    """A message on its way; it is done when the system has taken all of it."""

    __slots__ = ("started", "views", "whole")

    def __init__(self, *views: memoryview, done: bool = False) -> None:
        super().__init__(done)
        self.whole = views
        self.views = deque(views)
        """What the system has not taken yet."""
        self.started = False

    @property
    def taken(self) -> int:
        """How many of its bytes the system has taken."""
        return sum(map(len, self.whole)) - sum(map(len, self.views))

    @property
    def borrowed(self) -> bool:
        """Whether it is the caller's memory in part, which may change once the message is done."""
        return len(self.whole) > 1

    def go_back(self, to: int = 0) -> None:
        """Send all behind the first `to` bytes (again)."""
        self.views, self.started = deque(_behind(self.whole, to)), to > 0


SENT = Send(done=True)
"""What most sends of small messages are, at once."""


def _behind(views: Iterable[memoryview], skip: int) -> Iterator[memoryview]:
    """Yield what follows the first `skip` bytes."""
    for view in views:
        if skip < len(view):
            yield view[skip:]
        skip = max(0, skip - len(view))


class Fold(Protocol):
    """Takes in a payload as it comes, in place of memory for all of it."""

    nbytes: int
    """Of the whole payload."""
    room: memoryview
    """Where the next bytes belong."""

    def take(self, filled: int) -> int:
        """Use the first `filled` bytes of the room; returns how many of them are left there."""


class Receive(Pending):
    """One expected message; when it is done without error, `meta` and `data` hold it.

    `into`, where given, is the place for the payload. A point-to-point payload of another
    size is left in memory of its own, for the caller to say what is wrong. `fold`, where given,
    takes in the payload piece by piece, and `data` stays empty.
    """

    __slots__ = ("data", "fold", "folding_error", "into", "key", "meta", "signature")

    def __init__(
        self,
        key: Key,
        signature: bytes,
        into: memoryview | None,
        fold: Fold | None = None,
    ) -> None:
        super().__init__()
        self.key = key
        self.signature = signature
        self.into = into
        self.fold = fold
        self.folding_error: Exception | None = None
        self.meta = b""
        self.data: memoryview = memoryview(b"")

    def take(self, fold: Fold, filled: int) -> int:
        """Let `fold` take its room's content; what it raises ends the receive, later."""
        if self.folding_error is None:
            try:
                return fold.take(filled)
            except Exception as error:  # the caller's own operation may raise anything
                self.folding_error = error
        return 0

    def pour(self, fold: Fold, data: memoryview) -> None:
        """Give `fold` a payload that came before it was awaited."""
        filled = 0
        while data:
            count = min(len(data), len(fold.room) - filled)
            fold.room[filled : filled + count] = data[:count]
            filled = self.take(fold, filled + count)
            data = data[count:]


class SignatureMismatch(Exception):
    """Internal: a message of the right place says that its sender does something else."""

    def __init__(self, theirs: bytes) -> None:
        super().__init__(theirs)
        self.theirs = theirs
