"""A job's plan: which files there are, which rank reads which rows, and what each rank is told."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from lambda_worker import aside, shard, storage
from lambda_worker.engine import DEMO_MODEL, Engine
from lambda_worker.events import Payload


def plan(payload: Payload) -> dict[str, Any]:
    """Plan a job; see `handlers.init`."""
    from lambda_worker import dataset

    files, data_map, world_size = _shares(payload)
    storage.check_writable(payload.results_url("run"))
    counts = aside.in_parallel(dataset.count, files, dataset.OPENERS)
    rows = dict(zip(files, counts, strict=True))
    shards = shard.assign(rows, world_size, data_map)
    # Chosen here and nowhere else: ranks that chose for themselves would not predict the same.
    engine, model = _engine(payload)
    common = _common(payload, world_size, model)
    task = {**common, **_task(payload, engine)}
    ranks = [
        {"rank": number, "shard": [list(piece) for piece in pieces], **task}
        for number, pieces in enumerate(shards)
    ]
    return {
        **common,
        "rows": sum(piece.stop - piece.start for pieces in shards for piece in pieces),
        "data": storage.absolute(payload.data_url) if payload.data_url else "data_map",
        "fmi_enabled": payload.joins,
        "epoch": payload.epoch,
        "max_epochs": payload.epoch + payload.attempts,
        **_handed_on(payload, common["results"], ranks),
    }


def _shares(payload: Payload) -> tuple[list[str], dict[int, list[str] | None], int]:
    """All files, what `data_map` gives to each rank, and the world size."""
    data_map: dict[int, list[str] | None] = {}
    for rank, names in (payload.data_map or {}).items():
        several = [names] if isinstance(names, str) else names
        data_map[int(rank)] = several and [storage.absolute(payload.file_url(n)) for n in several]
    fixed = [file for files in data_map.values() for file in files or ()]
    listed = dataset_files(payload) if not data_map or None in data_map.values() else []
    world_size = payload.world_size or len(data_map)
    if not world_size:  # as the reference does: one rank per file
        data_map = {rank: [file] for rank, file in enumerate(listed)}
        world_size = len(listed)
    return list(dict.fromkeys(listed + fixed)), data_map, world_size


def dataset_files(payload: Payload) -> list[str]:
    """URLs of the dataset's files in natural order (2.pt before 10.pt), up to `file_limit`.

    Raises:
        DatasetError: there are none.
        StorageError: the folder cannot be read.
    """
    from lambda_worker.dataset import DatasetError

    url = storage.absolute(str(payload.data_url))
    if url.endswith(".pt"):
        return [url]
    if (path := storage.local_path(url)) and path.is_file():
        raise DatasetError(f"{url}: expected a .pt file, or a folder of them")
    names = storage.names(url)
    size = payload.data_size
    if size and f"{size}.pt" in names:
        return [f"{url}/{size}.pt"]
    made = sorted(name for name in names if re.fullmatch(f"demo-{size}-.*\\.pt", name))
    if made:  # by `cosmic data make`; of several, say of two seeds, the first
        return [f"{url}/{made[0]}"]
    whole = payload.data is not None and any(name.endswith(".pt") for name in names)
    if size and not (whole and f"{size}/" not in names):  # else the folder itself is meant
        url, names = f"{url}/{size}", storage.names(f"{url}/{size}")
    files = sorted((name for name in names if name.endswith(".pt")), key=_natural)
    if not files:
        folders = ", ".join(name for name in names if name.endswith("/"))
        more = f", only folders: {folders}" if folders else ": check the name"
        raise DatasetError(f"{url}: no .pt file there{more}")
    return [f"{url}/{file}" for file in files[: payload.file_limit]]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]


def _engine(payload: Payload) -> tuple[Engine, str]:
    """The engine of all ranks, and the URL of the model file that it reads."""
    from lambda_worker.exported import choose

    model = storage.absolute(payload.model or str(DEMO_MODEL))
    return choose(payload.engine, payload.precision, model)


def _common(payload: Payload, world_size: int, model: str) -> dict[str, Any]:
    """What ranks, `summarize` and `blame` are told."""
    run = payload.run_name()
    return {
        "run": run,
        "world_size": world_size,
        "batch_size": payload.batch_size,
        "results": storage.absolute(payload.results_url(run)),
        # A run may be repeated under its name: files of the earlier one are told apart by this.
        "init_id": secrets.token_hex(8),
        "model": model,
    }


def _task(payload: Payload, engine: Engine) -> dict[str, Any]:
    """What only ranks are told, all the same."""
    fields: dict[str, Any] = {
        "fmi_enabled": payload.joins,
        "timeout": payload.timeout,
        "strict": payload.strict,
        "engine": engine,
        "precision": payload.precision,
    }
    if payload.threads is not None:
        fields["threads"] = payload.threads
    if payload.joins:
        fields |= {"rendezvous_endpoint": payload.rendezvous_endpoint, "epoch": payload.epoch}
        arns = {name: getattr(payload, name) for name in ("server_secret_arn", "key_arn")}
        fields |= {name: arn for name, arn in arns.items() if arn is not None}
    return fields


def _handed_on(payload: Payload, results: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' events, or the file that a distributed Map reads them from: they may be 10,000."""
    if not payload.ranks_file:
        return {"ranks": ranks}
    asked = payload.model_dump_json(exclude_unset=True, indent=1)
    storage.write(f"{results}/payload.json", asked.encode() + b"\n")
    url = f"{results}/ranks.json"
    storage.write(url, json.dumps(ranks).encode())
    return {"ranks_file": storage.place(url)}
