"""What the handlers are given, as models that say exactly which field is wrong.

Accepted are the two payloads of the original project, the demo input of UVA-MLSys/AI-for-Astronomy
(string-typed numbers), one rank's item as that project's initializer makes it (upper-case names),
and our own forms. Names are matched whatever their case. docs/payloads.md explains every field.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lambda_worker.engine import Engine, Precision
from lambda_worker.fields import (
    BatchSize,
    Bucket,
    Count,
    Endpoint,
    Files,
    FilesByRank,
    Index,
    Place,
    RelativePath,
    RunName,
    Seconds,
    SecretArn,
    Threads,
    UniqueId,
    WorldSize,
    bucket_url,
    is_place,
)

DATA_SIZES: dict[str, int] = {"small": 1253, "medium": 25_000, "large": 100_000}
"""Rows of the demo datasets by name (`data_size`)."""


class EventError(ValueError):
    """An event that a handler cannot accept.

    One line says which field, what it was, and what it should be.
    """

    def __init__(self, text: str) -> None:
        # Names of fields are the event's own: line feeds, or halves of characters.
        super().__init__("".join(c if c.isprintable() else "?" for c in text))


class _Job(BaseModel):
    """Fields that the whole job and one rank's part of it have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: BatchSize = 128
    data_bucket: Bucket | None = None
    data_prefix: str | None = None
    model: Place | None = None
    results: Place | None = None
    result_path: RelativePath | None = None
    fmi_enabled: bool | None = None
    rendezvous_endpoint: Endpoint | None = None
    epoch: Index = 0
    timeout: Seconds = 300.0
    threads: Threads | None = None
    engine: Engine = "torch"
    precision: Precision = "fp32"
    strict: bool = False
    # Where secrets are kept, never the secrets.
    server_secret_arn: SecretArn | None = None
    key_arn: SecretArn | None = None
    # The original downloads code from the bucket and runs it. Ours ships inside the worker: what
    # an event names is never executed. Accepted so that existing payloads work, and ignored.
    s3_object_name: str | None = None
    script: str | None = None

    @property
    def joins(self) -> bool:
        """Whether the ranks meet at the rendezvous; by default if the event says where it is."""
        if self.fmi_enabled is None:
            return self.rendezvous_endpoint is not None
        return self.fmi_enabled

    @model_validator(mode="after")
    def _endpoint_if_needed(self) -> _Job:
        if self.joins and self.rendezvous_endpoint is None:
            raise ValueError(
                "rendezvous_endpoint: missing, expected host:port because fmi_enabled is true"
            )
        return self


