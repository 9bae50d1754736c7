"""The JSON configuration of the C++ FMI library, in our terms.

Its `backends` become the server ("Direct") and the store ("S3") of `fmi_client.connect`; its
`model` becomes what `fmi_client.choose` predicts with. docs/from-fmi.md has every field.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from reprlib import repr as short
from typing import Any

from fmi_client.cost_model import Model
from fmi_client.hints import MODELS, PRICES, Choice, Prices, choose
from fmi_client.protocol.addresses import format_address
from fmi_client.protocol.tls import SCHEME

CHANNELS = {"Direct": "auto", "S3": "object"}
"""What we call their backends."""

OPERATION_SECONDS = 30.0
"""How long an operation may take where no backend has a `max_timeout`."""

LOOK_SECONDS = 0.01
"""A message through a store waits so long for the receiver's next look, on average."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says."""

    server: str | None
    store: str | None
    timeouts: Mapping[str, float]
    """Seconds that an operation may take, by channel."""
    models: Mapping[str, Model]
    prices: Prices

    def choose(self, hint: str, size: int, memory_mb: int) -> Choice:
        """Return the channel for a hint, among those that are enabled, and what was predicted."""
        return choose(
            hint,
            size=size,
            channels=list(self.timeouts),
            models=self.models,
            prices=self.prices,
            memory_mb=memory_mb,
        )


def read(path: str | PathLike[str]) -> Settings:
    """Read a configuration file.

    Raises:
        OSError: it cannot be read; the text says what names it.
        ValueError: it is not what the library would read, or enables nothing that there is here;
            the text names the file and the field.
    """
    try:
        return parse(json.loads(Path(path).read_text()))
    except OSError as error:
        advice = "config_path, or FMI_CONFIG for fmi_communicator, names the JSON configuration"
        raise type(error)(error.errno, f"{error.strerror}: {advice}", str(path)) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(config: Any) -> Settings:
    """Translate a configuration; `read` has the errors."""
    root = Table("the configuration", config)
    backends, model = root.table("backends"), root.table("model")
    enabled = {name: backends.table(name) for name in backends.fields}
    enabled = {name: backend for name, backend in enabled.items() if backend.flag("enabled")}
    known = {name: enabled[name] for name in CHANNELS if name in enabled}
    _check(enabled, known)
    direct, s3 = known.get("Direct"), known.get("S3")
    return Settings(
        _server(direct) if direct is not None else None,
        f"s3://{s3.text('bucket_name')}/fmi" if s3 is not None else None,
        {CHANNELS[name]: _seconds(backend) for name, backend in known.items()},
        {ours: _model(model.table(name), ours) for name, ours in CHANNELS.items()},
        _prices(model),
    )


def _check(enabled: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse what cannot be done; say what is left out."""
    advice = "enable Direct (a rendezvous server), S3, or both"
    unknown = enabled.keys() - known.keys() - {"Redis"}
    if unknown:
        raise ValueError(f"no backend is called {', '.join(sorted(unknown))}: {advice}")
    if not known:
        which = "of the backends only Redis" if enabled else "no backend"
        raise ValueError(f"{which} is enabled, and data does not go through Redis here: {advice}")
    if "Redis" in enabled:
        warnings.warn(
            f"data does not go through Redis here: a hint chooses from {', '.join(known)} only",
            stacklevel=5,
        )


def _server(direct: Table) -> str:
    host, port = direct.text("host"), direct.number("port")
    if port not in range(1, 1 << 16):
        raise ValueError(f"{direct.name}.port={port:g} is no port: 1 to 65535")
    scheme = SCHEME if host.startswith(SCHEME) else ""
    return scheme + format_address((host.removeprefix(SCHEME), int(port)))


def _seconds(backend: Table) -> float:
    """`max_timeout` is in milliseconds, for a wait in Direct.cpp as in ClientServer.cpp."""
    return backend.number("max_timeout", 1000 * OPERATION_SECONDS, zero=False) / 1000


def _model(theirs: Table, channel: str) -> Model:
    """`overhead` is in milliseconds, `bandwidth` in megabytes a second."""
    ours = MODELS[channel]
    look = LOOK_SECONDS if channel == "object" else 0.0
    latency = theirs.number("overhead", 1000 * (ours.latency - look)) / 1000 + look
    bandwidth = theirs.number("bandwidth", ours.bandwidth / 1e6, zero=False) * 1e6
    return Model(latency, bandwidth, ours.reduction)


def _prices(model: Table) -> Prices:
    faas, s3, direct = (model.table(name) for name in ("FaaS", "S3", "Direct"))
    server = direct.number("vm_price", PRICES.server_hour)
    return Prices(
        gb_second=faas.number("gib_second_price", PRICES.gb_second),
        put=s3.number("upload_price", PRICES.put),
        get=s3.number("download_price", PRICES.get),
        # Theirs is one price for the whole machine.
        vcpu_hour=0.0,
        gb_hour=0.0,
        ipv4_hour=server if direct.flag("include_infrastructure_costs") else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Table:
    """An object of the JSON, and where it is, for messages."""

    name: str
    fields: Any

    def __post_init__(self) -> None:
        if not isinstance(self.fields, dict):
            raise ValueError(f"{self.name} is no object of JSON, but {short(self.fields)}")

    def table(self, name: str) -> Table:
        """Return a field that is an object itself; an empty one where it is missing."""
        top = self.name == "the configuration"
        return Table(name if top else f"{self.name}.{name}", self.fields.get(name, {}))

    def flag(self, name: str) -> bool:
        """The library reads everything as text: "true" is as good as true, all else is false."""
        return self.fields.get(name) in (True, "true")

    def text(self, name: str) -> str:
        """Return a field's text, which must be there and not be empty."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{self.name}.{name} is missing, or no text")
        return value

    def number(self, name: str, default: float | None = None, *, zero: bool = True) -> float:
        """Return a finite number that is positive, or 0 where that makes sense."""
        value = self.fields.get(name, default)
        if value is None:
            raise ValueError(f"{self.name}.{name} is missing")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (0 <= number < math.inf and (number or zero)):
            what = "a number from 0 on" if zero else "a number above 0"
            raise ValueError(f"{self.name}.{name}={short(value)} is not {what}")
        return number
