"""A long cable: carries frames between two network cards that it makes, each a while after it came.

python cable.py NEAR FAR SECONDS    says "ready" when the cards are there; ends when its input does
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME = 65536


def card(name: str) -> int:
    """A network card that this process is the wire of: reads give what it sends, writes are what it receives."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def main(near: str, far: str, seconds: float) -> None:
    """Carry frames until the standard input ends."""
    ends = card(near), card(far)
    other = dict(zip(ends, reversed(ends), strict=True))
    due: deque[tuple[float, int, bytes]] = deque()  # when, to which end, what; in order, for all take equally long
    print("ready", flush=True)
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        readable, _, _ = select.select([*ends, sys.stdin], [], [], wait)
        if sys.stdin in readable:
            return
        for end in readable:
            due.append((time.monotonic() + seconds, other[end], os.read(end, FRAME)))
        while due and due[0][0] <= time.monotonic():
            _, end, frame = due.popleft()
            os.write(end, frame)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
