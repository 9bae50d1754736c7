"""Good and bad inputs of the targets in files.py."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from typing import Any

import torch
from torch.utils.data import TensorDataset

from tests.reliability.fuzz.target import Entries
from tests.workflow.result_files import original_record, our_record


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
    return {**ptfile(), "event": events(), **results()}
