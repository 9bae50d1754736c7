"""What the astronomy code imports as ``fmilib.fmi_operations``: see `fmi_client.fmi.alias`."""

from __future__ import annotations

import os

from fmi_client import fmi

CONFIG = "/tmp/Anomaly Detection/config/fmi.json"
"""Where that code's Lambda function unpacks its configuration; FMI_CONFIG names another file."""

JOB, MEMORY_MB = "fmi_pair", 512
"""FMI_JOB gives another name: two runs at the same time need one each."""


def fmi_communicator(world_size: int, rank: int) -> fmi.Communicator:
    """Return the communicator of a run; it joins with its first operation.

    Args:
        world_size: number of ranks.
        rank: of this process, from 0.
    """
    config = os.environ.get("FMI_CONFIG") or CONFIG
    job = os.environ.get("FMI_JOB") or JOB
    return fmi.Communicator(rank, world_size, config, job, MEMORY_MB)
