"""Stands in for `python -m rendezvous_server`; FAKE_SERVER says what happens.

Leaves `server.json` (its options, and its secret file's mode and content) in FAKE_SERVER_FOLDER.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path


def main() -> None:
    what, folder = os.environ.get("FAKE_SERVER", ""), Path(os.environ["FAKE_SERVER_FOLDER"])
    secret = Path(sys.argv[sys.argv.index("--secret-file") + 1])
    seen = {
        "pid": os.getpid(),
        "options": sys.argv[1:],
        "mode": oct(stat.S_IMODE(secret.stat().st_mode)),
        "secret": secret.read_text(),
    }
    partial = Path(folder, "server.part")
    partial.write_text(json.dumps(seen))
    partial.replace(Path(folder, "server.json"))
    print("not JSON, not for us", file=sys.stderr)
    if what == "refuse":
        print(json.dumps({"event": "config.invalid"}), file=sys.stderr)
        sys.exit(2)
    if what != "mute":
        print(json.dumps({"event": "listening", "port": 4321}), file=sys.stderr, flush=True)
    if what == "die":
        rank, deadline = Path(folder, "fake-run", "0.pid"), time.monotonic() + 20
        while not rank.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
