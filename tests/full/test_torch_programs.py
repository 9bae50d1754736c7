"""DDP, FSDP2, device meshes, distributed tensors and communication hooks on the backend "fmi"."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.processes import serve_rendezvous

pytestmark = pytest.mark.full

SIZE = 4


@pytest.mark.timeout(180)
def test_what_torch_builds_on_a_group() -> None:
    command = [sys.executable, "-m", "tests.full.torch_program"]
    with serve_rendezvous() as address:
        ranks = [
            subprocess.Popen(
                [*command, address, str(rank)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(SIZE)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(SIZE)
        ]
        errors = [rank.communicate(timeout=150)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * SIZE, "\n".join(errors)
