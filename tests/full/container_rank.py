"""A rank in a container: it meets the others again and again, until a file tells all to stop."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from fmi_client import sync
from fmi_client.errors import FmiError


def say(**what: Any) -> None:
    print(json.dumps(what | {"at": time.time()}), flush=True)


def main(job: str, rank: int, size: int, stop: Path) -> None:
    say(says="started")
    try:
        with sync.connect("server:10000", job=job, rank=rank, size=size, timeout=60) as comm:
            rounds = 0
            while not comm.allreduce(float(stop.exists())):
                if not rounds:
                    say(says="meets the others")
                rounds += 1
                time.sleep(0.01)
            kinds = {peer: link["kind"] for peer, link in comm.stats()["links"].items()}
            say(says="done", rounds=rounds, kinds=kinds)
    except FmiError as error:
        say(says=type(error).__name__, rank=error.rank, why=str(error))
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
