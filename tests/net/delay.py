"""Packets of the lab's internet take time: ``python -m tests.net.delay DEVICE SECONDS``.

Reads IP packets from a TUN device and writes each back when it is due. Prints a line when
it has begun.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000


def open_tun(name: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return tun


def main(name: str, seconds: float) -> None:
    tun = open_tun(name)
    print("ready", flush=True)
    under_way: deque[tuple[float, bytes]] = deque()
    while True:
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            os.write(tun, under_way.popleft()[1])
        wait = max(0.0, under_way[0][0] - now) if under_way else None
        if select.select([tun], [], [], wait)[0]:
            under_way.append((time.monotonic() + seconds, os.read(tun, 65536)))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
