"""Between two ranks: the handshake on a fresh connection, then messages.

Handshake, the same whoever connected (both may have: TCP's simultaneous open)::

    hello    "FMI3", from, to, epoch: uint32, keyed: uint8, nonce: 16 bytes
    proof    32 bytes: HMAC over the role (low or high rank) and both hellos
    pick     the lower rank, on the one connection that it keeps
    picked   the higher rank's answer; only now may data flow

The proof's key mixes the job key (if there is one) with the cookie that the server gave to
this pair: a rank recognises its peer by proof, never by address, and a stranger, another
job's rank or the rank itself fails it. Everything is of fixed size: no parser of a
peer's data runs before the proof.

A message is a 32-byte header, then signature, meta and payload::

    kind uint8 · flags uint8 · signature length uint16 · meta length uint32
    context uint64 · sequence or tag uint64 · payload length uint64

`signature` says what the sender is doing ("allreduce sum <f4 (10,)"); the receiver
compares it with its own, so that ranks which call different things find out.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fmi_client.errors import AuthenticationFailed, FmiError, ProtocolError
from fmi_client.protocol import auth

_HELLO = struct.Struct("!4sIIIB16s")
_MAGIC = b"FMI3"
HELLO_BYTES = _HELLO.size
_PICK = b"P"
_PICKED = b"K"


class PeerHello(NamedTuple):
    """Who is calling: read before anything is proven, so good for look-up only."""

    sender: int
    receiver: int
    epoch: int
    keyed: bool


def read_hello(data: bytes) -> PeerHello:
    """Read a hello.

    Raises:
        ProtocolError: the caller speaks something else.
    """
    magic, sender, receiver, epoch, keyed, _ = _HELLO.unpack(data)
    if magic != _MAGIC or keyed > 1:
        raise ProtocolError("not a rank")
    return PeerHello(sender, receiver, epoch, bool(keyed))


class Handshake:
    """Proof and choice on one connection between ranks `me` and `peer`."""

    def __init__(self, me: int, peer: int, epoch: int, key: bytes | None, cookie: bytes) -> None:
        self.low = me < peer
        self._expect = PeerHello(peer, me, epoch, key is not None)
        self._key = auth.mac(key or b"", "fmi3 pair", cookie)
        self.hello = _HELLO.pack(_MAGIC, me, peer, epoch, key is not None, auth.nonce())
        self._theirs = b""
        self._buffer = bytearray()
        self.outgoing = bytearray(self.hello)
        self.proven = False
        self.complete = False
        """Both sides chose this connection; `rest()` holds what came after."""

    def receive(self, data: bytes) -> None:
        """Take bytes of the peer; watch `outgoing`, `proven` and `complete`.

        Raises:
            AuthenticationFailed: this is not the peer we expect.
            ProtocolError: it is, but does not keep to the protocol.
        """
        self._buffer += data
        if not self._theirs and len(self._buffer) >= HELLO_BYTES:
            self._check_hello(self._take(HELLO_BYTES))
        if self._theirs and not self.proven and len(self._buffer) >= auth.MAC_BYTES:
            self._check_proof(self._take(auth.MAC_BYTES))
        if self.proven and not self.complete and self._buffer:
            self._check_choice(self._take(1))

    def pick(self) -> None:
        """Choose this connection (the lower rank does)."""
        self.outgoing += _PICK

    def rest(self) -> bytes:
        """Return bytes that followed the handshake: the first messages."""
        return self._take(len(self._buffer))

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _check_hello(self, data: bytes) -> None:
        if read_hello(data) != self._expect:
            raise AuthenticationFailed("a stranger, or a rank of another job, epoch or key")
        self._theirs = data
        self.outgoing += self._proof(self.low)

    def _proof(self, of_low: bool) -> bytes:
        low, high = (self.hello, self._theirs) if self.low else (self._theirs, self.hello)
        return auth.mac(self._key, "fmi3 low" if of_low else "fmi3 high", low, high)

    def _check_proof(self, data: bytes) -> None:
        if not auth.same(data, self._proof(not self.low)):
            raise AuthenticationFailed("the peer does not have this job's key")
        self.proven = True

    def _check_choice(self, data: bytes) -> None:
        if data != (_PICKED if self.low else _PICK):
            raise ProtocolError("unexpected byte in place of the choice of connection")
        if not self.low:
            self.outgoing += _PICKED
        self.complete = True


# -------------------------------------------------------------------------- messages

_HEADER = struct.Struct("!BBHIQQQ")
HEADER_BYTES = _HEADER.size

COLLECTIVE = 1
POINT_TO_POINT = 2
_KINDS = (COLLECTIVE, POINT_TO_POINT)

STAGE_BYTES = 64 * 1024
"""So much of a payload may be copied once, because it came in one read with its header."""

FOLD_BYTES = 512 * 1024
"""So much is read at once of what is combined as it comes: it still is in the cache then."""

HOLD_BYTES = 32 * 1024
"""Smaller messages are worth a copy, so that the ones behind them can be seen."""

MAX_HEAD = 16 * 1024 * 1024
"""Signature and meta: a bundle of 100,000 small items describes itself in less."""

MAX_PAYLOAD = 1 << 40
"""Sanity bound; memory is taken as the bytes come, not when they are announced."""

Key = tuple[int, int, int]
"""What a receive matches: kind, context, and sequence number or tag."""

Buffer = bytes | bytearray | memoryview


class Payload(NamedTuple):
    """What travels: a description for the receiver, and the bytes in any number of pieces."""

    meta: bytes
    parts: Sequence[Buffer]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts))


def head(key: Key, signature: bytes, payload: Payload, nbytes: int) -> bytes:
    """Return all of a message that precedes its payload."""
    kind, context, number = key
    fixed = _HEADER.pack(kind, 0, len(signature), len(payload.meta), context, number, nbytes)
    return fixed + signature + payload.meta


class SignatureMismatch(Exception):
    """Internal: a message of the right place says that its sender does something else."""

    def __init__(self, theirs: bytes) -> None:
        super().__init__(theirs)
        self.theirs = theirs


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


class Receive(Pending):
    """One expected message; when it is done without error, `meta` and `data` hold it.

    `into`, where given, is the place for the payload. A point-to-point payload of another
    size is left in memory of its own, for the caller to say what is wrong. `fold` is told how
    many bytes of a payload for `into` have come, as they come.
    """

    __slots__ = ("data", "fold", "folding_error", "into", "key", "meta", "signature")

    def __init__(
        self,
        key: Key,
        signature: bytes,
        into: memoryview | None,
        fold: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.key = key
        self.signature = signature
        self.into = into
        self.fold = fold
        self.folding_error: Exception | None = None
        self.meta = b""
        self.data: memoryview = memoryview(b"")

    def progress(self, filled: int) -> None:
        """Let `fold` know; what it raises is the caller's own, and ends the receive later."""
        if self.fold is None or self.folding_error is not None:
            return
        try:
            self.fold(filled)
        except Exception as error:
            self.folding_error = error


