"""The sending end of a link: messages in order, by reference, and those that may be lost.

A connection can end with bytes that the system has taken and the peer has not. Two kinds are
replaced, and what their end may have cost is sent again:

* a direct one of which the peer may not have heard, as the last word of the handshake was lost
  with it. All that was sent is kept until the peer's first byte comes, then nothing (`revive`);
* one through a relay that died. Both ends count bytes; what was sent last is kept (`resume`).

The caller's memory is its own again once its message is done: nothing behind that is kept.
"""

from __future__ import annotations

import itertools
from collections import deque

from fmi_client.protocol.transfers import Send

TAIL_BYTES = 256 * 1024
"""Of small messages through a relay, so much is kept for the case that it dies with some."""

MOST_REPEATED = 64
"""So many small messages are kept until the peer is known to have the link."""

_GATHER = 64  # buffers in one sendmsg; the kernel allows 1,024


class _Tail:
    """The end of what was sent through a relay, as far back as it is still known."""

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()
        self._size = 0

    def add(self, message: Send) -> None:
        if message.borrowed:
            self._pieces.clear()
            self._size = 0
            return
        self._pieces.append(message.whole[0])
        self._size += len(message.whole[0])
        while self._size > TAIL_BYTES:
            self._size -= len(self._pieces.popleft())

    def take(self, count: int) -> bytes | None:
        """Remove and return the last `count` bytes; None if they are not known any more."""
        if count > self._size:
            return None
        known = b"".join(self._pieces)
        kept, taken = known[: self._size - count], known[self._size - count :]
        self._pieces, self._size = deque([memoryview(kept)]), len(kept)
        return taken


class Outbox:
    """Messages that wait for the system to take them; no bytes are copied.

    The caller writes `next_views()` and reports with `took(n)`.
    """

    def __init__(self) -> None:
        self.queue: deque[Send] = deque()
        self._unheard: list[Send] | None = None
        """What was sent to a peer of which nothing has come; None: it has, or that is too much."""
        self._tail: _Tail | None = None
        self._taken = 0
        """Bytes that the system has taken of a link through a relay."""

    @property
    def keeps(self) -> bool:
        """Whether what is sent now may have to be sent again."""
        return self._unheard is not None or self._tail is not None

    @property
    def resumable(self) -> bool:
        """Whether it was sent through a relay, so that `resume` may find the place."""
        return self._tail is not None

    def begin(self, *, relayed: bool, heard: bool) -> None:
        """There is a connection; `heard`: bytes of the peer's came with it."""
        self._unheard = None if heard or relayed or self.resumable else []
        self._tail = (self._tail or _Tail()) if relayed else None

    def heard(self) -> None:
        """Bytes of the peer have come: it has this connection."""
        self._unheard = None

    def add(self, *views: memoryview) -> Send:
        message = Send(*views)
        self.queue.append(message)
        return message

    def next_views(self) -> list[memoryview]:
        """Return what to write next."""
        return list(itertools.islice((v for m in self.queue for v in m.views), _GATHER))

    def took(self, count: int) -> None:
        """Take note that the system took `count` bytes of `next_views()`."""
        self._taken += count
        while self.queue and (count or not self.queue[0].views):
            message = self.queue[0]
            views = message.views
            message.started = True
            while views and count >= len(views[0]):
                count -= len(views.popleft())
            if views:
                views[0] = views[0][count:]
                return
            self.queue.popleft()
            self._keep(message)
            message.finish()

    def _keep(self, message: Send) -> None:
        if self._tail is not None:
            self._tail.add(message)
        elif self._unheard is not None:
            self._unheard.append(message)
            if message.borrowed or len(self._unheard) > MOST_REPEATED:
                self._unheard = None

    def withdraw(self, message: Send, promised: int) -> bool:
        """Take back a message that waits; False if the peer may have some of it.

        Args:
            promised: of the bytes in the queue, so many are encrypted: what follows needs them.
        """
        if message not in self.queue or message.started:
            return False
        ahead = itertools.takewhile(lambda each: each is not message, self.queue)
        if sum(len(view) for each in ahead for view in each.views) < promised:
            return False
        self.queue.remove(message)
        return True

    def revive(self) -> bool:
        """Send all once more, over a connection in the place of one that the peer has not heard of.

        If it has, and has taken any of it, it will not revive its own end, and no second
        connection comes about.

        Returns:
            Whether all is still known.
        """
        if self._unheard is None:
            return False
        for message in self.queue:
            message.go_back()
        self.queue.extendleft(Send(*message.whole) for message in reversed(self._unheard))
        self._unheard, self._taken = None, 0
        return True

    def resume(self, got: int, promised: int) -> bool:
        """Go back to where the peer is, whose relay was lost.

        Args:
            got: bytes that the peer has, over all connections of this link.
            promised: bytes in the queue that were encrypted and may have left in part.

        Returns:
            Whether all that it has not is still known.
        """
        assert self._tail is not None
        lost = self._taken - got
        begun = self.queue[0].taken if self.queue else 0
        if lost < -promised:  # more than there was
            return False
        if lost < 0:  # what was encrypted and left counts, too
            self.took(-lost)
        elif lost <= begun:  # part of the first in the queue
            if self.queue:
                self.queue[0].go_back(begun - lost)
        else:  # that, and the end of what was done
            again = self._tail.take(lost - begun)
            if again is None:
                return False
            if self.queue:
                self.queue[0].go_back()
            self.queue.appendleft(Send(memoryview(again)))
        self._taken = got
        return True

    def fail(self, error: Exception) -> None:
        """Nothing more will be sent."""
        queue, self.queue = self.queue, deque()
        for message in queue:
            message.finish(error)
