"""Good and bad inputs of the targets in wire.py."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fmi_client.protocol import auth, frames
from fmi_client.protocol.notice import Notice
from fmi_client.protocol.relay import relay_request
from fmi_client.protocol.rendezvous import ClientSide
from tests.reliability.fuzz.peers import KEY
from tests.reliability.fuzz.steady import SECRET, Scene, hello, staged
from tests.reliability.fuzz.target import Entries
from tests.reliability.fuzz.wire import framed, welcome

FOREVER = 4102444800  # the year 2100, in Unix seconds
DEEP = b"\xdc\x0f\x00" * 1300
"""Lists of 3,840 items in each other: each would be made before its first item is read."""

DEEPER = b"\xdc\x1e\0" * 1100 + bytes(4700)
"""The same of 7,680 items, for where more than 4 KiB may come."""


def body(message: Mapping[str, Any]) -> bytes:
    return frames.encode(dict(message))[4:]


# ----------------------------------------------------------------------------------- wire


def join(token: bool = False, rank: int = 0, **again: Any) -> bytes:
    """All that a rank sends to join."""

    def play() -> bytes:
        scene = Scene()
        scene.join(1)
        key = auth.admission_key(SECRET, "run", 2, FOREVER)
        given = auth.Token(FOREVER, key) if token else None
        said = replace(hello(rank, expires=FOREVER if token else 0), **again)
        side = ClientSide(said, given)
        wire, sent = scene.connect(), bytes(side.outgoing)
        wire.protocol.data_received(sent)
        side.outgoing.clear()
        side.receive(wire.written)
        scene.end()
        return sent + bytes(side.outgoing)

    made = staged(play)
    assert isinstance(made, bytes)
    return made


def ticket() -> bytes:
    """The first ticket of the scene of "relay"."""

    def play() -> bytes:
        scene = Scene()
        one, two = scene.join(1), scene.join(0)
        scene.say(one, {"t": "link", "peer": 0})
        scene.say(two, {"t": "link", "peer": 1})
        found = next(iter(scene.server.registry.tickets._pairs))
        scene.end()
        return found

    made = staged(play)
    assert isinstance(made, bytes)
    return made


LINK, WHO, LEAVE = {"t": "link", "peer": 1}, {"t": "who"}, {"t": "leave"}
SAID = Notice(0, "abort", "why", "allreduce", 3, (1,))
ABORT = SAID.encode("abort")


def server() -> Entries:
    good, encode = join(), frames.encode
    return {
        "join": good,
        "join-with-token": join(token=True),
        "join-taken-rank": join(rank=1),
        "rejoin": join(identity=b"i" * 16, run=b"r" * 16, began=True) + encode(LINK | {"got": 7}),
        "rejoin-while-waiting": join(identity=b"i" * 16, run=b"r" * 16),
        "join-in-tls": join(certificate=b"c" * 300),
        "join-with-long-certificate": join(certificate=b"c" * 1025),
        "rejoin-of-short-run": join(run=b"r" * 15, began=True),
        "join-link-who": good + encode(LINK) + encode(WHO),
        "join-abort-then-malformed": good + encode(ABORT) + b"\0\0\0\1\xc1",
        "join-leave-then-link": good + encode(LEAVE) + encode(LINK),
        "join-with-malformed-behind": good + b"\0\0\0\1\xc1",
        "two-tickets": relay_request(b"t" * 16) + encode({"t": "relay", "ticket": b"t" * 16}),
        "wrong-proof": good[:-1] + b"x",
        "long-frame": b"\0\0\0\x10\1",
        "lists-in-lists": b"\0" + struct.pack("!I", len(DEEP)) + DEEP,
        "http": b"GET / HTTP/1.1\r\n\r\n",
    }


def proxy() -> Entries:
    signature, good = b"\r\n\r\n\x00\r\nQUIT\n", join()
    four = b"\x21\x11\0\x0c" + bytes([198, 51, 100, 7, 10, 0, 0, 1]) + b"\x10\x92\x27\x10"
    six = (
        b"\x21\x21\0\x24"
        + bytes(10)
        + b"\xff\xff\xc6\x33\x64\x07"
        + bytes(16)
        + b"\x10\x92\x27\x10"
    )
    return {
        "ipv4": signature + four + good,
        "ipv4-in-ipv6": signature + six + good,
        "extensions": signature + b"\x21\x11\0\x10" + four[4:] + b"\x04\0\x01x" + good,
        "health-check": signature + b"\x20\0\0\0",
        "text": b"PROXY TCP4 198.51.100.7 10.0.0.1 4242 10000\r\n",
        "none": good,
        "long": signature + b"\x21\x11\xff\xff",
    }


def legacy() -> Entries:
    request = b"job0_1".ljust(100, b"\0") + bytes(37) + bytes(4)
    again = b"job0_1".ljust(100, b"\0") + b"00112233-4455-6677-8899-aabbccddeeff\0" + bytes(4)
    return {
        "v1": b"job0_1",
        "v1-longest": b"x" * 100,
        "v1-too-long": b"x" * 101,
        "v2": request,
        "v2-token": again,
        "v2-name-without-end": b"x" * 100 + again[100:],
        "v2-zero-after-a-long-name": b"x" * 120 + bytes(21),
        "v2-no-text-and-more": b"\x80" + request,
        "v2-and-more": request + b"x",
        "v3": join(),
    }


def member() -> Entries:
    return {
        "link": framed([body(LINK)]),
        "who-abort-leave": framed([body(WHO), body(ABORT), body(LEAVE)]),
        "leave-then-abort": framed([body(LEAVE), body(ABORT)]),
        "abort-then-malformed": framed([body(ABORT), b"\xc1"]),
        "link-again": framed([body(LINK | {"got": 2**40}), body(LINK | {"got": -1})]),
        "link-with-itself": framed([body({"t": "link", "peer": 0})]),
        "abort-of-no-ranks": framed([body({**ABORT, "ranks": ["x"]})]),
        "unknown": framed([body({"t": "nonsense"})]),
        "lists-in-lists": framed([DEEPER]),
    }


def relay() -> Entries:
    good = relay_request(ticket())
    return {
        "ticket": good,
        "wrong-ticket": relay_request(b"t" * 16),
        "short-ticket": relay_request(b"t" * 15),
        "ticket-of-text": b"\0" + frames.encode({"t": "relay", "ticket": "t" * 16}),
    }


def frame_entries() -> Entries:
    return {
        "two": frames.encode(WHO) * 2,
        "no-map": b"\0\0\0\1\1",
        "nil": b"\0\0\0\0",
        "good-then-bad": frames.encode(WHO) + b"\0\0\0\0",
        "lists-in-lists": struct.pack("!I", len(DEEP)) + DEEP,
    }


def told() -> list[dict[str, Any]]:
    punch = {"t": "punch", "peer": 1, "at": [["10.0.0.8", 1], ["2001:db8::1", 2]]}
    return [
        {"t": "ready"},
        {"t": "want", "peer": 1},
        punch | {"cookie": b"c" * 16, "ticket": b"t" * 16, "hopeless": False},
        {"t": "missing", "ranks": b"\x03"},
        {"t": "gone", "rank": 1, "clean": False, "why": "reset"},
        SAID.encode("aborted"),
        {"t": "draining"},
    ]


def client() -> Entries:
    said = b"".join(map(frames.encode, told()))
    refused = frames.encode({"t": "error", "code": "taken", "why": "rank 0 is here already"})
    return {
        "all": welcome() + said,
        "refused": refused,
        "sent-away": frames.encode({"t": "error", "code": "draining", "why": "", "after": 1e300}),
        "refused-after-ready": welcome() + frames.encode({"t": "ready"}) + refused,
        "wrong-server": welcome()[:-3] + b"xyz",
        "lists-in-lists": struct.pack("!I", len(DEEPER)) + DEEPER,
    }


def told_entries() -> Entries:
    single = {f"{message['t']}": framed([body(message)]) for message in told()}
    return single | {
        "all": framed(map(body, told())),
        "aborted-then-malformed": framed([body(told()[5]), b"\xc1"]),
        "punch-again": framed([body({**told()[2], "got": 7}), body({**told()[2], "got": True})]),
        "punch-in-tls": framed([body({**told()[2], "cert": b"c" * n}) for n in (300, 1025)]),
        "punch-to-a-name": framed([body({**told()[2], "at": [["example.org", 1]]})]),
        "punch-to-port-true": framed([body({**told()[2], "at": [["10.0.0.8", True]]})]),
    }


def texts() -> dict[str, Entries]:
    token = auth.make_token(SECRET, job="run", size=2, expires=FOREVER).encode()
    _, expires, key = token.split(b".")
    return {
        "token": {
            "good": token,
            "line-feed": token + b"\n",
            "far-future": b"fmi3." + b"9" * 30 + b"." + key,
            "underscores": b"fmi3.4_1." + key,
            "negative": b"fmi3.-1." + key,
            "junk-in-key": b"fmi3." + expires + b"." + key[:3] + b"!!" + key[3:],
            "no-utf8": b"fmi3.\xff." + key,
        },
        "key": {"bytes": KEY, "digits": KEY.hex().encode(), "blanks": b"ab " * 32, "short": b"ab"},
        "endpoint": {
            "name": b"example.org:10000",
            "ipv4": b"192.0.2.1",
            "ipv6": b"[2001:db8::1]:10000",
            "ipv6-alone": b"::1",
            "behind-bracket": b"[::1]x:1",
            "long-label": b"a" * 64 + b".org:1",
            "port-0": b"host:0",
            "other-digits": "host:٣".encode(),
            "no-utf8": b"h\xffst:1",
        },
        "networks": {
            "two": b"10.0.0.0/8 192.168.0.0/16",
            "one-host": b"192.0.2.1",
            "ipv6": b"2001:db8::/32",
            "bits-of-host": b"10.0.0.1/8",
        },
    }


def corpus() -> dict[str, Entries]:
    joining = {"server": server(), "proxy": proxy(), "legacy": legacy(), "relay": relay()}
    joined = {"member": member(), "client": client(), "told": told_entries()}
    return {"frames": frame_entries(), **joining, **joined, **texts()}
