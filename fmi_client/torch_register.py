"""What torch calls when it is imported (entry point "torch.backends"): makes "fmi" known to it.

Light on purpose, as every program that imports torch pays for it: the backend itself, and with
it numpy, is imported by the first process group that uses it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

NAME = "fmi"


def autoload() -> None:
    """Do `register`, whatever comes: what raises here would break every program's torch."""
    try:
        register()
    except Exception as error:
        warnings.warn(f"torch.distributed has no backend {NAME!r}: {error!r}", stacklevel=2)


def register() -> None:
    """Make the backend "fmi" and ``init_method="fmi://…"`` known; again, nothing happens."""
    from torch import distributed
    from torch.distributed.rendezvous import register_rendezvous_handler

    if not distributed.is_available() or NAME in distributed.Backend.backend_list:
        return
    register_rendezvous_handler(NAME, _rendezvous)  # type: ignore[no-untyped-call]
    distributed.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])


def _rendezvous(url: str, **options: Any) -> Iterator[Any]:
    from fmi_client import torch_join

    yield torch_join.rendezvous(url, **options)
    raise RuntimeError("a job is joined once; begin another one by a new process group")


def _create(options: Any, backend_options: Any) -> Any:
    from fmi_client import torch_backend

    return torch_backend.create(options, backend_options)
