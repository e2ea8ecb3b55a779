"""Frames at one node's port that hold a pattern: whoever sits on the link sees no less.

python -m tests.network.capture port0 PATTERN    # until SIGINT; prints frames seen, and frames with the pattern
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.harness import ROOT, Child
from tests.network.lab import Node

ETH_P_ALL = 0x0003
FRAME_BYTES = 65535
BUFFER_BYTES = 64 << 20


@dataclass
class Seen:
    """What a capture saw, once it is over."""

    frames: int = 0
    with_pattern: int = 0


@contextlib.contextmanager
def capture(node: Node, pattern: str) -> Iterator[Seen]:
    """Watch a node's link, at the switch."""
    argv = [sys.executable, "-m", __name__, node.port, pattern]
    seen = Seen()
    command = ["ip", "netns", "exec", node.switch, *argv]
    with Child(command, cwd=ROOT, stdout=subprocess.PIPE) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "watching\n"
        try:
            yield seen
        finally:
            watcher.send_signal(signal.SIGINT)
            printed = watcher.outcome(60).stdout
    seen.frames, seen.with_pattern = map(int, printed.split())


def watch(interface: str, pattern: bytes) -> Seen:
    """Count frames until SIGINT."""
    seen = Seen()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        wire.bind((interface, ETH_P_ALL))
        with contextlib.suppress(KeyboardInterrupt):
            print("watching", flush=True)
            while True:
                frame = wire.recv(FRAME_BYTES)
                seen.frames += 1
                seen.with_pattern += pattern in frame
    return seen


if __name__ == "__main__":
    counted = watch(sys.argv[1], sys.argv[2].encode())
    print(counted.frames, counted.with_pattern)
