"""What comes from the network to the server, and from the server to a rank."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from fmi_client.errors import FmiError
from fmi_client.hosts import parse_endpoint
from fmi_client.protocol import frames
from fmi_client.protocol.auth import Token, parse_key
from fmi_client.protocol.relay import relay_request
from fmi_client.protocol.rendezvous import AUTH_SECONDS, ClientSide
from rendezvous_server.config import ConfigError, read_networks
from tests.reliability.fuzz.steady import Scene, Wire, hello, staged, steady
from tests.reliability.fuzz.target import Target, add

TICKET_BYTES = len(relay_request(bytes(16)))

assert AUTH_SECONDS > 1, "a run of a target is over before a stranger's time is"


def _frames(data: bytes, step: int) -> object:
    reader, found = frames.FrameReader(frames.MAX_FRAME_BEFORE_AUTH), []
    try:
        for start in range(0, len(data), step):
            for _, body in reader.feed(data[start : start + step]):
                found.append(body)  # before the next one fails
    except FmiError as error:
        return found, repr(error)
    return found


def framed(bodies: Iterable[bytes]) -> bytes:
    """Bodies of messages as an input of "member" and "told", where no length can be wrong."""
    return b"".join(len(body).to_bytes(2, "big") + body for body in bodies)


def _bodies(data: bytes) -> bytes:
    """The stream that such an input stands for."""
    stream = b""
    while data:
        body = data[2 : 2 + int.from_bytes(data[:2], "big")]
        stream += len(body).to_bytes(4, "big") + body
        data = data[2 + len(body) :]
    return stream


# ------------------------------------------------------------------------ to the server


def _server(data: bytes, step: int, **kind: bool) -> object:
    def play() -> object:
        scene = Scene(**kind)
        scene.join(1)
        return _deliver(scene, scene.connect(), data, step)

    return staged(play)


def _deliver(scene: Scene, wire: Wire, data: bytes, step: int) -> object:
    try:
        wire.feed(data, step)
        wire.fall_quiet()
        return scene.outcome(wire)
    finally:
        scene.end()


def _legacy(data: bytes, step: int) -> object:
    outcome = _server(data, step, legacy=True)
    # Bytes behind a request refuse it, or, where they come later, what has been answered already.
    return "more" if "bytes after the" in str(outcome) else outcome


def _member(data: bytes, step: int) -> object:
    """As a rank that has joined, and asked for a link with the other one."""

    def play() -> object:
        scene = Scene()
        one = scene.join(1)
        wire = scene.join(0)
        scene.say(one, {"t": "link", "peer": 0})
        return _deliver(scene, wire, _bodies(data), step)

    return staged(play)


def _relay(data: bytes, step: int) -> object:
    """As a leg, for a pair of which the other one is there already."""

    def play() -> object:
        scene = Scene()
        one, wire = scene.join(1), scene.join(0)
        scene.say(one, {"t": "link", "peer": 0})
        scene.say(wire, {"t": "link", "peer": 1})
        return _deliver(scene, scene.connect(), data, step)

    outcome = staged(play)
    # What follows a ticket before the server's word is refused if it comes with it, and else left
    # unread until then.
    return "early" if len(data) > TICKET_BYTES else outcome


# ---------------------------------------------------------------------- from the server


def _client(data: bytes, step: int, welcome: bytes = b"") -> object:
    with steady():
        side, events = ClientSide(hello(0), None), []
        try:
            side.receive(welcome)
            for start in range(0, len(data), step):
                events += side.receive(data[start : start + step])
                if side.failure is not None:
                    raise side.failure
        except FmiError as error:
            return events, repr(error), bytes(side.outgoing)
        return events, bytes(side.outgoing)


def welcome() -> bytes:
    """What the server says to rank 0 that joins: challenge and welcome."""

    def play() -> bytes:
        scene = Scene()
        wire, side = scene.connect(), ClientSide(hello(0), None)
        wire.protocol.data_received(bytes(side.outgoing))
        side.outgoing.clear()
        side.receive(wire.written)
        wire.protocol.data_received(bytes(side.outgoing))
        scene.end()
        return wire.written

    answer = staged(play)
    assert isinstance(answer, bytes)
    return answer


def _told(data: bytes, step: int) -> object:
    """As a server that has proved itself."""
    return _client(_bodies(data), step, welcome())


# ----------------------------------------------------------------------------- texts


def _token(data: bytes, step: int) -> object:
    try:
        token = Token.parse(data.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        return str(error)
    # Whatever is accepted can be sent, and is written in one way only.
    frames.encode(hello(0, expires=token.expires).encode())
    assert Token.parse(token.encode()) == token
    return token


def _key(data: bytes, step: int) -> object:
    found: list[object] = []
    for key in (data, data.decode("utf-8", "surrogateescape")):
        try:
            found.append(parse_key(key))
        except ValueError as error:
            found.append(str(error))
    return found


def _endpoint(data: bytes, step: int) -> object:
    try:
        host, port = parse_endpoint(data.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        return str(error)
    assert host
    assert 0 < port < 65536
    host.encode("idna")  # as who looks it up does
    return host, port


def _networks(data: bytes, step: int) -> object:
    try:
        return read_networks(data.decode("utf-8", "surrogateescape").split())
    except ConfigError as error:
        return str(error)


add(Target("frames", _frames, stream=True))
add(Target("server", _server, stream=True))
add(Target("proxy", partial(_server, proxy=True), stream=True))
add(Target("legacy", _legacy, stream=True))
add(Target("member", _member, stream=True))
add(Target("relay", _relay, stream=True))
add(Target("client", _client, stream=True))
add(Target("told", _told, stream=True))
add(Target("token", _token))
add(Target("key", _key))
add(Target("endpoint", _endpoint))
add(Target("networks", _networks))