class Payload(_Job):
    """The event of `init`: one job."""

    world_size: WorldSize | None = None
    bucket: Bucket | None = None
    data: Place | None = None
    data_size: Literal["small", "medium", "large"] | None = None
    data_map: FilesByRank | None = None
    file_limit: Count | None = None
    unique_id: UniqueId | None = None
    run: RunName | None = None
    attempts: Count = 2
    ranks_file: bool = False
    object_type: str | None = None  # ignored, like s3_object_name

    @model_validator(mode="after")
    def _one_entry_per_rank(self) -> Payload:
        if self.data_map is None:
            return self
        size = self.world_size or len(self.data_map)
        if set(self.data_map) != {str(rank) for rank in range(size)}:
            keys = ", ".join(list(self.data_map)[:10]) or "none"
            raise ValueError(f"data_map: got keys {keys}, expected one per rank: 0 to {size - 1}")
        for rank, files in self.data_map.items():
            if isinstance(files, list) and len(set(files)) < len(files):
                raise ValueError(f"data_map.{rank}: expected each file once, got {files}")
        return self

    @model_validator(mode="after")
    def _some_data(self) -> Payload:
        fixed = self.data_map is not None and None not in self.data_map.values()
        if self.data_url is None and not fixed:
            raise ValueError("data: missing, expected a .pt file or folder, or a bucket's name")
        return self

    @property
    def any_bucket(self) -> str | None:
        return self.data_bucket or self.bucket

    @property
    def data_url(self) -> str | None:
        """Where the dataset is: the folder or `.pt` file that the fields name, or None."""
        if self.data is not None:
            return self.data
        if self.any_bucket is not None:
            prefix = self.data_prefix or ("datasets" if self.data_size else "")
            return f"{bucket_url(self.any_bucket)}/{prefix}".rstrip("/")
        # Without a bucket, this machine: where `cosmic data make` puts what it makes.
        return self.data_prefix or ("data" if self.data_size else None)

    def file_url(self, name: str) -> str:
        """Full URL of a file that `data_map` names."""
        if is_place(name):
            return name
        if self.data is None:  # a key of the bucket, as the reference's initializer writes it
            return f"{bucket_url(self.any_bucket)}/{name}" if self.any_bucket else name
        return name if self.data.endswith(".pt") else f"{self.data.rstrip('/')}/{name}"

    def run_name(self) -> str:
        """Name of the run, also the rendezvous job's: `run`, or a new one at every call."""
        if self.run is not None:
            return self.run
        moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        return f"{self.unique_id or 'run'}-{moment}-{secrets.token_hex(3)}"

    def results_url(self, run: str) -> str:
        """Folder of the run's files: `results`/`result_path`/`run`.

        A `result_path` that starts with the last name of `results` does not repeat it, so that
        the original's "results/world_4" is ./results/world_4 here.
        """
        in_bucket = self.results is None and self.data is None and self.any_bucket
        base = self.results or (bucket_url(str(self.any_bucket)) if in_bucket else "results")
        path = self.result_path or ("results" if in_bucket else "")
        if path.startswith("/") and not self.results and not in_bucket:
            return f"{path.rstrip('/')}/{run}"
        parts = [part for part in path.split("/") if part]
        if parts and parts[0] == base.rstrip("/").rpartition("/")[2]:
            parts = parts[1:]
        return "/".join([base.rstrip("/"), *parts, run])


class RankTask(_Job):
    """The event of `infer`: one rank's part, made by our `init` or by the reference's."""

    rank: Index
    world_size: WorldSize
    run: RunName | None = None
    init_id: str | None = None
    shard: list[tuple[str, Index, Index]] | None = None
    data_path: Files = None
    s3_bucket: str | None = None  # ignored, like s3_object_name: where the code was
    s3_object_type: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> RankTask:
        if self.rank >= self.world_size:
            raise ValueError(
                f"rank: got {self.rank}, expected 0 to {self.world_size - 1} (world_size - 1)"
            )
        if self.engine == "auto":
            # Each rank would choose for itself, and metrics depend on who ran where.
            raise ValueError("engine: got auto, which is for init; expected torch, onnx, openvino")
        if self.joins and self.run is None:
            raise ValueError("run: missing, expected the name of the job to join")
        if self.results is None and self.result_path is None:
            raise ValueError("results: missing, expected a folder's URL")
        if any(start > stop for _, start, stop in self.shard or ()):
            raise ValueError("shard: expected [file, start, stop] with start <= stop")
        return self

    @property
    def results_url(self) -> str:
        """Folder that takes this rank's files; for the reference's item, the one it wrote to."""
        if self.results or self.data_bucket is None:
            return self.results or str(self.result_path)
        return f"{bucket_url(self.data_bucket)}/{str(self.result_path).strip('/')}"

    @property
    def whole_files(self) -> list[str]:
        """URLs of the files of the reference's item, which a rank reads from first to last row."""
        names = [self.data_path] if isinstance(self.data_path, str) else self.data_path or []
        if self.data_bucket is None:
            return names
        bucket = bucket_url(self.data_bucket)
        return [name if is_place(name) else f"{bucket}/{name}" for name in names]


