"""Good and bad inputs of the targets in peers.py."""

from __future__ import annotations

import msgpack
import numpy as np
import torch

from fmi_client.protocol import frames
from fmi_client.protocol.peer import Handshake, Payload, head
from tests.reliability.fuzz.peers import COOKIE, KEY, SCHEME, nested, packed, sealed
from tests.reliability.fuzz.steady import steady
from tests.reliability.fuzz.target import Entries
from tests.reliability.fuzz.wire_seeds import DEEPER, SAID


def handshake() -> Entries:
    """What the other one sends, to each of the roles."""
    found = {}
    for role, me, peer in ((b"\0", 0, 1), (b"\x80", 1, 0)):
        for keyed in (0, 1):
            key = KEY if keyed else None
            with steady():
                mine = Handshake(me, peer, 0, key, COOKIE)
                theirs = Handshake(peer, me, 0, key, COOKIE)
            theirs.receive(bytes(mine.outgoing))
            choice = b"K" if me < peer else b"P"
            name = f"{'low' if me < peer else 'high'}{'-keyed' * keyed}"
            data = bytes([role[0] | keyed]) + bytes(theirs.outgoing) + choice
            found |= {name: data, f"{name}-wrong-choice": data[:-1] + b"x"}
            found[f"{name}-messages-behind"] = data + b"messages"
            found[f"{name}-itself"] = data[:1] + mine.hello
    return found


def message(number: int, data: bytes, meta: bytes = b"m", sign: bytes = b"sig") -> bytes:
    kind = 2 if number == 3 else 1
    return head((kind, 7, number), sign if kind == 1 else b"", Payload(meta, ()), len(data)) + data


def inbox() -> Entries:
    all_of_them = b"".join(message(n, b"x" * size) for n, size in enumerate((90, 40, 64, 40)))
    huge = head((1, 7, 0), b"sig", Payload(b"", ()), 1 << 40)
    return {
        "awaited": b"\x1f" + all_of_them + message(0, b"again"),
        "unexpected": b"\0" + all_of_them,
        "held": b"\x80" + message(0, b"x" * 33_000),
        "folded-in-parts": b"\x04" + message(2, bytes(range(64))),
        "wrong-sizes": b"\x1f" + message(1, b"x") + message(2, b"x") + message(3, b"x"),
        "wrong-signature": b"\x1f" + message(1, b"x" * 40, sign=b"bcast"),
        "wrong-signature-whole": b"\x0c" + message(2, b"x", sign=b"gxs"),
        "long-head": b"\0" + message(0, b"x", meta=b"m" * 3000, sign=b"s" * 2000),
        "terabyte-awaited": b"\x01" + huge,
        "terabyte": b"\0" + huge,
        "unknown-kind": b"\0\x09" + bytes(31),
        "heads-only": b"\0" + b"".join(message(n, b"", b"") for n in range(10, 40)),
    }


def payload() -> Entries:
    def of(meta: object, data: bytes = b"") -> bytes:
        raw = msgpack.packb(meta)
        return len(raw).to_bytes(2, "big") + raw + data

    mixed = {"a": [1, 2.5, None, True, "text"], "t": (1, (2, 3)), "c": 1j, "big": 10**30}
    return {
        "array": packed(np.arange(6, dtype="<f4").reshape(2, 3)),
        "structured": packed(np.zeros(2, [("a", "<i4"), ("b", "<f8", (2,))])),
        "tensor": packed(torch.arange(4.0)),
        "bfloat16": packed(torch.ones(3, dtype=torch.bfloat16)),
        "bytes": packed(b"bytes"),
        "object": packed(mixed),
        "arrays-in-object": packed([np.ones(2), {"x": torch.ones(2)}]),
        "empty-array-of-8-tebibytes": of(["n", "<f8", [2**40]]),
        "empty-tensor-of-4-tebibytes": of(["t", "float32", [2**40]]),
        "empty-tensor-of-3": of(["t", "float32", [3]]),
        "tensor-of-half-a-number": of(["t", "float32", [1]], b"12345"),
        "tensor-of-another-shape": of(["t", "float32", [3]], b"1234"),
        "tensor-of-no-dtype": of(["t", "nn", [1]], b"1234"),
        "dtype-of-python": of(["n", "(1,i4", [1]], b"1234"),
        "dtype-of-objects": of(["n", "|O", [1]], b"12345678"),
        "dtype-of-nothing": of(["n", "|V0", [1]]),
        "deep-tuples": of(["o"], nested(1000)),
        "deep-meta": len(nested(400)).to_bytes(2, "big") + nested(400),
        "lists-in-lists": of(["o"], DEEPER),
        "complex-beyond-float": of(["o"], msgpack.packb(_complex())),
        "integer-of-letters": of(["o"], msgpack.packb(msgpack.ExtType(4, b"abc"))),
        "key-of-list": of(["o"], b"\x81\x90\xc0"),
        "unknown-extension": of(["o"], b"\xd4\x63\0"),
    }


def _complex() -> msgpack.ExtType:
    huge = msgpack.ExtType(4, b"9" * 400)
    return msgpack.ExtType(3, msgpack.packb([huge, 0.0]))


def objects() -> Entries:
    return {
        "number": msgpack.packb(7),
        "list": msgpack.packb([1, "x", None]),
        "cut": b"\x92\x01",
        "more-behind": b"\x01\x02",
        "invalid": b"\xc1",
        "not-utf8": b"\xa1\xff",
        "deep-tuples": nested(1000),
        "lists-in-lists": DEEPER,
    }


def store() -> Entries:
    said = frames.encode(SAID.encode("aborted"))
    good = SCHEME.ticket("", 1, "ab" * 16)
    return {
        "ticket": good.encode() + b"\n",
        "ticket-of-other-digits": good.replace("1-", "\u0661-", 1).encode() + b"\n",
        "run": sealed("x.answer", b"ab" * 16),
        "event": sealed("1-2", said),
        "event-left": sealed("1-left", said),
        "damaged": sealed("1-2", said)[:-1] + b"x",
        "short": b"1-2\nshort",
        "name-of-no-utf8": b"1-\xff\n",
    }


def corpus() -> dict[str, Entries]:
    messages = {"handshake": handshake(), "inbox": inbox(), "payload": payload()}
    return {**messages, "object": objects(), "store": store()}
