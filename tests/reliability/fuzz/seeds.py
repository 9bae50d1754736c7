"""Writes the corpus: one good input of each kind, some bad ones, and what once was a bug.

``python -m tests.reliability.fuzz.seeds``; the same bytes each time.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import torch
from torch.utils.data import TensorDataset

from fmi_client.protocol import auth, frames
from fmi_client.protocol.notice import Notice
from fmi_client.protocol.peer import Handshake, Payload, head
from fmi_client.protocol.relay import relay_request
from fmi_client.protocol.rendezvous import ClientSide
from tests.reliability.fuzz.peers import COOKIE, KEY, nested, packed, sealed
from tests.reliability.fuzz.steady import SECRET, Scene, hello, staged, steady
from tests.reliability.fuzz.target import CORPUS
from tests.reliability.fuzz.wire import framed, welcome
from tests.workflow.result_files import original_record, our_record

Entries = Mapping[str, bytes]

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


# ---------------------------------------------------------------------------------- peers


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
    from tests.reliability.fuzz.peers import SCHEME

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


# ---------------------------------------------------------------------------------- files


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def pickled(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read("archive/data.pkl")


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def columns() -> list[torch.Tensor]:
    return [torch.zeros(1, 5, 32, 32).mul(0.0), torch.ones(1, 5), torch.ones(1)]


def tensor(shape: bytes, times: int) -> bytes:
    """Calls of torch's builder of tensors, each with this shape, which is noted once."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0000X\x03\0\0\0cpuK\x01tQ"
    start = b"\x80\x02" + shape + b"q\0(" + storage + b"K\0h\0h\0tq\1"
    build = b"ctorch._utils\n_rebuild_tensor_v2\nq\2"
    return start + build + b"(" + b"h\2h\1R" * times + b"l."