class RankStart(BaseModel):
    """The event of `infer` where a state machine counts the attempts: a task, and which one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: dict[str, Any]
    epoch: Index


class RunInfo(BaseModel):
    """The event of `summarize` and `blame`: what `init` returned, and what came since."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: RunName
    world_size: WorldSize
    batch_size: BatchSize
    rows: Index
    results: str
    fmi_enabled: bool
    init_id: str
    model: str
    data: str
    epoch: Index = 0
    max_epochs: Index = 1
    error: Any = None
    # Accepted because a state machine hands on all it has; the run's files are what counts.
    ranks: Any = None
    ranks_file: Any = None
    records: Any = None


class CheckTask(BaseModel):
    """The event of `check`; how the fields go together is `fmi_client.check`'s to say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    server: Place
    job: Place | None = None
    rank: Index | None = None
    size: Count | None = None
    admin_port: Index | None = None
    server_secret_arn: SecretArn | None = None
    timeout: Seconds = 10.0
    wait: Seconds = 60.0


Event = TypeVar("Event", bound=BaseModel)


def parse(form: type[Event], event: object) -> Event:
    """Read an event.

    Args:
        form: Payload, RankTask, RankStart, RunInfo or CheckTask.
        event: a dict as JSON gives it; numbers may be strings, names may be in any case.

    Raises:
        EventError: names every field that is wrong, unknown or missing, on one line.
    """
    if not isinstance(event, dict):
        raise EventError(f"got {_short(event)}, expected a JSON object")
    try:
        return form.model_validate(_lower_names(form, event))
    except ValidationError as error:
        raise EventError("; ".join(_describe(e) for e in error.errors())) from None
    except UnicodeError:  # pydantic has no words for a text that cannot be encoded
        raise EventError("a text in it has half a character (a lone surrogate)") from None


def parse_rank(event: object) -> RankTask:
    """Read the event of `infer`: a task, or `{"task": ..., "epoch": n}`, whose epoch counts.

    Raises:
        EventError: as `parse`.
    """
    if not (isinstance(event, dict) and "task" in map(_lower, event)):
        return parse(RankTask, event)
    start = parse(RankStart, event)
    names = [name for name in start.task if _lower(name) != "epoch"]
    return parse(RankTask, {**{name: start.task[name] for name in names}, "epoch": start.epoch})


def flat(event: object) -> dict[str, Any]:
    """The fields of an event, right or wrong, by lower-case names, those of its task among them."""
    outer = _lowered(event)
    return {**_lowered(outer.pop("task", None)), **outer}  # the epoch beside a task is what counts


def _lowered(event: object) -> dict[str, Any]:
    return {_lower(k): value for k, value in event.items()} if isinstance(event, dict) else {}


class Whereabouts(NamedTuple):
    """Where a rank writes, and who it is."""

    results: str
    rank: int
    epoch: int
    init_id: str | None


def whereabouts(event: object) -> Whereabouts | None:
    """What an event of `infer` says of its rank, even if something else in it is wrong; or None."""
    with suppress(EventError):
        task = parse_rank(event)
        return Whereabouts(task.results_url, task.rank, task.epoch, task.init_id)
    known = {"epoch": 0, **flat(event)}
    with suppress(ValidationError):
        least = {name: known.get(name) for name in _LeastTask.model_fields}
        return Whereabouts(**_LeastTask.model_validate(least).model_dump())
    return None


class _LeastTask(BaseModel):
    results: Place
    rank: Index
    epoch: Index
    init_id: str | None


def _lower(name: object) -> str:
    return str(name).lower()


def _lower_names(form: type[BaseModel], event: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in event.items():
        name = str(key).lower()
        if name not in form.model_fields:
            known = ", ".join(sorted(form.model_fields))
            raise EventError(f"unknown field {key!r}, expected some of: {known}")
        if name in fields:
            raise EventError(f"{key}: given twice, in upper and lower case")
        fields[name] = value
    return fields


def _describe(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{field}: missing, it is required"
    text = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    if field.endswith("_arn"):  # in its place may stand the secret itself, and this goes to logs
        return f"{field}: got what is not shown here, {text}"
    return f"{field}: got {_short(error['input'])}, {text}" if field else text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