class _Arrival:
    """A message whose payload is still coming, or that nobody has asked for yet."""

    __slots__ = ("complete", "data", "filled", "key", "meta", "receive", "signature")

    def __init__(self, key: Key, signature: bytes, meta: bytes) -> None:
        self.key = key
        self.signature = signature
        self.meta = meta
        self.data: memoryview = memoryview(b"")
        self.filled = 0
        self.complete = False
        self.receive: Receive | None = None


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
        """Payload held for nobody yet; the caller stops reading where this is large."""
        self.messages = 0
        self.payload_bytes = 0

    # ------------------------------------------------------------------- our side
    def post(self, receive: Receive) -> None:
        """Expect a message; it may have arrived already."""
        queue = self._unexpected.get(receive.key)
        if not queue:
            self.waiting += 1
            self._awaited.setdefault(receive.key, deque()).append(receive)
            if self.held:
                self.held = False
                self._parse()
            return
        arrival = queue.popleft()
        if not queue:
            del self._unexpected[receive.key]
        self.unexpected_bytes -= len(arrival.data)
        if not self._agrees(receive, arrival.signature):
            return
        if arrival.complete:
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
        """Let a message go on arriving in memory of its own, ahead of those behind it."""
        arrival.receive = None
        place = self._allocate(len(arrival.data))
        place[: arrival.filled] = arrival.data[: arrival.filled]
        arrival.data = place
        self._unexpected.setdefault(arrival.key, deque()).appendleft(arrival)
        self.unexpected_bytes += len(place)

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

    # ----------------------------------------------------------------- their side
    def get_buffer(self) -> memoryview:
        """Return where the next bytes of the stream belong; never empty."""
        current = self._current
        if current is None:
            return self._stage[self._filled :]
        if current.receive is None or current.receive.fold is None:
            return current.data[current.filled :]
        return current.data[current.filled : current.filled + FOLD_BYTES]

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
        current.filled += count
        if current.filled == len(current.data):
            self._current = None
            self._complete(current)
        elif current.receive is not None:
            current.receive.progress(current.filled)

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
            kind, flags, n_sign, n_meta, context, number, nbytes = _HEADER.unpack_from(
                self._stage, start
            )
            head_bytes = HEADER_BYTES + n_sign + n_meta
            if kind not in _KINDS or flags or head_bytes > MAX_HEAD or nbytes > MAX_PAYLOAD:
                raise ProtocolError("malformed message header from the peer")
            if self._filled - start < head_bytes:
                break
            at, body = start + HEADER_BYTES, start + head_bytes
            key = kind, context, number
            signature = bytes(self._stage[at : at + n_sign])
            meta = bytes(self._stage[at + n_sign : body]) if n_meta else b""
            if body + nbytes <= self._filled and key in self._awaited:
                self._hand_over(key, signature, meta, self._stage[body : body + nbytes])
                start = body + nbytes
                continue
            arrival = _Arrival(key, signature, meta)
            if self._holds(arrival, nbytes, self._filled - body):
                break
            start = self._begin(arrival, nbytes, body)
        self._compact(start)

    def _hand_over(self, key: Key, signature: bytes, meta: bytes, data: memoryview) -> None:
        """Deliver a message that is whole and awaited: what most small ones are."""
        receive = self._next_awaited(key)
        self.waiting -= 1
        if not self._agrees(receive, signature):
            return
        self.messages += 1
        nbytes = len(data)
        self.payload_bytes += nbytes
        if nbytes and (receive.into is None or len(receive.into) != nbytes):
            place = self._allocate(nbytes)
            place[:] = data
            data = place
        self._deliver(receive, meta, data)

    def _next_awaited(self, key: Key) -> Receive:
        queue = self._awaited[key]
        receive = queue.popleft()
        if not queue:
            del self._awaited[key]
        return receive

    def _holds(self, arrival: _Arrival, nbytes: int, have: int) -> bool:
        """Whether a message is large, incomplete, and delays nothing that anybody awaits."""
        if self._hold and not self.waiting and nbytes > HOLD_BYTES and have < nbytes:
            self._on_unexpected(arrival.key, arrival.signature)
            self.held = True
        return self.held

    def _begin(self, arrival: _Arrival, nbytes: int, start: int) -> int:
        """Find a place for the payload, move what has come of it, return where it ended."""
        self._match(arrival, nbytes)
        have = min(nbytes, self._filled - start)
        arrival.data[:have] = self._stage[start : start + have]
        arrival.filled = have
        if have == nbytes:
            self._complete(arrival)
        else:
            self._current = arrival
        return start + have

    def _compact(self, start: int) -> None:
        left = self._filled - start
        if start and left:
            self._stage[:left] = bytes(self._stage[start : self._filled])
        self._filled = left
        if left >= HEADER_BYTES:
            _, _, n_sign, n_meta, *_ = _HEADER.unpack_from(self._stage)
            need = HEADER_BYTES + n_sign + n_meta
            if need > len(self._stage):
                grown = memoryview(bytearray(need))
                grown[:left] = self._stage[:left]
                self._stage = grown

    def _match(self, arrival: _Arrival, nbytes: int) -> None:
        if arrival.key in self._awaited:
            receive = self._next_awaited(arrival.key)
            if self._agrees(receive, arrival.signature):
                arrival.receive = receive
                if receive.into is not None and len(receive.into) == nbytes:
                    arrival.data = receive.into
                    return
            else:
                self.waiting -= 1
        else:
            self._unexpected.setdefault(arrival.key, deque()).append(arrival)
            self.unexpected_bytes += nbytes
            self._on_unexpected(arrival.key, arrival.signature)
        arrival.data = self._allocate(nbytes)

    def _agrees(self, receive: Receive, signature: bytes) -> bool:
        if receive.signature == signature:
            return True
        receive.finish(SignatureMismatch(signature))
        return False

    def _complete(self, arrival: _Arrival) -> None:
        arrival.complete = True
        self.messages += 1
        self.payload_bytes += len(arrival.data)
        if arrival.receive is not None:
            self.waiting -= 1
            self._deliver(arrival.receive, arrival.meta, arrival.data)

    def _deliver(self, receive: Receive, meta: bytes, data: memoryview) -> None:
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
        receive.progress(len(data))
        receive.finish(receive.folding_error)


def _wrong_size(expected: int, got: int) -> FmiError:
    return ProtocolError(f"expected a message of {expected} bytes, got {got}")
