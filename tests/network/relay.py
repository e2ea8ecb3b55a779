"""Delay and loss between the nodes of a lab, where the kernel has no netem: a switch in user space.

    python -m tests.network.relay --namespace NAME --ports 4 --delay-s 0.02 --loss 0.001

Each port of the switch is bridged to a TAP device, and this program passes Ethernet frames between the TAP devices
after the delay. It runs inside the switch's namespace. TAP devices offload nothing, so frames arrive here whole. It
carries 25 to 40 MB/s over all ports together, and adds 0.1 to 0.3 ms to a delay (bench/README.md); the first packet
between two nodes waits one round trip more, for the address to be asked.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

from tests.harness import ROOT, Child
from tests.network.namespaces import join

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
FRAME_BYTES = 65535
START_WAIT_S = 20.0
DROPPED = (errno.EAGAIN, errno.EIO, errno.ENOBUFS)


class Relay:
    """The program as a child process of a lab: one-way delay in seconds, share of frames lost."""

    def __init__(self, namespace: str, ports: int, delay_s: float, loss: float, seed: int) -> None:
        self.delay_s, self.loss = delay_s, loss
        words = f"--ports {ports} --delay-s {delay_s} --loss {loss} --seed {seed}".split()
        self._command = ["ip", "netns", "exec", namespace, sys.executable, "-m", __name__, *words]
        self._namespace = namespace
        self.process: Child | None = None

    def start(self, ports: Sequence[str]) -> None:
        """Start it, wait for its TAP devices, and bridge each to its port."""
        self.process = Child(self._command, cwd=ROOT, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], START_WAIT_S)[0] or not self.process.stdout.readline():
            raise RuntimeError(f"the relay did not start: {' '.join(self._command)}")
        for index, port in enumerate(ports):
            join(self._namespace, f"bridge{index}", [port, f"tap{index}"])

    def stop(self) -> None:
        """End it; twice is once."""
        if self.process:
            self.process.kill()
            self.process.communicate()


def open_tap(name: str) -> int:
    """Make a TAP device; return its file descriptor, which does not block."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    return tap


def relay(taps: Sequence[int], delay_s: float, loss: float, seed: int) -> None:
    """Pass frames on for ever. All wait equally long, so that they leave in the order in which they came."""
    chance = random.Random(seed)
    waiting: deque[tuple[float, int, bytes]] = deque()
    tap_of_address: dict[bytes, int] = {}
    while True:
        wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for tap in select.select(taps, [], [], wait_s)[0]:
            for frame in _arrived(tap):
                tap_of_address[frame[6:12]] = tap
                if chance.random() >= loss:
                    waiting.append((time.monotonic() + delay_s, tap, frame))
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            _, source, frame = waiting.popleft()
            known = tap_of_address.get(frame[:6])
            for tap in [tap for tap in taps if tap != source] if known is None else [known]:
                _send(tap, frame)


def _arrived(tap: int, at_most: int = 32) -> list[bytes]:
    frames = []
    try:
        while len(frames) < at_most:
            frames.append(os.read(tap, FRAME_BYTES))
    except BlockingIOError:
        pass
    return frames


def _send(tap: int, frame: bytes) -> None:
    try:
        os.write(tap, frame)
    except OSError as error:  # the device's queue is full, or its port is down: a switch drops the frame
        if error.errno not in DROPPED:
            raise


def main() -> None:
    """Make the devices, say so on stdout, and relay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ports", type=int, required=True)
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    taps = [open_tap(f"tap{index}") for index in range(arguments.ports)]
    # Late packets would be the machine's delay, not the one asked for.
    os.nice(-10)
    print("ready", flush=True)
    relay(taps, arguments.delay_s, arguments.loss, arguments.seed)


if __name__ == "__main__":
    main()
