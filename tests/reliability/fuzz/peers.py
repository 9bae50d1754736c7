"""What comes from another rank: handshake, messages, what they hold, and objects of a store."""

from __future__ import annotations

from typing import Any

import msgpack

from fmi_client import payloads
from fmi_client.errors import FmiError, ProtocolError
from fmi_client.ops import SUM
from fmi_client.protocol import frames, objects
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.notice import Notice
from fmi_client.protocol.peer import COLLECTIVE, POINT_TO_POINT, Handshake
from fmi_client.protocol.transfers import Receive
from fmi_client.values import make_value
from tests.reliability.fuzz.steady import steady
from tests.reliability.fuzz.target import MB, Target, add

COOKIE, KEY = b"c" * 16, b"k" * 32
MEMORY = 8 * MB
"""What the inbox of a run is given; more is refused, as a system does."""


def _handshake(data: bytes, step: int) -> object:
    """The first byte says as whom: the lower rank or the higher, with or without a key."""
    me, peer = (0, 1) if data[:1] < b"\x80" else (1, 0)
    key = KEY if data[:1] and data[0] & 1 else None
    with steady():
        handshake, stream = Handshake(me, peer, 0, key, COOKIE), data[1:]
        picked = False
        try:
            for start in range(0, len(stream), step):
                handshake.receive(stream[start : start + step])
                if handshake.proven and handshake.low and not picked:
                    picked = True
                    handshake.pick()
        except FmiError as error:
            return repr(error)  # what the whole had still to send depends on when it is asked
    rest = handshake.rest() if handshake.complete else b""
    return handshake.proven, handshake.complete, bytes(handshake.outgoing), rest


# ---------------------------------------------------------------------------- messages


class _Sum:
    """Takes in a payload of 64 bytes, eight at a time."""

    def __init__(self) -> None:
        self.nbytes = 64
        self.room = memoryview(bytearray(8))
        self.sum = 0

    def take(self, filled: int) -> int:
        if filled == len(self.room):
            self.sum += int.from_bytes(self.room, "big")
            return 0
        return filled


def _receives() -> list[Receive]:
    """Every kind of receive: anywhere, into a place, folded; numbers 0 to 4."""
    return [
        Receive((COLLECTIVE, 7, 0), b"sig", None),
        Receive((COLLECTIVE, 7, 1), b"sig", memoryview(bytearray(40))),
        Receive((COLLECTIVE, 7, 2), b"sig", None, _Sum()),
        Receive((POINT_TO_POINT, 7, 3), b"", memoryview(bytearray(40))),
        Receive((COLLECTIVE, 7, 0), b"sig", None),
    ]


def _allocate(nbytes: int) -> memoryview:
    if nbytes > MEMORY:
        raise MemoryError(f"{nbytes} bytes")
    return payloads.allocate(nbytes)


def _inbox(data: bytes, step: int) -> object:
    """The first byte says which receives are posted before the bytes come; the rest are after."""
    early, stream = data[:1] or b"\0", data[1:]
    inbox, receives = Inbox(_allocate, stage_bytes=64, hold=bool(early[0] & 0x80)), _receives()
    posts = [receive for bit, receive in enumerate(receives) if early[0] >> bit & 1]
    late = [receive for bit, receive in enumerate(receives) if not early[0] >> bit & 1]
    try:
        for receive in posts:
            inbox.post(receive)
        _pour(inbox, stream, step)
        for receive in late:
            inbox.post(receive)
    except ProtocolError as error:
        inbox.fail(error)
        return [_state(receive) for receive in receives if receive.done], str(error)
    inbox.fail(ProtocolError("the end"))
    return [_state(each) for each in receives], inbox.messages, inbox.unexpected_bytes


def _pour(inbox: Inbox, stream: bytes, step: int) -> None:
    """Give it bytes as a link does; a message that is held there is asked for by making room."""
    for start in range(0, len(stream), step):
        piece = stream[start : start + step]
        while piece:
            if inbox.held:
                inbox.make_room(True)
            room = inbox.get_buffer()
            count = min(len(room), len(piece))
            assert count, "no room for what comes"
            room[:count] = piece[:count]
            inbox.buffer_updated(count)
            piece = piece[count:]


def _state(receive: Receive) -> object:
    folded = receive.fold.sum if isinstance(receive.fold, _Sum) else None
    return str(receive.error), receive.meta, bytes(receive.data), folded


# ------------------------------------------------------------------- what messages hold


def packed(obj: object) -> bytes:
    """An object as an input of "payload"."""
    payload = payloads.pack(obj)
    return len(payload.meta).to_bytes(2, "big") + payload.meta + b"".join(payload.parts)


def _payload(data: bytes, step: int) -> object:
    end = 2 + int.from_bytes(data[:2], "big")
    try:
        return type(payloads.unpack(data[2:end], bytearray(data[end:]))).__name__
    except ProtocolError as error:
        return str(error)


def _object(data: bytes, step: int) -> object:
    """An object as a reduction takes it."""
    value, receive = make_value(1, SUM), Receive((COLLECTIVE, 0, 0), b"", None)
    receive.data = memoryview(data)
    try:
        value.replace(receive)
    except ProtocolError as error:
        return str(error)
    return type(value.result()).__name__


# ------------------------------------------------------------------- objects of a store

SCHEME = objects.Scheme("job", 0, 2, KEY)


def _store(data: bytes, step: int) -> object:
    """An object of the store, its name before a line feed."""
    raw, _, content = data.partition(b"\n")
    name = raw.decode("utf-8", "surrogateescape")
    found: list[Any] = [SCHEME.tickets("", [name]), objects.event_rank(name)]
    if not name.isascii():  # no name of ours, so nothing of that name is read
        return found
    try:
        body = SCHEME.unseal(name, content)
    except ProtocolError as error:
        return [*found, type(error)]
    for read in (objects.read_run, _said):
        try:
            found.append(read(body))
        except ProtocolError as error:
            found.append(str(error))
    return found


def _said(body: memoryview) -> object:
    return [Notice.decode(message, 1) for message, _ in frames.FrameReader().feed(body)]


def sealed(name: str, content: bytes) -> bytes:
    """An input of "store" that a rank of the job wrote."""
    return name.encode() + b"\n" + SCHEME.seal(name, (content,)) + content


def nested(depth: int) -> bytes:
    """A tuple in a tuple in a tuple …, which Python packs no deeper than its own stack."""
    body = msgpack.packb(None)
    for _ in range(depth):
        body = msgpack.packb(msgpack.ExtType(2, b"\x91" + body))
    return bytes(body)


add(Target("handshake", _handshake, stream=True))
add(Target("inbox", _inbox, stream=True, memory=3 * MEMORY))
# msgpack makes lists before it reads them; they are of zeros, which take no pages.
add(Target("payload", _payload, memory=128 * MB))
add(Target("object", _object, memory=128 * MB))
add(Target("store", _store))
