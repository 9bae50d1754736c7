"""The receiving end of a link: one peer's bytes, and the receives that await its messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fmi_client.errors import FmiError, ProtocolError
from fmi_client.protocol.peer import (
    COLLECTIVE,
    HEADER,
    HEADER_BYTES,
    KINDS,
    MAX_HEAD,
    MAX_PAYLOAD,
    WAITING,
    Buffer,
    Key,
)
from fmi_client.protocol.transfers import Fold, Receive, SignatureMismatch

STAGE_BYTES = 64 * 1024
"""So much of a payload may be copied once, because it came in one read with its header."""

MESSAGE_BYTES = 1536
"""What keeping a message takes beside its payload: a million empty ones are not nothing."""

HOLD_BYTES = 32 * 1024
"""Smaller messages are worth a copy, so that the ones behind them can be seen."""


class _Arrival:
    """A message whose payload is still coming, or that nobody has asked for yet."""

    __slots__ = (
        *("data", "filled", "fold", "key", "left", "meta"),
        *("nbytes", "receive", "signature"),
    )

    def __init__(self, key: Key, signature: bytes, meta: bytes, nbytes: int) -> None:
        self.key = key
        self.signature = signature
        self.meta = meta
        self.nbytes = self.left = nbytes
        self.data: memoryview = memoryview(b"")
        """Where it is put: memory for all of it, or the room of `fold`."""
        self.filled = 0
        self.fold: Fold | None = None
        self.receive: Receive | None = None

    @property
    def cost(self) -> int:
        """Bytes of memory that it takes while nobody awaits it."""
        return self.nbytes + len(self.signature) + len(self.meta) + MESSAGE_BYTES

    def add(self, count: int) -> None:
        self.left -= count
        self.filled += count
        if self.fold is not None and self.receive is not None:
            self.filled = self.receive.take(self.fold, self.filled)


class Inbox:
    """Turns one peer's byte stream into messages, each put where it is awaited.

    The caller reads into `get_buffer()` and reports with `buffer_updated(n)`, as with
    asyncio's BufferedProtocol: a large payload lands in its destination without a copy.

    Args:
        allocate: makes a writable flat buffer of n bytes for a message without destination.
        on_unexpected: told of each message that nobody awaits yet.
        stage_bytes: what one read may bring before we know where its payload belongs.
        hold: leave a large message that nobody awaits where it is (`held`), instead of
            making room for it: its receive may be posted soon, and then nothing is copied.
    """

    def __init__(
        self,
        allocate: Callable[[int], memoryview],
        on_unexpected: Callable[[Key, bytes], None] = lambda key, signature: None,
        stage_bytes: int = STAGE_BYTES,
        hold: bool = False,
    ) -> None:
        self._allocate = allocate
        self._on_unexpected = on_unexpected
        self._stage = memoryview(bytearray(stage_bytes))
        self._filled = 0
        self._hold = self._may_hold = hold
        self.held = False
        """Whether reading must wait until the next receive is posted."""
        self._current: _Arrival | None = None
        self._awaited: dict[Key, deque[Receive]] = {}
        self._unexpected: dict[Key, deque[_Arrival]] = {}
        self.waiting = 0
        """Receives that are posted and not done."""
        self.unexpected_bytes = 0
        """Memory for messages that nobody awaits yet; the caller stops reading where it is much."""
        self.messages = 0
        self.payload_bytes = 0

    # ------------------------------------------------------------------- our side
    def post(self, receive: Receive) -> None:
        """Expect a message; it may have arrived already."""
        queue = self._unexpected.get(receive.key)
        if not queue:
            self.waiting += 1
            awaited = self._awaited.get(receive.key)
            if awaited is None:
                awaited = self._awaited[receive.key] = deque()
            awaited.append(receive)
            if self.held:
                self.held = False
                self._parse()
            return
        arrival = queue.popleft()
        if not queue:
            del self._unexpected[receive.key]
        self.unexpected_bytes -= arrival.cost
        if not self._agrees(receive, arrival.signature):
            return
        if not arrival.left:
            self._deliver(receive, arrival.meta, arrival.data)
        else:
            self.waiting += 1
            arrival.receive = receive

    def cancel(self, receive: Receive) -> None:
        """Take back a receive; what has come of its message is kept for the next one."""
        queue = self._awaited.get(receive.key)
        current = self._current
        if queue is not None and receive in queue:
            queue.remove(receive)
            if not queue:
                del self._awaited[receive.key]
            self.waiting -= 1
        elif current is not None and current.receive is receive:
            self.waiting -= 1
            self._detach(current)

    def _detach(self, arrival: _Arrival) -> None:
        """Let a message go on arriving in memory of its own, for the next receive of its key."""
        arrival.receive = arrival.fold = None
        place = self._allocate(arrival.nbytes)
        place[: arrival.filled] = arrival.data[: arrival.filled]
        arrival.data, arrival.filled = place, arrival.nbytes - arrival.left
        if arrival.key in self._awaited:
            arrival.receive = self._next_awaited(arrival.key)
            return
        self._unexpected.setdefault(arrival.key, deque()).appendleft(arrival)
        self.unexpected_bytes += arrival.cost

    def make_room(self, room: bool) -> None:
        """Whether to take in what nobody awaits: while we are stuck, others may be, on us."""
        self._hold = self._may_hold and not room
        if self.held and not self._hold:
            self.held = False
            self._parse()

    def fail(self, error: Exception) -> None:
        """No more bytes will come: end all that is awaited."""
        current = self._current
        self._current = None
        waiting = [receive for queue in self._awaited.values() for receive in queue]
        if current is not None and current.receive is not None:
            waiting.append(current.receive)
        self._awaited.clear()
        self.waiting = 0
        for receive in waiting:
            if not receive.done:
                receive.finish(error)

    @property
    def receiving(self) -> bool:
        """Whether a payload has begun to arrive, and has its place."""
        return self._current is not None

    @property
    def left(self) -> int:
        """How many bytes the payload lacks that is arriving; 0 where none is."""
        return self._current.left if self._current is not None else 0

    # ----------------------------------------------------------------- their side
    def get_buffer(self) -> memoryview:
        """Return where the next bytes of the stream belong; never empty."""
        current = self._current
        if current is not None:
            return current.data[current.filled : current.filled + current.left]
        return self._stage[self._filled :] if self._filled else self._stage

    def buffer_updated(self, count: int) -> None:
        """Take note that `count` bytes were put into `get_buffer()`.

        Raises:
            ProtocolError: the peer sent what the protocol forbids; close the connection.
        """
        current = self._current
        if current is None:
            self._filled += count
            self._parse()
            return
        current.add(count)
        if not current.left:
            self._current = None
            self._complete(current)

    def feed(self, data: Buffer) -> None:
        """Take bytes that were read elsewhere."""
        view = memoryview(data)
        while view:
            room = self.get_buffer()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            self.buffer_updated(count)
            view = view[count:]

    def _parse(self) -> None:
        start = 0
        while self._filled - start >= HEADER_BYTES:
            kind, flags, n_sign, n_meta, context, number, nbytes = HEADER.unpack_from(
                self._stage, start
            )
            head_bytes = HEADER_BYTES + n_sign + n_meta
            most = 0 if kind == WAITING else MAX_PAYLOAD
            if kind not in KINDS or flags or head_bytes > MAX_HEAD or nbytes > most:
                raise ProtocolError("malformed message header from the peer")
            if self._filled - start < head_bytes:
                break
            at, body = start + HEADER_BYTES, start + head_bytes
            key = kind, context, number
            signature = bytes(self._stage[at : at + n_sign])
            meta = bytes(self._stage[at + n_sign : body]) if n_meta else b""
            if kind == WAITING:
                self._on_unexpected((COLLECTIVE, context, number), signature)
                start = body
                continue
            if body + nbytes <= self._filled and key in self._awaited:
                self._hand_over(key, signature, meta, self._stage[body : body + nbytes])
                start = body + nbytes
                continue
            arrival = _Arrival(key, signature, meta, nbytes)
            if self._holds(arrival, self._filled - body):
                break
            start = self._begin(arrival, body)
        self._compact(start)

    def _hand_over(self, key: Key, signature: bytes, meta: bytes, data: memoryview) -> None:
        """Deliver a message that is whole and awaited: what most small ones are."""
        receive = self._next_awaited(key)
        self.waiting -= 1
        nbytes = len(data)
        self.messages += 1
        self.payload_bytes += nbytes
        if not self._agrees(receive, signature):
            return
        fits = receive.fold is not None or (receive.into and len(receive.into) == nbytes)
        if nbytes and not fits:
            place = self._memory(nbytes)
            place[:] = data
            data = place
        self._deliver(receive, meta, data)

    def _next_awaited(self, key: Key) -> Receive:
        queue = self._awaited[key]
        receive = queue.popleft()
        if not queue:
            del self._awaited[key]
        return receive

    def _holds(self, arrival: _Arrival, have: int) -> bool:
        """Whether a message is large, incomplete, and delays nothing that anybody awaits."""
        large = arrival.nbytes > HOLD_BYTES and have < arrival.nbytes
        if large and self._hold and not self.waiting:
            self._on_unexpected(arrival.key, arrival.signature)
            self.held = True
        return self.held

    def _begin(self, arrival: _Arrival, start: int) -> int:
        """Find a place for the payload, move what has come of it, return where it ended."""
        self._match(arrival)
        end = start + min(arrival.nbytes, self._filled - start)
        at = start
        while at < end:
            count = min(end - at, len(arrival.data) - arrival.filled)
            arrival.data[arrival.filled : arrival.filled + count] = self._stage[at : at + count]
            arrival.add(count)
            at += count
        if arrival.left:
            self._current = arrival
        else:
            self._complete(arrival)
        return end

    def _compact(self, start: int) -> None:
        left = self._filled - start
        if not left:
            self._filled = 0
            return
        if start:
            self._stage[:left] = bytes(self._stage[start : self._filled])
        self._filled = left
        if left >= HEADER_BYTES:
            _, _, n_sign, n_meta, *_ = HEADER.unpack_from(self._stage)
            need = HEADER_BYTES + n_sign + n_meta
            if need > len(self._stage):
                grown = memoryview(bytearray(need))
                grown[:left] = self._stage[:left]
                self._stage = grown

    def _match(self, arrival: _Arrival) -> None:
        if arrival.key in self._awaited:
            receive = self._next_awaited(arrival.key)
            if self._agrees(receive, arrival.signature):
                arrival.receive = receive
                if self._place(arrival, receive):
                    return
            else:
                self.waiting -= 1
        else:
            self._unexpected.setdefault(arrival.key, deque()).append(arrival)
            self.unexpected_bytes += arrival.cost
            self._on_unexpected(arrival.key, arrival.signature)
        arrival.data = self._memory(arrival.nbytes)

    def _memory(self, nbytes: int) -> memoryview:
        try:
            return self._allocate(nbytes)
        except MemoryError:
            raise ProtocolError(f"no memory for a message of {nbytes:,} bytes") from None

    def _place(self, arrival: _Arrival, receive: Receive) -> bool:
        """Put the payload where it is wanted, if it has the size that is wanted."""
        fold, into = receive.fold, receive.into
        if fold is not None and fold.nbytes == arrival.nbytes:
            arrival.fold, arrival.data = fold, fold.room
            return True
        if into is not None and len(into) == arrival.nbytes:
            arrival.data = into
            return True
        return False

    def _agrees(self, receive: Receive, signature: bytes) -> bool:
        if receive.signature == signature:
            return True
        receive.finish(SignatureMismatch(signature))
        return False

    def _complete(self, arrival: _Arrival) -> None:
        self.messages += 1
        self.payload_bytes += arrival.nbytes
        receive = arrival.receive
        if receive is None:
            return
        self.waiting -= 1
        if arrival.fold is not None:
            receive.finish(receive.folding_error)
        else:
            self._deliver(receive, arrival.meta, arrival.data)

    def _deliver(self, receive: Receive, meta: bytes, data: memoryview) -> None:
        if receive.fold is not None:
            self._fold(receive, receive.fold, data)
            return
        into = receive.into
        if into is not None and data is not into:
            if len(into) == len(data):
                into[:] = data
                data = into
            elif receive.key[0] == COLLECTIVE:
                receive.finish(_wrong_size(len(into), len(data)))
                return
        receive.meta = meta
        receive.data = data
        receive.finish()

    def _fold(self, receive: Receive, fold: Fold, data: memoryview) -> None:
        if len(data) != fold.nbytes:
            receive.finish(_wrong_size(fold.nbytes, len(data)))
            return
        receive.pour(fold, data)
        receive.finish(receive.folding_error)


def _wrong_size(expected: int, got: int) -> FmiError:
    return ProtocolError(f"expected a message of {expected} bytes, got {got}")