def ptfile() -> dict[str, Entries]:
    good, plain = saved(TensorDataset(*columns())), saved(columns())
    model = {"cls_token": torch.ones(1, 1, 4), "blocks.0.norm1.weight": torch.ones(4)}
    state = saved(model)
    wide = b"(" + b"K\1" * 3000 + b"t"
    long_name = text("torch._utils") + b"q\0" + text("_rebuild_" + "a" * 10_000) + b"q\1"
    many = b"\x80\x02(}(" + b"".join(text(f"{n}") + b"K\1" for n in range(300)) + b"uq\0"
    module = b"cblocks.model_vit_inception\nViT_Astro\nq\1"
    return {
        "ptfile": {
            "dataset": good,
            "cut": good[:6000],
            "nothing-but-its-end": b"PK\3\4PK\5\6\0\0\0\0\0\0\0",
            "state-dict": state,
            "old-format": b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
        },
        "ptfile-pickle": {
            "dataset": pickled(good),
            "list": pickled(plain),
            "state-dict": pickled(state),
            "many-tensors-of-a-long-shape": tensor(wide, 1000),
            "long-names": b"\x80\x02(" + long_name + b"h\0h\1\x93" * 2000 + b"t.",
            "calls-os": b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.",
        },
        "checkpoint": {"state-dict": state, "dataset": good, "cut": state[: len(state) // 2]},
        "checkpoint-pickle": {
            "state-dict": pickled(state),
            "state-given-to-many": many + module + b"(" + b"h\1)\x81h\0b" * 3000 + b"tt.",
            "state-given-again": many + module + b")\x81" + b"h\0b" * 3000 + b"t.",
            "many-tensors-of-a-long-shape": tensor(wide, 1000),
            "calls-os": b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.",
        },
    }


def events() -> Entries:
    init = {"world_size": 2, "data": "data", "rendezvous_endpoint": "localhost:10000"}
    rank = {"rank": 0, "world_size": 2, "run": "r", "results": "results", "init_id": "i"}
    rank |= {"shard": [["data/1.pt", 0, 10]], "fmi_enabled": True}
    rank |= {"rendezvous_endpoint": "localhost:10000", "epoch": 0}
    run = {"run": "r", "world_size": 2, "batch_size": 8, "rows": 3, "results": "s3://b/r"}
    run |= {
        "fmi_enabled": False,
        "init_id": "i",
        "model": "m",
        "data": "d",
        "error": {"Error": "x"},
    }
    found: dict[str, object] = {
        "init": init,
        "init-of-the-original": {"bucket": "b", "world_size": "4", "batch_size": 128, "run": "a.b"}
        | {"data_map": {"0": None, "1": "x.pt", "2": ["y.pt"], "3": None}, "S3_object_name": "x"},
        "rank": rank,
        "rank-started": {"task": rank, "epoch": "1"},
        "run": run,
        "check": {"server": "localhost", "rank": 0, "size": 2, "job": "j"},
        "secrets": init
        | {"key_arn": "arn:aws:secretsmanager:us-east-1:123456789012:secret:a-b", "epoch": -1},
        "names-twice": {"rank": 0, "RANK": 1},
        "no-object": [1, 2],
        "numbers": {"world_size": 1e400, "timeout": float("nan"), "batch_size": True, "data": 3},
        "half-a-character": {"data": "\ud800", "\udfff": 1, "run": "\ud800"},
        "half-a-character-of-a-map": {"data": "d", "data_map": {"\ud800": None}},
    }
    return {name: json.dumps(event).encode() for name, event in found.items()} | {
        "deep": b'{"data": ' + b"[" * 900 + b"]" * 900 + b"}",
        "long-number": b'{"world_size": ' + b"9" * 4000 + b"}",
    }


def results() -> dict[str, Entries]:
    ours, theirs = [our_record(0), our_record(1)], [original_record(), original_record("25MB/2.pt")]
    summary = {"run": "r", "rows": 100, "world_size": 2, "batch_size": 32, "inference_seconds": 1.0}
    main = {"format": 1, "run": "r", "on": "local", "seconds": 5.0, "plan": {"world_size": 2}}
    sweep = {"key": "w2", "status": "ok", "on": "local", "seconds": 5.0, "report": None}
    rest = {"GB_processed": 1.0, "total_execution_time (seconds)": 9.0, "throughput_bps": 1e9}
    head = "partition (MB),data (GB),run,batch_size,total_duration (s),inference_duration (s)\n"
    log = "received: {'WORLD_SIZE': 2, 'RESULT_PATH': 'result-partition-25MB/1GB/1'}\n"
    made: dict[str, dict[str, object]] = {
        "results-records": {"ours": ours, "theirs": theirs, "empty": [], "mixed": [*ours, 1, "x"]},
        "results-summary": {
            "ours": {**summary, "metrics": {"mae": 0.1}},
            "short": {"MAE": 1, "R2": 0},
        },
        "results-run": {
            "ours": {**main, "spans": [[None, "init", 1.0, 2.0]], "environment": {"cpu": "EPYC"}},
            "environment-of-lists": {**main, "environment": {"cpu": [1], "cores": {}}},
        },
        "results-rank": {"ours": ours[0], "theirs": theirs[0]},
        "results-sweep": {"ours": sweep, "failed": {**sweep, "status": "failed"}},
        "results-other": {"totals": [rest], "theirs": theirs, "infer": _infer_report()},
    }
    found = {
        name: {entry: json.dumps(value).encode() for entry, value in entries.items()}
        for name, entries in made.items()
    }
    return found | {
        "results-table": {
            "log": (head + "25MB,1GB,1,512,30.5,20.25\n").encode(),
            "totals": b"partition (MB),data (GB),run,duration\n25,1GB,1,00:26.642\n",
            "nul": head.encode() + b"\0,,\n",
        },
        "results-log": {
            "event": log.encode(),
            "report": b"REPORT RequestId: 1\n",
            "deep": b"received: {" + b"(" * 3000 + b"}\n",
            "escape": b"received: {'\\d': 1}\n",
            "is-of-numbers": b"received: {1: 1 is 1}\n",
        },
    }


def _infer_report() -> dict[str, Any]:
    times = {"seconds": {"load": 1.0, "inference": 2.0, "cpu": 3.0}, "memory_mb": {"peak": 300.0}}
    counts = {"rows": 50, "batches": 2, "batch_size": 32, "batch_seconds": [1.0]}
    return {
        **times,
        **counts,
        "bits_per_second": 1e6,
        "metrics": {},
        "data": "d",
        "engine": "torch",
    }


def corpus() -> dict[str, Entries]:
    """All entries, by target and name."""
    wire = {"frames": {"two": frames.encode(WHO) * 2, "no-map": b"\0\0\0\1\1", "nil": b"\0\0\0\0"}}
    wire["frames"]["good-then-bad"] = frames.encode(WHO) + b"\0\0\0\0"
    wire["frames"]["lists-in-lists"] = struct.pack("!I", len(DEEP)) + DEEP
    protocol = {"server": server(), "proxy": proxy(), "legacy": legacy(), "member": member()}
    protocol |= {"relay": relay(), "client": client(), "told": told_entries(), **texts()}
    ranks = {"handshake": handshake(), "inbox": inbox(), "payload": payload()}
    ranks |= {"object": objects(), "store": store()}
    return {**wire, **protocol, **ranks, **ptfile(), "event": events(), **results()}


def main() -> None:
    for name, entries in corpus().items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for entry, data in entries.items():
            (folder / entry).write_bytes(data)


if __name__ == "__main__":
    main()
